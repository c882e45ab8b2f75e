"""natcore as the benchmarks call it: the bare kernels on preallocated memory, and torch_nat around them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.peers import Bound, Implementation, Inputs, differentiable
from benchmarks.shapes import Row
from natcore import backends
from natcore.planning import Config, choose
from natcore.problem import OPERANDS, RESULTS, Call, Direction, call_of, problem_of
from natcore.views import Device, View

_ALIGNMENT = 256


def _view(tensor: Tensor) -> View:
    device = Device(tensor.device.type, tensor.device.index or 0)
    dtype = str(tensor.dtype).removeprefix("torch.")
    return View(tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), dtype, device)


def _packed(tensors: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """[batch, *spatial, 3, heads, d], and q, k, v (or their gradients) as views of it."""
    whole = torch.stack(tensors, dim=-3)
    return whole, list(whole.unbind(-3))


def allocate(row: Row, inputs: Inputs, packed: bool = False) -> dict[str, Tensor]:
    """Every operand of both directions, results included, by name."""
    arrays = {name: x for name, x in inputs._asdict().items() if x is not None}
    problem = problem_of(row.window, {name: _view(x) for name, x in arrays.items() if name != "d_out"})
    for name in (*RESULTS["forward"], *RESULTS["backward"]):
        if problem.has(name):
            kind = getattr(torch, problem.dtype_of(name))
            arrays[name] = torch.empty(problem.shapes[name], dtype=kind, device=inputs.q.device)
    if packed:
        for names in (("q", "k", "v"), ("dq", "dk", "dv")):
            arrays |= dict(zip(names, _packed([arrays[name] for name in names])[1], strict=True))
    return arrays


def call_on(direction: Direction, row: Row, arrays: dict[str, Tensor]) -> Call:
    """The call of one direction on these arrays."""
    views = {name: _view(array) for name, array in arrays.items() if name in OPERANDS[direction]}
    return call_of(direction, problem_of(row.window, views), views)


def executable_on(call: Call, arrays: dict[str, Tensor], config: Config | None = None) -> Callable[[], None]:
    """The prepared call on these arrays: what a repetition costs is the launch."""
    device = arrays["q"].device
    executable = backends.prepare(call, _view(arrays["q"]).device, config)
    scratch = torch.empty(executable.workspace_bytes + _ALIGNMENT, dtype=torch.uint8, device=device)
    workspace = -(-scratch.data_ptr() // _ALIGNMENT) * _ALIGNMENT
    pointers = [arrays[name].data_ptr() if name in arrays else 0 for name in call.operands]
    scale = call.problem.default_scale

    def run(keep: tuple = (scratch, arrays)) -> None:
        stream = torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0
        executable(pointers, scale, stream, workspace)

    return run


def _kernel_name(call: Call, device: torch.device) -> str:
    if device.type != "cuda":
        return "cpu"
    from natcore.backends.cuda import facts

    return choose(call, facts(device.index)).name


def bind_kernels(row: Row, inputs: Inputs, packed: bool) -> Bound:
    """Forward (with LSE) and backward (every gradient) on memory allocated here, once."""
    arrays = allocate(row, inputs, packed)
    forward_call = call_on("forward", row, arrays)
    run_forward = executable_on(forward_call, arrays)
    run_backward = executable_on(call_on("backward", row, arrays), arrays)
    gradients = tuple(arrays["d" + name] for name in ("q", "k", "v", "rpb") if name in arrays)

    def forward() -> Tensor:
        run_forward()
        return arrays["out"]

    def both() -> tuple[Tensor, ...]:
        run_forward()
        run_backward()
        return gradients

    return Bound(forward, both, lambda x: x, _kernel_name(forward_call, inputs.q.device))


def bind_torch(row: Row, inputs: Inputs, packed: bool) -> Bound:
    import torch_nat

    w = row.window
    arguments = {n: getattr(w, n) for n in ("kernel_size", "stride", "dilation", "is_causal")}
    function = getattr(torch_nat, f"na{row.rank}d" + ("_qkvpacked" if packed else ""))
    tensors = [_packed(list(inputs[:3]))[0]] if packed else list(inputs[:3])
    count = len(tensors)
    if inputs.rpb is not None:
        tensors.append(inputs.rpb)

    def attention(*given: Tensor) -> Tensor:
        return function(*given[:count], rpb=given[count] if len(given) > count else None, **arguments)

    forward, both = differentiable(attention, tensors, inputs.d_out)

    def unpacked() -> tuple[Tensor, ...]:
        first, *rest = both()
        return (*first.unbind(-3), *rest)

    return Bound(forward, unpacked if packed else both, lambda x: x)


def _any(row: Row) -> bool:
    return True


OURS = [
    Implementation("natcore", _any, lambda row, inputs: bind_kernels(row, inputs, False)),
    Implementation(
        "natcore, packed qkv", lambda row: row.can_pack, lambda row, inputs: bind_kernels(row, inputs, True)
    ),
    Implementation("torch_nat", _any, lambda row, inputs: bind_torch(row, inputs, False)),
    Implementation(
        "torch_nat, packed qkv", lambda row: row.can_pack, lambda row, inputs: bind_torch(row, inputs, True)
    ),
]
