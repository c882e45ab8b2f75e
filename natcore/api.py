"""The public door: arrays in, arrays of the same kind out. Check, plan (both cached), run.

    na2d(q, k, v, 7)  ->  views  ->  _prepare: Problem, Call, Executable (cached)  ->  executable(...)

`Gradients` and everything else that is checked lives in `natcore.problem`; how arrays are read and
made, in `natcore.arrays`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from natcore import backends
from natcore.arrays import Borrowed, Kind, kind_of, stream_handle
from natcore.planning import Config
from natcore.problem import (
    OPERANDS,
    RESULTS,
    Direction,
    Gradients,
    Problem,
    Window,
    call_of,
    check_operand,
    check_packed,
    check_result,
    problem_of,
)
from natcore.views import ITEM_SIZES, Device, View, contiguous_strides

PerAxis = int | Sequence[int]
PerAxisFlag = bool | Sequence[bool]
_ALIGNMENT = 256
_INPUTS = OPERANDS["forward"][:7]
_GRADIENTS = Gradients._fields


class _Prepared(NamedTuple):
    problem: Problem
    executable: backends.Executable
    fresh: tuple[tuple[int, tuple[int, ...], str], ...]  # results to allocate: place, shape, dtype


@lru_cache(maxsize=4096)
def _prepare(
    direction: Direction, window_arguments: tuple, described: tuple[View | None, ...], config: Config | None
) -> _Prepared:
    """Everything that needs no memory: checks, plan, kernels. ``described`` follows OPERANDS."""
    window = Window.of(*window_arguments)
    views = dict(zip(OPERANDS[direction], described, strict=True))
    problem = problem_of(window, views)
    device = next(view.device for view in described if view is not None)
    for name, view in views.items():
        if view is not None:
            check = check_result if name in RESULTS[direction] else check_operand
            check(problem, name, view, device)
    fresh = tuple(
        (index, problem.shapes[name], problem.dtype_of(name))
        for index, name in enumerate(OPERANDS[direction])
        if name in RESULTS[direction] and views[name] is None and problem.has(name)
    )
    for index, shape, dtype in fresh:
        views[OPERANDS[direction][index]] = View(0, shape, contiguous_strides(shape), dtype, device)
    return _Prepared(problem, backends.prepare(call_of(direction, problem, views), device, config), fresh)


class _Session(NamedTuple):
    """Where one call happens: the kind of array that q is, its device, the stream (None on the CPU)."""

    kind: Kind
    like: Any
    device: Device
    stream: int | None

    @classmethod
    def of(cls, name: str, q: Any, stream: Any) -> _Session:
        kind = kind_of(name, q)
        device = kind.device(name, q)
        if device.type == "cpu":
            if stream is not None:
                raise ValueError(f"stream {stream!r} was given, but {name} is on the CPU.")
            return cls(kind, q, device, None)
        return cls(kind, q, device, kind.current_stream(device) if stream is None else stream_handle(stream))

    def read(self, name: str, array: Any) -> Borrowed | None:
        return None if array is None else kind_of(name, array).read(name, array, self.stream)

    def empty(self, shape: tuple[int, ...], dtype: str) -> tuple[Any, int]:
        """New memory and its address."""
        array = self.kind.empty(shape, dtype, self.like, self.device, self.stream)
        return array, self.kind.address(array)


def _run(
    session: _Session,
    direction: Direction,
    window_arguments: tuple,
    operands: tuple[Borrowed | None, ...],
    scale: float | None,
    config: Config | None,
) -> list[Any]:
    """Prepares and runs one call on operands in OPERANDS order; returns the arrays that were allocated
    for absent results, at their places, None elsewhere."""
    described = tuple([None if b is None else b.described for b in operands])
    problem, executable, fresh = _prepare(direction, window_arguments, described, config)
    pointers = [0 if b is None else b.ptr for b in operands]
    results: list[Any] = [None] * len(pointers)
    for index, shape, dtype in fresh:
        results[index], pointers[index] = session.empty(shape, dtype)
    workspace = 0
    if executable.workspace_bytes:
        words = -(-(executable.workspace_bytes + _ALIGNMENT) // ITEM_SIZES["float32"])
        _held, address = session.empty((words,), "float32")  # until the launch; then the stream's order protects it
        workspace = -(-address // _ALIGNMENT) * _ALIGNMENT
    executable(pointers, problem.default_scale if scale is None else float(scale), session.stream or 0, workspace)
    session.kind.finish(session.device, session.stream)
    return results


def _window_arguments(rank: int, *arguments: Any) -> tuple:
    """Hashable: sequences become tuples."""
    return (rank, *[tuple(a) if isinstance(a, Sequence) else a for a in arguments])


def _split_packed(rank: int, packed: Borrowed) -> tuple[Borrowed, ...]:
    """q, k and v as views inside qkv [batch, *spatial, 3, heads, head_dim]."""
    view = packed.described
    check_packed(rank, view.shape)
    part = view._replace(shape=(*view.shape[:-3], *view.shape[-2:]), strides=(*view.strides[:-3], *view.strides[-2:]))
    step = view.strides[-3] * ITEM_SIZES.get(view.dtype, 0)
    return tuple([Borrowed(packed.ptr + i * step, part, packed.read_only, packed.keep) for i in range(3)])


def _forward(session, window_arguments, inputs, scale, return_lse, out, config):
    """Shared by the plain and the packed entry; ``inputs`` is what was read of OPERANDS up to out."""
    target = session.read("out", out)
    if target is not None and target.read_only:
        raise ValueError("out is read-only memory (JAX arrays always are); pass a writable array or None.")
    results = _run(session, "forward", window_arguments, (*inputs, target, None), scale, config)
    answer = results[-2] if out is None else out
    return (answer, results[-1]) if return_lse else answer


def _make_forward(rank: int):
    def attend(
        q: Any, k: Any, v: Any, kernel_size: PerAxis, *, stride: PerAxis = 1, dilation: PerAxis = 1,
        is_causal: PerAxisFlag = False, scale: float | None = None, rpb: Any = None, additional_keys: Any = None,
        additional_values: Any = None, return_lse: bool = False, out: Any = None, config: Config | None = None,
        stream: Any = None,
    ) -> Any:  # fmt: skip
        session = _Session.of("q", q, stream)
        given = zip(_INPUTS, (q, k, v, rpb, additional_keys, additional_values, None), strict=True)
        window_arguments = _window_arguments(rank, kernel_size, stride, dilation, is_causal)
        inputs = [session.read(name, array) for name, array in given]
        return _forward(session, window_arguments, inputs, scale, return_lse, out, config)

    return _documented(attend, f"na{rank}d", _FORWARD_DOC, rank)


def _make_packed(rank: int):
    def attend(
        qkv: Any, kernel_size: PerAxis, *, stride: PerAxis = 1, dilation: PerAxis = 1,
        is_causal: PerAxisFlag = False, scale: float | None = None, rpb: Any = None, additional_keys: Any = None,
        additional_values: Any = None, return_lse: bool = False, out: Any = None, config: Config | None = None,
        stream: Any = None,
    ) -> Any:  # fmt: skip
        session = _Session.of("qkv", qkv, stream)
        given = zip(_INPUTS[3:], (rpb, additional_keys, additional_values, None), strict=True)
        window_arguments = _window_arguments(rank, kernel_size, stride, dilation, is_causal)
        packed = session.kind.read("qkv", qkv, session.stream)
        inputs = [*_split_packed(rank, packed), *[session.read(name, array) for name, array in given]]
        return _forward(session, window_arguments, inputs, scale, return_lse, out, config)

    return _documented(attend, f"na{rank}d_qkvpacked", _PACKED_DOC, rank)


def _make_backward(rank: int):
    def differentiate(
        d_out: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, kernel_size: PerAxis, *, stride: PerAxis = 1,
        dilation: PerAxis = 1, is_causal: PerAxisFlag = False, scale: float | None = None, rpb: Any = None,
        additional_keys: Any = None, additional_values: Any = None, d_lse: Any = None, config: Config | None = None,
        stream: Any = None,
    ) -> Gradients:  # fmt: skip
        session = _Session.of("q", q, stream)
        arrays = (
            d_out,
            q,
            k,
            v,
            out,
            lse,
            d_lse,
            rpb,
            additional_keys,
            additional_values,
            None,
            *[None] * len(_GRADIENTS),
        )
        for name, array in (("d_out", d_out), ("out", out), ("lse", lse)):
            if array is None:
                raise ValueError(f"{name} is None; the backward needs it (call na{rank}d with return_lse=True).")
        window_arguments = _window_arguments(rank, kernel_size, stride, dilation, is_causal)
        operands = tuple([session.read(n, a) for n, a in zip(OPERANDS["backward"], arrays, strict=True)])
        results = _run(session, "backward", window_arguments, operands, scale, config)
        return Gradients(*results[-len(_GRADIENTS) :])

    return _documented(differentiate, f"na{rank}d_backward", _BACKWARD_DOC, rank)


_ARGUMENTS_DOC = """
    kernel_size, stride, dilation: int or one int per spatial axis, with kernel_size * dilation <=
        extent and 1 <= stride <= kernel_size.
    is_causal: bool or one bool per spatial axis.
    scale: factor on q . k before the softmax; default head_dim ** -0.5. 0 and negatives count.
    rpb: relative positional bias [heads, {rpb_axes}], float32 or q's dtype, added unscaled
        (Hassani et al., "Neighborhood Attention Transformer", CVPR 2023, eq. 2).
    additional_keys, additional_values: [batch, extra, heads_kv, head_dim], seen by every query.
    config: an explicit `natcore.Config` in place of the planner's choice.
    stream: CUDA stream (int handle or stream object); default: the producer's current stream.

float64, float32, float16 or bfloat16; sums are in float32 or better. Any strides with a contiguous
last axis, never copied. Arrays may be NumPy's, or torch, CuPy, JAX or array-API arrays with
``__dlpack__``, on the CPU or a CUDA device.

Raises ValueError (naming argument, axis and numbers) for an invalid problem, NotImplementedError
(naming the nearest supported case) for one that the device's backend cannot run.
"""
_FORWARD_DOC = (
    """{rank}-D neighborhood attention: every query attends to its nearest kernel_size keys.

    q: [batch, {axes}, heads, head_dim].
    k, v: [batch, {axes}, heads_kv, head_dim]; heads % heads_kv == 0; v may have its own head_dim."""
    + _ARGUMENTS_DOC
    + """
Returns out [batch, {axes}, heads, head_dim of v], of q's kind on q's device (``out`` if given);
with return_lse also the log-sum-exp of the scores [batch, {axes}, heads], natural log, float32
(float64 for float64 inputs).
"""
)
_PACKED_DOC = (
    """As `na{rank}d` on one packed array, with no copy.

    qkv: [batch, {axes}, 3, heads, head_dim]."""
    + _ARGUMENTS_DOC
    + """
Returns what `na{rank}d` returns.
"""
)
_BACKWARD_DOC = (
    """Gradients of `na{rank}d`, deterministic.

    d_out: gradient of out, [batch, {axes}, heads, head_dim of v].
    q, k, v, out, lse: what went into and came out of `na{rank}d`.
    d_lse: gradient of lse, or None."""
    + _ARGUMENTS_DOC
    + """
Returns `natcore.Gradients`: dq, dk, dv, drpb, d_additional_keys, d_additional_values, each of its
input's shape and dtype; None for what was not given.
"""
)


def _documented(function: Any, name: str, doc: str, rank: int) -> Any:
    axes = ", ".join(("length",) if rank == 1 else ("depth", "height", "width")[-rank:])
    rpb_axes = ", ".join(["2 * kernel - 1"] * rank)
    function.__name__ = function.__qualname__ = name
    function.__doc__ = doc.format(rank=rank, axes=axes, rpb_axes=rpb_axes)
    return function


na1d, na2d, na3d = (_make_forward(rank) for rank in (1, 2, 3))
na1d_qkvpacked, na2d_qkvpacked, na3d_qkvpacked = (_make_packed(rank) for rank in (1, 2, 3))
na1d_backward, na2d_backward, na3d_backward = (_make_backward(rank) for rank in (1, 2, 3))
