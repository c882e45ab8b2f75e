"""One axis of a problem, and arithmetic of geometries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import ceil
from typing import TypeVar

T = TypeVar("T")


def altered(geometry: T, **fields: int) -> T:
    """As dataclasses.replace, many times faster: nothing that its cached properties know may depend on the fields."""
    other = copy(geometry)
    other.__dict__.update(fields)
    return other


@dataclass(frozen=True)
class Axis:
    """One axis as the kernel sees it."""

    extent: int
    kernel: int
    stride: int
    dilation: int
    causal: bool

    def keys(self, p: int, length: int) -> tuple[int, int]:
        """The interval of keys of query p of a dilation group (see cuda_src/common/window.cuh)."""
        block = p // self.stride * self.stride
        if self.causal:
            return max(min(block + self.stride, length) - self.kernel, 0), p + 1
        center = min(block + self.stride // 2, length - 1)
        start = min(max(center - self.kernel // 2, 0), length - self.kernel)
        return start, start + self.kernel

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """The distinct lengths of dilation groups, the longest first."""
        return tuple(sorted({ceil((self.extent - g) / self.dilation) for g in range(self.dilation)}, reverse=True))

    def sample(self, length: int, tile: int) -> list[int]:
        """Tile numbers among which every pattern of windows occurs: both ends, and one period between."""
        count = ceil(length / tile)
        ends = 2 * ceil((self.kernel + self.stride) / tile) + self.stride + 2
        return [*range(min(count, ends)), *range(max(ends, count - ends), count)]


@lru_cache(maxsize=64)
def intervals(axis: Axis, length: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Of each query its keys, and of each key its queries."""
    keys = [axis.keys(p, length) for p in range(length)]
    queries, first, end = [], 0, 0
    for n in range(length):
        while keys[first][1] <= n:
            first += 1
        while end < length and keys[end][0] <= n:
            end += 1
        queries.append((first, end))
    return keys, queries


def up(value: int, multiple: int) -> int:
    return ceil(value / multiple) * multiple


def defines_of(
    axes: Sequence[Axis], rpb_dtype: str | None, values: Mapping[str, object]
) -> tuple[tuple[str, str], ...]:
    """A kernel's defines, sorted: the window on each axis, the bias's dtype if there is one, and what else there is."""
    every = dict(values)
    for a, axis in enumerate(axes):
        its = {"KERNEL": axis.kernel, "STRIDE": axis.stride, "CAUSAL": int(axis.causal), "DILATION": axis.dilation}
        every |= {f"{name}_{a}": value for name, value in its.items()}
    if rpb_dtype is not None:
        every["RPB"] = rpb_dtype
    return tuple(sorted((name, str(value)) for name, value in every.items()))
