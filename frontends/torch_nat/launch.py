"""From torch tensors to a running kernel: read, prepare once per signature, allocate, launch.

    forward(window, ..., q, k, v) -> describe each tensor -> prepare_forward (cached on the descriptions)
                                  -> torch.empty per result -> executable(pointers, scale, stream, workspace)

Nothing here knows of autograd or of the dispatcher: the callers hand over plain CPU or CUDA tensors.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from natcore import backends
from natcore.planning import Config
from natcore.problem import (
    OPERANDS,
    RESULTS,
    Direction,
    Problem,
    Window,
    call_of,
    check_operand,
    check_packed,
    problem_of,
)
from natcore.views import Device, View, contiguous_strides

_NAMES = {torch.float64: "float64", torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_WORKSPACE_ALIGNMENT = 256

#: Shape, strides, dtype and device: all of a tensor but its address.
Description = tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]


class Prepared(NamedTuple):
    """One call, ready for pointers. ``results`` gives the shape and dtype of each, None where absent."""

    executable: backends.Executable
    scale: float  # the default one
    cuda_index: int | None  # None on the CPU
    results: tuple[tuple[tuple[int, ...], torch.dtype] | None, ...]


def window_of(rank: int, kernel_size: Any, stride: Any, dilation: Any, is_causal: Any) -> Window:
    """`Window.of`, remembered where the arguments are hashable."""
    try:
        return _window_of(rank, kernel_size, stride, dilation, is_causal)
    except TypeError:
        return Window.of(rank, kernel_size, stride, dilation, is_causal)


_window_of = lru_cache(maxsize=1024, typed=True)(Window.of)


def split_packed(rank: int, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as views inside qkv [batch, *spatial, 3, heads, head_dim]."""
    check_packed(rank, qkv.shape)
    q, k, v = qkv.unbind(-3)
    return q, k, v


def forward(
    window: Window,
    scale: float | None,
    config: Config | None,
    with_lse: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """out, and lse where asked for. Raises ValueError for anything that is not a valid problem."""
    tensors = (q, k, v, rpb, additional_keys, additional_values)
    prepared = prepare_forward(
        window,
        config,
        with_lse,
        (q.shape, q.stride(), q.dtype, q.device),
        (k.shape, k.stride(), k.dtype, k.device),
        (v.shape, v.stride(), v.dtype, v.device),
        None if rpb is None else describe(rpb),
        None if additional_keys is None else describe(additional_keys),
        None if additional_values is None else describe(additional_values),
    )
    out, lse = _empty(prepared.results, q.device)
    assert out is not None
    _run(prepared, scale, (*tensors, out, lse), q.device)
    return out, lse


def backward(
    window: Window,
    scale: float | None,
    config: Config | None,
    tensors: tuple[Tensor | None, ...],
    packed: bool = False,
) -> tuple[Tensor | None, ...]:
    """dq, dk, dv, drpb, d_additional_keys, d_additional_values; None for what was not given.

    ``tensors``: d_out, q, k, v, out, lse, d_lse, rpb, additional_keys, additional_values. With
    ``packed``, one dqkv [batch, *spatial, 3, heads, head_dim] stands for the first three gradients.
    """
    d_out, q, k, v, out, lse, d_lse, *extras = tensors
    assert d_out is not None and q is not None
    tensors = (_readable(d_out), q, k, v, out, lse, None if d_lse is None else _readable(d_lse), *extras)
    prepared = prepare_backward(window, config, packed, *(None if t is None else describe(t) for t in tensors))
    if not packed:
        results = _empty(prepared.results, q.device)
        _run(prepared, scale, (*tensors, *results), q.device)
        return results
    dqkv = torch.empty((*q.shape[:-2], 3, *q.shape[-2:]), dtype=q.dtype, device=q.device)
    others = _empty(prepared.results[3:], q.device)
    _run(prepared, scale, (*tensors, *dqkv.unbind(-3), *others), q.device)
    return dqkv, *others


def describe(tensor: Tensor) -> Description:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _readable(gradient: Tensor) -> Tensor:
    """What autograd hands over may be expanded or strided at will: then, and only then, a copy."""
    strides = gradient.stride()
    if 0 in strides or (strides[-1] != 1 and gradient.shape[-1] > 1):
        return gradient.contiguous()
    return gradient


@lru_cache(maxsize=4096)
def prepare_forward(
    window: Window, config: Config | None, with_lse: bool, *descriptions: Description | None
) -> Prepared:
    """The call on tensors so described: all checks, the plan, the kernels."""
    return _prepare("forward", window, config, descriptions, {} if with_lse else {"lse": None})


@lru_cache(maxsize=4096)
def prepare_backward(
    window: Window, config: Config | None, packed: bool, *descriptions: Description | None
) -> Prepared:
    strides: dict[str, tuple[int, ...] | None] = {}
    if packed:
        q = descriptions[1]
        assert q is not None
        whole = contiguous_strides((*q[0][:-2], 3, *q[0][-2:]))
        strides |= dict.fromkeys(("dq", "dk", "dv"), (*whole[:-3], *whole[-2:]))
    return _prepare("backward", window, config, descriptions, strides)


def _prepare(
    direction: Direction,
    window: Window,
    config: Config | None,
    descriptions: tuple[Description | None, ...],
    result_strides: dict[str, tuple[int, ...] | None],
) -> Prepared:
    """``result_strides``: for results that are not contiguous; None for one that nobody asked for."""
    names = OPERANDS[direction]
    inputs = [name for name in names if name not in RESULTS[direction]]
    views = {name: None if d is None else view_of(name, d) for name, d in zip(inputs, descriptions, strict=True)}
    problem = problem_of(window, views)
    q = views["q"]
    assert q is not None  # problem_of raised otherwise
    for name, view in views.items():
        if view is not None:
            check_operand(problem, name, view, q.device)
    for name in RESULTS[direction]:
        shape = problem.shapes[name]
        strides = result_strides.get(name, contiguous_strides(shape)) if problem.has(name) else None
        views[name] = None if strides is None else View(0, shape, strides, problem.dtype_of(name), q.device)
    executable = backends.prepare(call_of(direction, problem, views), q.device, config)
    return Prepared(
        executable,
        problem.default_scale,
        None if q.device.type == "cpu" else q.device.index,
        tuple(_allocation(problem, name) if views[name] is not None else None for name in RESULTS[direction]),
    )


def view_of(name: str, description: Description) -> View:
    """What natcore checks of one tensor; the address is left out."""
    shape, strides, dtype, device = description
    if dtype not in _NAMES:
        raise ValueError(f"{name} has dtype {dtype}; supported are {', '.join(map(str, _NAMES))}.")
    return View(0, tuple(shape), tuple(strides), _NAMES[dtype], Device(device.type, device.index or 0))


def _allocation(problem: Problem, name: str) -> tuple[tuple[int, ...], torch.dtype]:
    return problem.shapes[name], _DTYPES[problem.dtype_of(name)]


def _empty(
    results: tuple[tuple[tuple[int, ...], torch.dtype] | None, ...], device: torch.device
) -> tuple[Tensor | None, ...]:
    return tuple(None if r is None else torch.empty(r[0], dtype=r[1], device=device) for r in results)


def _run(prepared: Prepared, scale: float | None, tensors: tuple[Tensor | None, ...], device: torch.device) -> None:
    """Launch on the current stream of the tensors' device; scratch memory comes from torch's allocator.

    The stream orders every later use of that memory, so it may be freed as soon as this returns.
    """
    pointers = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    scale = prepared.scale if scale is None else float(scale)
    executable, index = prepared.executable, prepared.cuda_index
    workspace, address = None, 0
    if executable.workspace_bytes:
        workspace = torch.empty(executable.workspace_bytes + _WORKSPACE_ALIGNMENT, dtype=torch.uint8, device=device)
        address = -(-workspace.data_ptr() // _WORKSPACE_ALIGNMENT) * _WORKSPACE_ALIGNMENT
    stream = 0 if index is None else torch._C._cuda_getCurrentRawStream(index)
    executable(pointers, scale, stream, address)
