"""From torch tensors to a running kernel: read, prepare once per signature, allocate, launch.

    forward(window, ..., q, k, v) -> describe each tensor -> prepare_forward (cached on the descriptions)
                                  -> torch.empty per result -> executable(pointers, scale, stream, workspace)

Nothing here knows of autograd or of the dispatcher: the callers hand over plain CPU or CUDA tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from natcore import backends
from natcore.planning import Config
from natcore.problem import (
    OPERANDS,
    RESULTS,
    Direction,
    Window,
    call_of,
    check_operand,
    check_packed,
    problem_of,
)
from natcore.views import ITEM_SIZES, Device, View, contiguous_strides

_NAMES = {torch.float64: "float64", torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_SEEDS = {torch.int32: "uint32"}
_WORKSPACE_ALIGNMENT = 256

#: Shape, strides, dtype and device: all of a tensor but its address.
Description = tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]


class Prepared(NamedTuple):
    """One call, ready for pointers. ``results`` gives the shape and dtype of each, None where absent."""

    executable: backends.Executable
    scale: float  # the default one
    cuda_index: int | None  # None on the CPU
    results: tuple[tuple[tuple[int, ...], torch.dtype] | None, ...]
    qkv_step: int  # bytes from q to k and from k to v, where they are packed; else 0
    dqkv_step: int


def window_of(rank: int, kernel_size: Any, stride: Any, dilation: Any, is_causal: Any) -> Window:
    """`Window.of`, remembered where the arguments are hashable."""
    try:
        return _window_of(rank, kernel_size, stride, dilation, is_causal)
    except TypeError:
        return Window.of(rank, kernel_size, stride, dilation, is_causal)


_window_of = lru_cache(maxsize=1024, typed=True)(Window.of)


def forward(
    window: Window,
    scale: float | None,
    config: Config | None,
    with_lse: bool,
    leading: tuple[Tensor, ...],
    extras: tuple[Tensor | None, ...],
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor | None]:
    """out, and lse where asked for. Raises ValueError for anything that is not a valid problem.

    ``leading``: q, k, v, or one packed [batch, *spatial, 3, heads, head_dim]; ``extras``: rpb,
    additional_keys, additional_values, dropout_seed (int32 [1]).
    """
    first, *others = leading
    prepared = prepare_forward(
        window,
        config,
        dropout_p,
        with_lse,
        (first.shape, first.stride(), first.dtype, first.device),
        *[(t.shape, t.stride(), t.dtype, t.device) for t in others],
        *[None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in extras],
    )
    out, lse = (None if r is None else first.new_empty(r[0], dtype=r[1]) for r in prepared.results)
    assert out is not None
    pointers = _pointers(leading, prepared.qkv_step) + [0 if t is None else t.data_ptr() for t in (*extras, out, lse)]
    run(prepared, scale, pointers, first.device)
    return out, lse


def backward(
    window: Window,
    scale: float | None,
    config: Config | None,
    leading: tuple[Tensor, ...],
    saved: tuple[Tensor, Tensor, Tensor, Tensor | None],
    extras: tuple[Tensor | None, ...],
    dropout_p: float = 0.0,
) -> tuple[Tensor | None, ...]:
    """The gradients of ``leading`` and ``extras`` but the seed, as in `forward`; None for what was not given.

    ``saved``: d_out, out, lse, d_lse. A packed gradient is written directly as one tensor.
    """
    d_out, out, lse, d_lse = saved
    d_out, d_lse = readable(d_out), None if d_lse is None else readable(d_lse)
    tensors = (d_out, *leading, out, lse, d_lse, *extras)
    prepared = prepare_backward(window, config, dropout_p, *[None if t is None else describe(t) for t in tensors])
    device = d_out.device
    results = [None if r is None else torch.empty(r[0], dtype=r[1], device=device) for r in prepared.results]
    count = len(leading)
    pointers = [d_out.data_ptr(), *_pointers(leading, prepared.qkv_step)]
    pointers += [0 if t is None else t.data_ptr() for t in tensors[1 + count :]]
    pointers += _pointers(results[:count], prepared.dqkv_step)
    pointers += [0 if t is None else t.data_ptr() for t in results[count:]]
    run(prepared, scale, pointers, device)
    return tuple(results)


def _pointers(leading: Sequence[Any], step: int) -> list[int]:
    """The addresses of q, k and v (or of their gradients), packed or not."""
    if len(leading) == 3:
        q, k, v = leading
        return [q.data_ptr(), k.data_ptr(), v.data_ptr()]
    start = leading[0].data_ptr()
    return [start, start + step, start + 2 * step]


def describe(tensor: Tensor) -> Description:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def readable(gradient: Tensor) -> Tensor:
    """What autograd hands over may be expanded or strided at will: then, and only then, a copy."""
    strides = gradient.stride()
    if 0 in strides or (strides[-1] != 1 and gradient.shape[-1] > 1):
        return gradient.contiguous()
    return gradient


@lru_cache(maxsize=4096)
def prepare_forward(
    window: Window, config: Config | None, dropout_p: float, with_lse: bool, *descriptions: Description | None
) -> Prepared:
    """The call on tensors so described (q, k, v or qkv, and the extras): all checks, the plan, the kernels."""
    return _prepare("forward", window, config, dropout_p, descriptions, ("out", "lse") if with_lse else ("out",))


@lru_cache(maxsize=4096)
def prepare_backward(
    window: Window, config: Config | None, dropout_p: float, *descriptions: Description | None
) -> Prepared:
    """As `prepare_forward`; the descriptions are those of d_out, q, k, v or qkv, out, lse, d_lse, extras."""
    return _prepare("backward", window, config, dropout_p, descriptions, RESULTS["backward"])


def _prepare(
    direction: Direction,
    window: Window,
    config: Config | None,
    dropout_p: float,
    descriptions: tuple[Description | None, ...],
    wanted: tuple[str, ...],
) -> Prepared:
    inputs = [name for name in OPERANDS[direction] if name not in RESULTS[direction]]
    packed, at = None, inputs.index("q")
    if len(descriptions) < len(inputs):
        packed = descriptions[at]
        assert packed is not None  # _is_plain and the schema admit no None there
        descriptions = (*descriptions[:at], *split_packed(window.rank, packed), *descriptions[at + 1 :])
    views = {name: None if d is None else view_of(name, d) for name, d in zip(inputs, descriptions, strict=True)}
    problem = problem_of(window, views, dropout_p)
    q = views["q"]
    assert q is not None  # problem_of raised otherwise
    for name, view in views.items():
        if view is not None:
            check_operand(problem, name, view, q.device)
    for name in RESULTS[direction]:
        shape, dtype = problem.shapes[name], problem.dtype_of(name)
        present = name in wanted and problem.has(name)
        views[name] = View(0, shape, contiguous_strides(shape), dtype, q.device) if present else None
    results = tuple(allocation(views[name]) for name in RESULTS[direction])
    steps = (0, 0) if packed is None else (packed[1][-3], prod(q.shape[-2:]))
    if packed is not None and direction == "backward":
        whole = contiguous_strides(tuple(packed[0]))
        views |= {name: q._replace(strides=(*whole[:-3], *whole[-2:])) for name in ("dq", "dk", "dv")}
        results = ((tuple(packed[0]), packed[2]), *results[3:])
    executable = backends.prepare(call_of(direction, problem, views), q.device, config)
    index = None if q.device.type == "cpu" else q.device.index
    return Prepared(executable, problem.default_scale, index, results, *(step * ITEM_SIZES[q.dtype] for step in steps))


def split_packed(rank: int, qkv: Description) -> tuple[Description, Description, Description]:
    """The descriptions of q, k and v inside qkv [batch, *spatial, 3, heads, head_dim]."""
    shape, strides, dtype, device = qkv
    check_packed(rank, shape)
    part = (torch.Size((*shape[:-3], *shape[-2:])), (*strides[:-3], *strides[-2:]), dtype, device)
    return part, part, part


def view_of(name: str, description: Description) -> View:
    """What natcore checks of one tensor; the address is left out."""
    shape, strides, dtype, device = description
    if name == "dropout_seed":
        return View(
            0, tuple(shape), tuple(strides), _SEEDS.get(dtype, str(dtype)), Device(device.type, device.index or 0)
        )
    if dtype not in _NAMES:
        raise ValueError(f"{name} has dtype {dtype}; supported are {', '.join(map(str, _NAMES))}.")
    return View(0, tuple(shape), tuple(strides), _NAMES[dtype], Device(device.type, device.index or 0))


def dtype_of(name: str) -> torch.dtype:
    """torch's dtype of natcore's name."""
    return _DTYPES[name]


def allocation(result: View | None) -> tuple[tuple[int, ...], torch.dtype] | None:
    return None if result is None else (result.shape, _DTYPES[result.dtype])


def run(prepared: Prepared, scale: float | None, pointers: list[int], device: torch.device) -> None:
    """Launch on the current stream of the tensors' device; scratch memory comes from torch's allocator.

    The stream orders every later use of that memory, so it may be freed as soon as this returns.
    """
    scale = prepared.scale if scale is None else float(scale)
    executable, index = prepared.executable, prepared.cuda_index
    workspace, address = None, 0
    if executable.workspace_bytes:
        workspace = torch.empty(executable.workspace_bytes + _WORKSPACE_ALIGNMENT, dtype=torch.uint8, device=device)
        address = -(-workspace.data_ptr() // _WORKSPACE_ALIGNMENT) * _WORKSPACE_ALIGNMENT
    stream = 0 if index is None else torch._C._cuda_getCurrentRawStream(index)
    executable(pointers, scale, stream, address)
