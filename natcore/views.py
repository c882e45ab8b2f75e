"""A view of somebody's memory: all that the core ever sees of an array."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

ITEM_SIZES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


class Device(NamedTuple):
    """Where memory lives: ``Device("cpu", 0)`` or ``Device("cuda", ordinal)``."""

    type: str
    index: int = 0

    def __str__(self) -> str:
        return self.type if self.type == "cpu" else f"{self.type}:{self.index}"


class View(NamedTuple):
    """Address, shape, strides (in elements, never bytes), dtype name and device of one array.

    It does not own the memory. ``ptr`` is 0 where only the description is known (JAX tracing).
    """

    ptr: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    device: Device

    @property
    def size(self) -> int:
        return prod(self.shape)


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major strides, in elements, of a freshly allocated array."""
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * max(shape[axis + 1], 1)
    return tuple(strides)
