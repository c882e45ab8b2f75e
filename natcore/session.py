"""One call through the public door: where it runs, its preparation (cached), its launch.

arrays  ->  Session.read: addresses, signatures  ->  _prepare (looked up by signatures)  ->  executable(...)

What `attend` finds like an earlier call by its library's own test is launched without being read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from natcore import backends
from natcore.arrays import Signature, described, kind_of, known, stream_handle
from natcore.planning import Config
from natcore.problem import (
    OPERANDS,
    RESULTS,
    Direction,
    call_of,
    check_operand,
    check_packed,
    check_result,
    problem_of,
)
from natcore.recent import find, recents, remember
from natcore.unfused import unfused_problem_of
from natcore.views import ITEM_SIZES, View, contiguous_strides
from natcore.window import Window, window_of

_ALIGNMENT = 256


class _Prepared(NamedTuple):
    executable: backends.Executable
    scale: float  # the default one
    step: int  # bytes from q to k and from k to v, where they are packed; else 0
    fresh: tuple[tuple[int, tuple[int, ...], str], ...]  # results to allocate: place, shape, dtype
    workspace: int  # how many float32 to allocate


@lru_cache(maxsize=4096)
def _prepare(
    direction: Direction,
    window: Window,
    dropout_p: float,
    config: Config | None,
    unwanted: str | None,
    *signatures: Signature | None,
) -> _Prepared:
    """Everything that needs no memory: checks, plan, kernels. ``signatures`` follow OPERANDS, and q is qkv
    where that makes them two fewer."""
    names, results = OPERANDS[direction], RESULTS[direction]
    views, step = _views(names, window.rank, signatures, results)
    if direction in ("forward", "backward"):
        problem = problem_of(window, views, dropout_p)
    else:
        problem = unfused_problem_of(direction, window, views)
    device = next(view.device for view in views.values() if view is not None)
    for name, view in views.items():
        if view is not None:
            check = check_result if name in results else check_operand
            check(problem, name, view, device)
    absent = [n for n in results if views[n] is None and problem.has(n) and n != unwanted]
    fresh = tuple((names.index(name), problem.shapes[name], problem.dtype_of(name)) for name in absent)
    for index, shape, dtype in fresh:
        views[names[index]] = View(0, shape, contiguous_strides(shape), dtype, device)
    executable = backends.prepare(call_of(direction, problem, views), device, config)
    size = executable.workspace_bytes
    words = -(-(size + _ALIGNMENT) // ITEM_SIZES["float32"]) if size else 0
    scale = problem.default_scale if direction in ("forward", "backward") else 1.0
    return _Prepared(executable, scale, step, fresh, words)


def _views(
    names: tuple[str, ...], rank: int, signatures: tuple[Signature | None, ...], results: tuple[str, ...]
) -> tuple[dict[str, View | None], int]:
    """The views of all operands, and the bytes between q, k and v where they are packed."""
    views: dict[str, View | None] = {}
    step = 0
    if len(signatures) < len(names):
        packed, *rest = signatures
        assert packed is not None  # Session.of admits no None there
        whole, _ = described("qkv", packed)
        check_packed(rank, whole.shape)
        shape, strides = ((*x[:-3], *x[-2:]) for x in (whole.shape, whole.strides))
        views = dict.fromkeys(names[:3], whole._replace(shape=shape, strides=strides))
        names, signatures = names[3:], tuple(rest)
        step = whole.strides[-3] * ITEM_SIZES.get(whole.dtype, 0)
    for name, signature in zip(names, signatures, strict=True):
        view, read_only = (None, False) if signature is None else described(name, signature)
        if read_only and name in results:
            raise ValueError(f"{name} is read-only memory (JAX arrays always are); pass a writable array or None.")
        views[name] = view
    return views, step


_recent = recents()


def attend(
    direction: Direction,
    names: tuple[str, ...],
    arrays: tuple[Any, ...],
    given: tuple[Any, ...],
    window_arguments: tuple[Any, ...],
    scale: float | None,
    config: Config | None,
    dropout: tuple[float, int | None],
    unwanted: str | None,
    stream: Any,
) -> list[Any]:
    """One call, forward or backward; returns the arrays that were allocated for absent results, as `Session.run`.

    ``arrays``: the operands called ``names``, all but the seed, which follows, and the results, of which ``given``
    holds those that are to be written to. ``window_arguments``: rank, kernel_size, stride, dilation, is_causal.
    """
    first = 0 if direction == "forward" else 1  # q, or qkv
    session = Session(names[first], arrays[first], stream)
    operands, recent = (*arrays, None, *given), None
    if session.kind.likeness is not None and stream is None and not dropout[0]:
        try:
            key = direction, unwanted, config, *window_arguments, arrays[first].shape
            recent = _recent(*key, *map(type, operands))
        except TypeError:  # lists
            pass
    prepared = None if recent is None else find(recent, operands)
    if prepared is not None:
        address = session.kind.address
        session.pointers = [0 if x is None else address(x) for x in operands]
        return session.launch(prepared, scale)
    session.read(names, arrays)
    session.seed(*dropout)
    session.read(RESULTS[direction], given)
    window = window_of(*window_arguments)
    prepared = _prepare(direction, window, dropout[0], config, unwanted, *session.signatures)
    if recent is not None:
        remember(recent, session.likeness(operands), prepared)
    return session.launch(prepared, scale)


class Session:
    """One call: where it happens, and what was read of its operands.

    The kind of array that the first operand is decides the device, the stream (None on the CPU) and what
    results are made of.
    """

    __slots__ = ("device", "elsewhere", "held", "kind", "like", "pointers", "signatures", "stream")

    def __init__(self, name: str, first: Any, stream: Any) -> None:
        self.kind = kind = kind_of(name, first)
        self.like = first
        self.device = device = kind.device(name, first)
        self.elsewhere: int | None = None  # the stream, where it may be another than the kind's current one
        if device.type == "cpu":
            if stream is not None:
                raise ValueError(f"stream {stream!r} was given, but {name} is on the CPU.")
            self.stream = None
        elif stream is None:
            self.stream = kind.current_stream(device)
        else:
            self.stream = self.elsewhere = stream_handle(stream)
        self.pointers: list[int] = []
        self.signatures: list[Signature | None] = []
        self.held: list[Any] = []  # alive as long as the call

    def read(self, names: Iterable[str], arrays: Iterable[Any]) -> None:
        """The next operands."""
        own, like, stream, given = self.kind, type(self.like), self.stream, self.elsewhere is not None
        pointers, signatures, held = self.pointers, self.signatures, self.held
        for name, array in zip(names, arrays, strict=True):
            if array is None:
                pointers.append(0)
                signatures.append(None)
                continue
            kind = own if type(array) is like else kind_of(name, array)
            pointer, signature, keep = kind.read(name, array, stream, given or kind is not own)
            pointers.append(pointer)
            signatures.append(signature)
            held.append(keep)

    def likeness(self, operands: Sequence[Any]) -> Callable[..., bool] | None:
        """Whether other operands are like these; None where only signatures can tell."""
        arrays, likeness = [x for x in operands if x is not None], self.kind.likeness
        return likeness(arrays) if likeness is not None and {*map(type, arrays)} == {type(self.like)} else None

    def skip(self, number: int) -> None:
        """The next operands are absent."""
        self.pointers += [0] * number
        self.signatures += [None] * number

    def seed(self, dropout_p: float, seed: int | None) -> None:
        """The next operand is the seed, in memory, where kernels read it; absent without dropout."""
        if not dropout_p:
            return self.skip(1)
        if seed is None or not hasattr(seed, "__index__") or not 0 <= int(seed) < 1 << 32:
            raise ValueError(f"dropout_p {dropout_p} needs a dropout_seed in [0, 2 ** 32), not {seed!r}.")
        if self.stream is None:
            array = np.array([seed], np.uint32)
            address = array.__array_interface__["data"][0]
        else:
            from natcore import device as gpu

            array, address = self._empty((1,), "float32")  # of four bytes
            gpu.fill(self.device.index, address, int(seed), self.stream)
        self.pointers.append(address)
        self.signatures.append((known, View(0, (1,), (1,), "uint32", self.device), True))
        self.held.append(array)

    def _empty(self, shape: tuple[int, ...], dtype: str) -> tuple[Any, int]:
        """New memory and its address."""
        array = self.kind.empty(shape, dtype, self.like, self.device, self.elsewhere)
        return array, self.kind.address(array)

    def run(
        self,
        direction: Direction,
        window: Window,
        scale: float | None,
        config: Config | None,
        dropout_p: float = 0.0,
        unwanted: str | None = None,
    ) -> list[Any]:
        """Prepares and runs one call on what was read, all operands in OPERANDS order (or qkv in place of q, k
        and v); returns the arrays that were allocated for absent results, at the places of their operands,
        None elsewhere."""
        return self.launch(_prepare(direction, window, dropout_p, config, unwanted, *self.signatures), scale)

    def launch(self, prepared: _Prepared, scale: float | None) -> list[Any]:
        """The last part of `run`."""
        executable, default_scale, step, fresh, words = prepared
        pointers = self.pointers
        if step:
            start = pointers[0]
            pointers[:1] = start, start + step, start + 2 * step
        results: list[Any] = [None] * len(pointers)
        for index, shape, dtype in fresh:
            results[index], pointers[index] = self._empty(shape, dtype)
        workspace = 0
        if words:
            scratch, address = self._empty((words,), "float32")
            self.held.append(scratch)  # until the launch; then the stream's order protects it
            workspace = -(-address // _ALIGNMENT) * _ALIGNMENT
        executable(pointers, default_scale if scale is None else float(scale), self.stream or 0, workspace)
        self.kind.finish(self.device, self.stream)
        return results
