"""From torch tensors to a running kernel: read, prepare once per signature, allocate, launch.

    forward(..., q, k, v) -> describe each tensor -> prepare_forward (cached on the descriptions)
                                  -> torch.empty per result -> executable(pointers, scale, stream, workspace)

Nothing here knows of autograd or of the dispatcher: the callers hand over plain CPU or CUDA tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from natcore import backends
from natcore.planning import Config
from natcore.problem import (
    OPERANDS,
    RESULTS,
    Direction,
    call_of,
    check_operand,
    check_packed,
    problem_of,
)
from natcore.views import ITEM_SIZES, Device, View, contiguous_strides
from natcore.window import Window

_NAMES = {torch.float64: "float64", torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_SEEDS = {torch.int32: "uint32"}
_WORKSPACE_ALIGNMENT = 256
_current_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # absent from CPU builds

#: How many tensors follow q, k, v or qkv: rpb, additional_keys, additional_values, dropout_seed.
EXTRAS = 4

NO_TENSOR = "{} is {}; torch_nat takes torch tensors, natcore other arrays."

#: Shape, strides (True: contiguous, which is asked for and compared faster), dtype and device: all of a
#: tensor but its address.
Description = tuple[torch.Size, tuple[int, ...] | Literal[True], torch.dtype, torch.device]


#: Shape, strides and dtype of a tensor to be allocated.
Allocation = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]


#: What one call is beside its tensors: window, scale, config, dropout_p.
Call = tuple[Window, float | None, Config | None, float]


class Prepared(NamedTuple):
    """One call, ready for pointers."""

    executable: backends.Executable
    scale: float  # the default one
    cuda_index: int | None  # None on the CPU
    results: tuple[Allocation | None, ...]  # None where absent
    packed: tuple[tuple[int, int], ...] = ()  # of packed tensors, the last first: place, bytes from q to k to v


def forward(prepared: Prepared, scale: float | None, tensors: Sequence[Any]) -> tuple[Tensor, Tensor | None]:
    """out, and lse where it was asked for.

    ``tensors``: q, k, v, or one packed [batch, *spatial, 3, heads, head_dim]; then rpb, additional_keys,
    additional_values, dropout_seed (int32 [1]), each of which may be None; as described to `prepare_forward`.
    """
    like = tensors[0]
    # new_empty_strided takes half a microsecond less than new_empty
    out, lse = [None if r is None else like.new_empty_strided(r[0], r[1], dtype=r[2]) for r in prepared.results]
    pointers = [0 if t is None else t.data_ptr() for t in (*tensors, out, lse)]
    run(prepared, scale, pointers, like)
    return out, lse  # pyright: ignore[reportReturnType]  # out is always there


def backward(
    call: Call, saved: tuple[Tensor, Tensor, Tensor, Tensor | None], tensors: Sequence[Any]
) -> list[Tensor | None]:
    """The gradients of all ``tensors`` but the seed, as in `forward`; None for what was not given.

    ``saved``: d_out, out, lse, d_lse. A packed gradient is written directly as one tensor.
    """
    window, scale, config, dropout_p = call
    d_out, out, lse, d_lse = saved
    d_out, d_lse = readable(d_out), None if d_lse is None else readable(d_lse)
    leading = len(tensors) - EXTRAS
    inputs = (d_out, *tensors[:leading], out, lse, d_lse, *tensors[leading:])
    described = [None if t is None else describe(t) for t in inputs]
    prepared = prepare_backward(window, config, dropout_p, *described)
    # A gradient has the shape and the dtype of its tensor.
    results = [None if t is None else _empty_like(t, memory_format=_ROW_MAJOR) for t in tensors[:-1]]
    pointers = [0 if t is None else t.data_ptr() for t in (*inputs, *results)]
    run(prepared, scale, pointers, d_out)
    return results


_empty_like, _ROW_MAJOR = torch.empty_like, torch.contiguous_format


def describe(tensor: Tensor) -> Description:
    return tensor.shape, tensor.is_contiguous() or tensor.stride(), tensor.dtype, tensor.device


def _strides(description: Description) -> tuple[int, ...]:
    shape, strides, *_ = description
    return contiguous_strides(tuple(shape)) if isinstance(strides, bool) else strides


def readable(gradient: Tensor) -> Tensor:
    """What autograd hands over may be expanded or strided at will: then, and only then, a copy."""
    strides = gradient.stride()
    if 0 in strides or (strides[-1] != 1 and gradient.shape[-1] > 1):
        return gradient.contiguous()
    return gradient


@lru_cache(maxsize=4096)
def prepare_forward(
    window: Window,
    config: Config | None,
    dropout_p: float,
    with_lse: bool,
    *descriptions: Description | tuple[()] | None,
) -> Prepared | None:
    """The call on tensors so described (q, k, v or qkv, and the extras): all checks, the plan, the kernels.

    None where a tensor is not plain memory on a CPU or a GPU; () describes such a tensor. Raises ValueError
    for anything that is not a valid problem.
    """
    plain = [d for d in descriptions if d is None or (d and d[3].type in ("cpu", "cuda"))]
    if len(plain) < len(descriptions):
        return None
    return _prepare("forward", window, config, dropout_p, tuple(plain), ("out", "lse") if with_lse else ("out",))


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
        if packed is None:
            raise TypeError(NO_TENSOR.format("qkv", "NoneType"))
        descriptions = (*descriptions[:at], *split_packed(window.rank, packed), *descriptions[at + 1 :])
    views = {name: None if d is None else view_of(name, d) for name, d in zip(inputs, descriptions, strict=True)}
    for name in ("q", "k", "v"):
        if views[name] is None:
            raise TypeError(NO_TENSOR.format(name, "NoneType"))
    problem = problem_of(window, views, dropout_p)
    q = views["q"]
    assert q is not None
    for name, view in views.items():
        if view is not None:
            check_operand(problem, name, view, q.device)
    for name in RESULTS[direction]:
        shape, dtype = problem.shapes[name], problem.dtype_of(name)
        present = name in wanted and problem.has(name)
        views[name] = View(0, shape, contiguous_strides(shape), dtype, q.device) if present else None
    results = tuple(allocation(views[name]) for name in RESULTS[direction])
    steps = () if packed is None else ((at, _strides(packed)[-3]),)
    if packed is not None and direction == "backward":
        steps = ((len(inputs) - 2, prod(q.shape[-2:])), *steps)
        whole = contiguous_strides(tuple(packed[0]))
        views |= {name: q._replace(strides=(*whole[:-3], *whole[-2:])) for name in ("dq", "dk", "dv")}
        results = ((tuple(packed[0]), whole, packed[2]), *results[3:])
    executable = backends.prepare(call_of(direction, problem, views), q.device, config)
    index = None if q.device.type == "cpu" else q.device.index
    in_bytes = tuple((place, step * ITEM_SIZES[q.dtype]) for place, step in steps)
    return Prepared(executable, problem.default_scale, index, results, in_bytes)


def split_packed(rank: int, qkv: Description) -> tuple[Description, Description, Description]:
    """The descriptions of q, k and v inside qkv [batch, *spatial, 3, heads, head_dim]."""
    shape, _, dtype, device = qkv
    check_packed(rank, shape)
    strides = _strides(qkv)
    part = (torch.Size((*shape[:-3], *shape[-2:])), (*strides[:-3], *strides[-2:]), dtype, device)
    return part, part, part


def view_of(name: str, description: Description) -> View:
    """What natcore checks of one tensor; the address is left out."""
    shape, _, dtype, device = description
    if name == "dropout_seed":
        known = _SEEDS.get(dtype, str(dtype))
    elif dtype in _NAMES:
        known = _NAMES[dtype]
    else:
        raise ValueError(f"{name} has dtype {dtype}; supported are {', '.join(map(str, _NAMES))}.")
    return View(0, tuple(shape), tuple(_strides(description)), known, Device(device.type, device.index or 0))


def dtype_of(name: str) -> torch.dtype:
    """torch's dtype of natcore's name."""
    return _DTYPES[name]


def name_of(dtype: torch.dtype) -> str:
    """natcore's name of torch's dtype."""
    return _NAMES[dtype]


def allocation(result: View | None) -> Allocation | None:
    return None if result is None else (result.shape, result.strides, _DTYPES[result.dtype])


def run(prepared: Prepared, scale: float | None, pointers: list[int], like: Tensor) -> None:
    """Launch on the current stream of ``like``'s device; scratch memory comes from torch's allocator.

    The stream orders every later use of that memory, so it may be freed as soon as this returns.
    """
    executable, default_scale, index, _, packed = prepared
    for place, step in packed:
        start = pointers[place]
        pointers[place : place + 1] = start, start + step, start + 2 * step
    address, size = 0, executable.workspace_bytes
    if size:
        workspace = like.new_empty(size + _WORKSPACE_ALIGNMENT, dtype=torch.uint8)
        address = -(-workspace.data_ptr() // _WORKSPACE_ALIGNMENT) * _WORKSPACE_ALIGNMENT
    stream = 0 if index is None else _current_stream(index)
    executable(pointers, default_scale if scale is None else float(scale), stream, address)
