"""Which keys a query sees: kernel size, stride, dilation and causality of every spatial axis, and their checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any


def per_axis(name: str, value: object, rank: int, kind: type) -> tuple:
    """One entry per spatial axis from a scalar or a sequence; ``kind`` is int or bool."""
    entries = [value] * rank if not isinstance(value, Sequence) else list(value)
    if len(entries) != rank:
        raise ValueError(
            f"{name} has {len(entries)} entries, {value!r}, but the problem has {rank} spatial "
            f"axes: give one {kind.__name__} or {rank}."
        )
    return tuple(_entry(name, axis, entry, kind) for axis, entry in enumerate(entries))


def _entry(name: str, axis: int, entry: object, kind: type) -> int | bool:
    is_bool = isinstance(entry, bool) or type(entry).__name__ in ("bool_", "bool")
    if is_bool is not (kind is bool) or not (is_bool or hasattr(entry, "__index__")):
        raise ValueError(f"{name} on axis {axis} must be {kind.__name__}, not {type(entry).__name__} ({entry!r}).")
    return bool(entry) if kind is bool else int(entry)  # type: ignore[call-overload]


@dataclass(frozen=True)
class Window:
    """Which keys a query sees, one entry per spatial axis (1 to 3 axes; axes are independent).

    Build it with `Window.of`, which accepts scalars and checks the values.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    is_causal: tuple[bool, ...]

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:  # a window is part of every key that a repeated call is looked up by
        return hash((self.kernel_size, self.stride, self.dilation, self.is_causal))

    @classmethod
    def of(
        cls,
        rank: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        is_causal: bool | Sequence[bool] = False,
    ) -> Window:
        """Raises ValueError for a wrong number of entries, entries < 1, or stride > kernel."""
        window = cls(
            per_axis("kernel_size", kernel_size, rank, int),
            per_axis("stride", stride, rank, int),
            per_axis("dilation", dilation, rank, int),
            per_axis("is_causal", is_causal, rank, bool),
        )
        for name in ("kernel_size", "stride", "dilation"):
            for axis, entry in enumerate(getattr(window, name)):
                if entry < 1:
                    raise ValueError(f"{name} on axis {axis} is {entry}; it must be at least 1.")
        for axis, (s, k) in enumerate(zip(window.stride, window.kernel_size, strict=True)):
            if s > k:
                raise ValueError(
                    f"stride {s} > kernel_size {k} on axis {axis}: keys between windows would be "
                    f"seen by nobody. Use a stride of at most {k}."
                )
        return window

    @property
    def rank(self) -> int:
        return len(self.kernel_size)

    @property
    def rpb_shape(self) -> tuple[int, ...]:
        """Shape of one head's relative positional bias table: 2k - 1 per axis."""
        return tuple(2 * k - 1 for k in self.kernel_size)

    def check_fits(self, spatial: tuple[int, ...]) -> None:
        """Raises ValueError where kernel_size * dilation exceeds the extent of an axis."""
        for axis, extent in enumerate(spatial):
            reach = self.kernel_size[axis] * self.dilation[axis]
            if reach > extent:
                raise ValueError(
                    f"kernel_size {self.kernel_size[axis]} * dilation {self.dilation[axis]} = "
                    f"{reach} > extent {extent} on axis {axis} of the map {spatial}. Use a smaller "
                    f"kernel or dilation, or pad the map to {reach}."
                )


def window_of(rank: int, kernel_size: Any, stride: Any = 1, dilation: Any = 1, is_causal: Any = False) -> Window:
    """`Window.of`, remembered where the arguments are hashable."""
    try:
        return _remembered(rank, kernel_size, stride, dilation, is_causal)
    except TypeError:
        return Window.of(rank, kernel_size, stride, dilation, is_causal)


_remembered = lru_cache(maxsize=1024, typed=True)(Window.of)
