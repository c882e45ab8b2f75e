"""From torch tensors to a running kernel: recognise or prepare, allocate, launch.

    tensors -> find: like those of an earlier call? -> run: allocate -> executable(pointers, scale, stream, workspace)
                  no: describe each -> prepare_* (cached on the descriptions) -> remember

Nothing here knows of autograd or of the dispatcher: the callers hand over plain CPU or CUDA tensors. All that runs
in a repeated call, `find` and `run`, counts its microseconds (benchmarks/latency.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache, partial
from math import prod
from operator import is_
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch._C._dynamo import guards

from natcore import backends
from natcore import recent as recents
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
from natcore.recent import Recent, find, torch_likeness
from natcore.views import ITEM_SIZES, Device, View, contiguous_strides
from natcore.window import Window

_NAMES = {torch.float64: "float64", torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_SEEDS = {torch.int32: "uint32"}
_WORKSPACE_ALIGNMENT = 256
_guards: Any = guards
_likeness = torch_likeness(torch)
# On the current device; these allocate in half the time that new_empty takes.
_empty_cpu, _empty_cuda = _guards._empty_strided_cpu, _guards._empty_strided_cuda
# Absent from CPU builds.
_current_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)
_current_device: Any = getattr(torch._C, "_cuda_getDevice", None)

#: How many tensors follow q, k, v or qkv: rpb, additional_keys, additional_values, dropout_seed.
EXTRAS = 4

NO_TENSOR = "{} is {}; torch_nat takes torch tensors, natcore other arrays."

#: Shape, strides (True: contiguous, which is asked for and compared faster), dtype and device: all of a
#: tensor but its address.
Description = tuple[torch.Size, tuple[int, ...] | Literal[True], torch.dtype, torch.device]


#: Shape, strides and dtype of a tensor to be allocated.
Allocation = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]


#: What fixes a preparation beside the tensors: window, config, dropout_p.
Kind = tuple[Window, Config | None, float]


class Prepared(NamedTuple):
    """One call, ready for pointers."""

    executable: backends.Executable
    scale: float  # the default one
    cuda_index: int | None  # None on the CPU
    results: tuple[Allocation | None, ...]  # None where absent
    packed: tuple[tuple[int, int], ...]  # of packed tensors, the last first: place, bytes from q to k to v
    scratch: Allocation | None  # room for the workspace
    gradients: tuple[Recent, Recent]  # of a forward: its backwards with d_lse, and those without


def remember(recent: Recent, tensors: Sequence[Any], prepared: Any) -> None:
    """As `natcore.recent.remember`, for tensors like these."""
    is_like = None if _likeness is None else _likeness([t for t in tensors if t is not None])
    recents.remember(recent, is_like, prepared)


def backward(
    recent: Recent, kind: Kind, scale: float | None, saved: tuple[Tensor, Tensor, Tensor, Tensor | None], tensors: Any
) -> list[Tensor | None]:
    """The gradients of all ``tensors`` but the seed, as in `run`; None for what was not given.

    ``saved``: d_out, out, lse, d_lse. A packed gradient is written directly as one tensor.
    """
    d_out, out, lse, d_lse = saved
    inputs = (d_out, *tensors[:-EXTRAS], out, lse, d_lse, *tensors[-EXTRAS:])
    prepared = find(recent, inputs)
    if prepared is None:
        given, leading = inputs, len(tensors) - EXTRAS
        d_lse = None if d_lse is None else readable(d_lse)
        inputs = (readable(d_out), *tensors[:leading], out, lse, d_lse, *tensors[leading:])
        prepared = prepare_backward(*kind, *[None if t is None else describe(t) for t in inputs])
        if all(map(is_, inputs, given)):
            remember(recent, inputs, prepared)
    return run(prepared, scale, inputs)


def run(prepared: Prepared, scale: float | None, tensors: Sequence[Any]) -> list[Any]:
    """Allocates results and launches on the current stream of the tensors' device; None for absent results.

    ``tensors``: all operands but the results, as described to `prepare_forward` or `prepare_backward`. Of a forward
    q, k, v, or one packed [batch, *spatial, 3, heads, head_dim]; then rpb, additional_keys, additional_values,
    dropout_seed (int32 [1]), each of which may be None.

    Scratch memory comes from torch's allocator. The stream orders every later use of that memory, so it may be freed
    as soon as this returns.
    """
    executable, default_scale, index, allocations, packed, scratch, _ = prepared
    if index is None:
        empty, stream = _empty_cpu, 0
    else:
        empty = _empty_cuda if _current_device() == index else partial(_empty_elsewhere, tensors[0])
        stream = _current_stream(index)
    results = [None if a is None else empty(*a) for a in allocations]
    pointers = [0 if t is None else t.data_ptr() for t in (*tensors, *results)]
    for place, step in packed:
        start = pointers[place]
        pointers[place : place + 1] = start, start + step, start + 2 * step
    address = 0
    if scratch is not None:
        workspace = empty(*scratch)
        address = -(-workspace.data_ptr() // _WORKSPACE_ALIGNMENT) * _WORKSPACE_ALIGNMENT
    executable(pointers, default_scale if scale is None else float(scale), stream, address)
    return results


def _empty_elsewhere(like: Tensor, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """On a GPU that is not the current one."""
    return like.new_empty_strided(shape, strides, dtype=dtype)


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
    results = [views[name] for name in RESULTS[direction]]
    steps = () if packed is None else ((at, _strides(packed)[-3]),)
    if packed is not None and direction == "backward":
        steps = ((len(inputs) - 2, prod(q.shape[-2:])), *steps)
        shape = tuple(packed[0])
        whole = contiguous_strides(shape)
        views |= {name: q._replace(strides=(*whole[:-3], *whole[-2:])) for name in ("dq", "dk", "dv")}
        results = [q._replace(shape=shape, strides=whole), *results[3:]]
    executable = backends.prepare(call_of(direction, problem, views), q.device, config)
    in_bytes = tuple((place, step * ITEM_SIZES[q.dtype]) for place, step in steps)
    return prepared_of(executable, problem.default_scale, q.device, results, in_bytes)


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


def prepared_of(
    executable: backends.Executable, scale: float, device: Device, results: Iterable[View | None], packed: tuple = ()
) -> Prepared:
    """With all that is to be allocated; ``results`` are None where absent."""
    size = executable.workspace_bytes
    return Prepared(
        executable,
        scale,
        None if device.type == "cpu" else device.index,
        tuple(None if r is None else (r.shape, r.strides, _DTYPES[r.dtype]) for r in results),
        packed,
        ((size + _WORKSPACE_ALIGNMENT,), (1,), torch.uint8) if size else None,
        ([], []),
    )
