"""What is asked: the sizes, the operands, and every check of them (those of a window are `natcore.window`'s).

Nothing in this file touches memory, a framework or a GPU. All classes are frozen and hashable, so
that plans, kernels and packed launches can be cached on them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from math import prod
from typing import Any, Literal, NamedTuple

from natcore.views import ITEM_SIZES, Device, View
from natcore.window import Window

DTYPES = tuple(ITEM_SIZES)

Direction = Literal["forward", "backward", "qk", "qk_backward", "av", "av_backward"]


class Gradients(NamedTuple):
    """What a backward returns; None for what the forward was not given."""

    dq: Any
    dk: Any
    dv: Any
    drpb: Any
    d_additional_keys: Any
    d_additional_values: Any


#: The operands of a call, in the order in which pointers and strides are handed to a backend.
OPERANDS: dict[str, tuple[str, ...]] = {
    "forward": ("q", "k", "v", "rpb", "additional_keys", "additional_values", "dropout_seed", "out", "lse"),
    "backward": (
        *("d_out", "q", "k", "v", "out", "lse", "d_lse"),
        *("rpb", "additional_keys", "additional_values", "dropout_seed"),
        *Gradients._fields,
    ),
    # Unfused (natcore.unfused): scores of windows, and sums weighted by them.
    "qk": ("q", "k", "rpb", "additional_keys", "scores"),
    "qk_backward": ("d_scores", "q", "k", "rpb", "additional_keys", "dq", "dk", "drpb", "d_additional_keys"),
    "av": ("weights", "v", "additional_values", "out"),
    "av_backward": ("d_out", "weights", "v", "additional_values", "d_weights", "dv", "d_additional_values"),
}
#: The operands that a call writes; all others are read only.
RESULTS: dict[str, tuple[str, ...]] = {
    "forward": ("out", "lse"),
    "backward": Gradients._fields,
    "qk": ("scores",),
    "qk_backward": ("dq", "dk", "drpb", "d_additional_keys"),
    "av": ("out",),
    "av_backward": ("d_weights", "dv", "d_additional_values"),
}
#: The gradient of each differentiable operand (those of out and lse come in, the others go out).
GRADIENTS = {
    **{name: "d" + name for name in ("q", "k", "v", "rpb")},
    **{name: "d_" + name for name in ("out", "lse", "additional_keys", "additional_values", "scores", "weights")},
}


@dataclass(frozen=True)
class Problem:
    """One neighbourhood attention, without its memory: window, sizes and dtypes."""

    window: Window
    batch: int
    spatial: tuple[int, ...]
    heads: int
    heads_kv: int
    head_dim: int
    head_dim_v: int
    extra: int  # additional keys / values per batch entry and kv head; 0 = none
    dtype: str
    rpb_dtype: str | None  # None = no bias
    dropout_p: float = 0.0  # probability with which an attention weight becomes 0

    @property
    def lse_dtype(self) -> str:
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def default_scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def places(self) -> int:
        """What a query can see: the keys of a window, row-major, and then the additional ones."""
        return prod(self.window.kernel_size) + self.extra

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every operand of either direction, by name."""
        lead = (self.batch, *self.spatial)
        k, v = (self.heads_kv, self.head_dim), (self.heads_kv, self.head_dim_v)
        shapes = {
            "q": (*lead, self.heads, self.head_dim),
            "k": (*lead, *k),
            "v": (*lead, *v),
            "out": (*lead, self.heads, self.head_dim_v),
            "lse": (*lead, self.heads),
            "rpb": (self.heads, *self.window.rpb_shape),
            "additional_keys": (self.batch, self.extra, *k),
            "additional_values": (self.batch, self.extra, *v),
            "scores": (*lead, self.heads, self.places),
            "weights": (*lead, self.heads, self.places),
        }
        return shapes | {gradient: shapes[name] for name, gradient in GRADIENTS.items()} | {"dropout_seed": (1,)}

    def dtype_of(self, operand: str) -> str:
        """The dtype that an operand must have."""
        if operand in ("lse", "d_lse"):
            return self.lse_dtype
        if operand in ("rpb", "drpb"):
            return self.rpb_dtype or "float32"
        return "uint32" if operand == "dropout_seed" else self.dtype

    def has(self, operand: str) -> bool:
        """Whether this problem has the operand at all (rpb, additional tensors and dropout are optional)."""
        if operand in ("rpb", "drpb"):
            return self.rpb_dtype is not None
        if operand == "dropout_seed":
            return self.dropout_p > 0
        return self.extra > 0 if "additional" in operand else True


@dataclass(frozen=True)
class Call:
    """A problem with its memory layout: all that fixes a launch but pointers, scale and stream.

    ``strides`` follows ``OPERANDS[direction]``, in elements; None marks an operand that is absent
    (an output that nobody asked for, or an optional input).
    """

    direction: Direction
    problem: Problem
    strides: tuple[tuple[int, ...] | None, ...]

    @property
    def operands(self) -> tuple[str, ...]:
        return OPERANDS[self.direction]

    def to_json(self) -> str:
        """A text from which `from_json` rebuilds the call in another process."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Call:
        fields = _tuples(json.loads(text))
        problem = fields["problem"]
        problem["window"] = Window(**problem["window"])
        return cls(fields["direction"], Problem(**problem), fields["strides"])


def _tuples(value: Any) -> Any:
    """JSON's lists back to tuples, all the way down."""
    if isinstance(value, dict):
        return {key: _tuples(entry) for key, entry in value.items()}
    return tuple(_tuples(entry) for entry in value) if isinstance(value, list) else value


def problem_of(window: Window, views: Mapping[str, View | None], dropout_p: float = 0.0) -> Problem:
    """The problem posed by q, k, v and the optional rpb, additional_keys, additional_values, dropout_seed.

    Raises ValueError, naming argument, axis and numbers, for anything that is not a valid problem.
    """
    q, k, v = (required(views, name) for name in ("q", "k", "v"))
    rpb, keys, values, seed = (views.get(n) for n in _OPTIONAL)
    _check_axes(window.rank, q, k, v)
    if (keys is None) is not (values is None):
        raise ValueError("additional_keys and additional_values go together: give both or neither.")
    problem = Problem(
        window,
        batch=q.shape[0],
        spatial=q.shape[1:-2],
        heads=q.shape[-2],
        heads_kv=k.shape[-2],
        head_dim=q.shape[-1],
        head_dim_v=v.shape[-1],
        extra=0 if keys is None else keys.shape[1] if len(keys.shape) == 4 else -1,
        dtype=q.dtype,
        rpb_dtype=None if rpb is None else rpb.dtype,
        dropout_p=dropout_p,
    )
    check_sizes(problem)
    if keys is not None and problem.extra < 1:
        raise ValueError(f"additional_keys has shape {keys.shape}; it takes [batch, extra >= 1, heads_kv, head_dim].")
    check_bias(problem, rpb)
    check_dropout(problem, seed)
    for name, view in zip(("q", "k", "v", *_OPTIONAL), (q, k, v, rpb, keys, values, seed), strict=True):
        if view is not None:
            check_operand(problem, name, view, q.device)
    return problem


def _check_axes(rank: int, q: View, k: View, v: View) -> None:
    if len(q.shape) != rank + 3:
        raise ValueError(
            f"q has {len(q.shape)} axes, {q.shape}; na{rank}d takes {rank + 3}: "
            f"[batch, {', '.join(f'axis{a}' for a in range(rank))}, heads, head_dim]."
        )
    if q.dtype not in DTYPES:
        raise ValueError(f"q has dtype {q.dtype}; supported are {', '.join(DTYPES)}.")
    if len(k.shape) != rank + 3 or len(v.shape) != rank + 3:
        raise ValueError(f"k {k.shape} and v {v.shape} must have {rank + 3} axes, like q {q.shape}.")


_OPTIONAL = ("rpb", "additional_keys", "additional_values", "dropout_seed")


def required(views: Mapping[str, View | None], name: str) -> View:
    view = views.get(name)
    if view is None:
        raise ValueError(f"{name} is None; it is required.")
    return view


def check_sizes(problem: Problem) -> None:
    if problem.batch < 0:
        raise ValueError(f"batch is {problem.batch}; it must not be negative.")
    for axis, extent in enumerate(problem.spatial):
        if extent < 1:
            raise ValueError(f"extent {extent} on axis {axis} of the map {problem.spatial}; it must be at least 1.")
    for name in ("heads", "heads_kv", "head_dim", "head_dim_v"):
        if getattr(problem, name) < 1:
            raise ValueError(f"{name} is {getattr(problem, name)}; it must be at least 1.")
    if problem.heads % problem.heads_kv:
        raise ValueError(
            f"q has {problem.heads} heads and k has {problem.heads_kv}: heads must be a multiple of heads_kv."
        )
    problem.window.check_fits(problem.spatial)


def check_bias(problem: Problem, rpb: View | None) -> None:
    if rpb is not None and rpb.dtype not in ("float32", problem.dtype):
        raise ValueError(f"rpb has dtype {rpb.dtype}; it must be float32 or q's {problem.dtype}.")


def dropout_threshold(p: float) -> int:
    """A weight is kept where its random 32-bit word is at least this (see natcore.reference_dropout)."""
    return min(round(p * (1 << 32)), (1 << 32) - 1)


def check_dropout(problem: Problem, seed: View | None) -> None:
    if not 0 <= problem.dropout_p < 1:
        raise ValueError(f"dropout_p is {problem.dropout_p}; it must be in [0, 1).")
    if (seed is not None) is not (problem.dropout_p > 0):
        raise ValueError(
            f"dropout_p {problem.dropout_p} goes {'without' if seed is not None else 'with'} dropout_seed."
        )


def check_operand(problem: Problem, name: str, view: View, device: Device) -> None:
    """One operand against its problem: shape, dtype, device, a contiguous last axis."""
    shape, dtype = problem.shapes[name], problem.dtype_of(name)
    if view.shape != shape:
        axis = next((a for a, (x, y) in enumerate(zip(view.shape, shape, strict=False)) if x != y), len(shape))
        raise ValueError(f"{name} has shape {view.shape}, expected {shape} (they differ on axis {axis}).")
    if view.dtype != dtype:
        raise ValueError(f"{name} has dtype {view.dtype}, expected {dtype}. Convert it first.")
    if view.device != device:
        raise ValueError(f"{name} is on {view.device}, but q is on {device}. Move it first.")
    if view.strides[-1] != 1 and view.shape[-1] > 1 and view.size > 0:
        raise ValueError(
            f"{name} has stride {view.strides[-1]} on its last axis (strides {view.strides}); the last axis "
            f"must be contiguous. Other axes may be strided. Make a contiguous copy of {name}."
        )


def check_result(problem: Problem, name: str, view: View, device: Device) -> None:
    """As `check_operand`, for memory that is written: no two elements may share an address."""
    check_operand(problem, name, view, device)
    for axis, (extent, stride) in enumerate(zip(view.shape, view.strides, strict=True)):
        if extent > 1 and stride == 0 and view.size > 0:
            raise ValueError(f"{name} has stride 0 on axis {axis}: it is a broadcast view, which cannot be written.")


def check_packed(rank: int, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless ``shape`` is that of a packed qkv."""
    if len(shape) != rank + 4 or shape[-3] != 3:
        raise ValueError(
            f"qkv has shape {tuple(shape)}; na{rank}d_qkvpacked takes {rank + 4} axes, "
            f"[batch, {', '.join(f'axis{a}' for a in range(rank))}, 3, heads, head_dim]."
        )


def call_of(direction: Direction, problem: Problem, views: Mapping[str, View | None]) -> Call:
    """The call on these views. The strides of axes of size 1 are normalised, so that plans are shared."""
    strides = tuple(
        None
        if (view := views.get(name)) is None
        else tuple(s if n > 1 else 1 for s, n in zip(view.strides, view.shape, strict=True))
        for name in OPERANDS[direction]
    )
    return Call(direction, problem, strides)
