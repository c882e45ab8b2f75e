"""Tiles: sixteen queries that share a box of keys. Pure NumPy, done once per problem.

A tile of 4 x 4 queries (q) with a 3 x 3 window, and the box of keys (.) that one of them sees:

    . . . . . .
    . q q q q .     Sixteen lanes, one per query; all walk through the 36 keys of the box together,
    . q q q q .     and a lane's score is -infinity at a key outside its own window. Windows of
    . q q q q .     every kind (clamped at edges, strided, causal) differ only in the ranges
    . q q q q .     [start, end) per lane and axis. With dilation, a tile lies in one dilation
    . . . . . .     group per axis, and neighbours are ``dilation`` apart.

Axes are independent, so the tiles of a map are the product of the tiles of its axes. With GQA the
lanes may also run over heads that share their keys. The shape of the tile (heads, t, y, x; a
product of 16) is the one that has the fewest scores to compute, counted exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, prod

import numpy as np

from natcore.problem import Window

LANES = 16
#: Columns of an axis tile: coordinate of its first key, number of keys, then one per lane each:
#: the query's coordinate; the window [start, end) and what makes a table entry of a key, all
#: counted from the first key; whether the lane has a query of its own.
FIRST, COUNT = np.int64(0), np.int64(1)
POSITION, START, END, ENTRY, VALID = (np.int64(2 + LANES * i) for i in range(5))
AXIS_COLUMNS = np.int64(2 + LANES * 5)
#: A tile's fixed work (loading queries, softmax bookkeeping), in keys.
_TILE_OVERHEAD = 24


@dataclass(frozen=True, eq=False)
class Geometry:
    """The tiles of one (batch entry, kv head), and how to share them out."""

    axis_tiles: np.ndarray  # int64 [tiles of t, then y, then x; AXIS_COLUMNS]
    tiles: np.ndarray  # int32 [tiles, 4]: rows of axis_tiles for t, y, x, and the class
    lane_heads: np.ndarray  # int64 [16]: each lane's head within a block of heads
    heads_per_tile: int
    classes: int  # tiles of one class have the same mask and the same bias
    box_keys: int  # keys of the largest box
    dilation: tuple[int, int, int]

    def slabs(self, target: int, disjoint: bool) -> list[np.ndarray]:
        """The tiles in up to ``target`` parts, each ordered by class; cut along one axis.

        With ``disjoint`` the keys of parts i and j only meet if i and j differ by at most one, so
        that all even parts may write to their keys at the same time, and then all odd ones.
        """
        best: list[np.ndarray] = []
        for axis in range(3):
            rows = np.unique(self.tiles[:, axis])
            parts = list(self._cuts(axis, rows, target, disjoint))
            if len(parts) > len(best):
                best = parts
        column, cuts = best[0][0], [part[1:] for part in best]
        groups = [self.tiles[(self.tiles[:, column] >= low) & (self.tiles[:, column] <= high)] for low, high in cuts]
        return [part[np.argsort(part[:, 3], kind="stable")] for part in groups]

    def _cuts(self, axis: int, rows: np.ndarray, target: int, disjoint: bool) -> Iterator[np.ndarray]:
        """(axis, first row, last row) of each part, for the thinnest parts allowed."""
        dilation = self.dilation[axis]
        first, count = self.axis_tiles[rows, FIRST], self.axis_tiles[rows, COUNT]
        extent = int(first.max() + count.max() * dilation) + 1
        low = (first % dilation) * extent + first // dilation  # dilation groups one after the other
        high = low + count
        size = ceil(len(rows) / max(1, min(target, len(rows))))
        while disjoint:
            starts = np.arange(0, len(rows), size)
            ends = np.minimum(starts + size, len(rows)) - 1
            if len(starts) < 3 or (high[ends[:-2]] <= low[starts[2:]]).all():
                break
            size += 1
        for start in range(0, len(rows), size):
            yield np.array([axis, rows[start], rows[min(start + size, len(rows)) - 1]])


def _windows(extent: int, axis: tuple[int, int, int, bool], group: np.ndarray, place: np.ndarray):
    """[start, end) of each query (dilation group and place in it): reference.neighborhood, for arrays."""
    kernel, stride, dilation, causal = axis
    length = (extent - group + dilation - 1) // dilation
    if causal:
        leader = np.minimum(place // stride * stride + stride - 1, length - 1)
        return np.maximum(leader - kernel + 1, 0), np.minimum(place + 1, length)
    center = np.minimum(place // stride * stride + stride // 2, length - 1)
    start = np.minimum(np.maximum(center - kernel // 2, 0), length - kernel)
    return start, start + kernel


def _axis_tiles(extent: int, axis: tuple[int, int, int, bool], width: int):
    """The tiles of ``width`` queries on one axis: group [n], places, starts, ends, valid [n, width]."""
    dilation = axis[2]
    lengths = (extent - np.arange(dilation) + dilation - 1) // dilation
    per_group = -(-lengths // width)
    group = np.repeat(np.arange(dilation), per_group)
    number = np.arange(len(group)) - np.repeat(np.cumsum(per_group) - per_group, per_group)
    places = number[:, None] * width + np.arange(width)
    valid = places < lengths[group][:, None]
    places = np.minimum(places, lengths[group][:, None] - 1)
    starts, ends = _windows(extent, axis, group[:, None], places)
    return group, places, starts, ends, valid


def _box_sum(extent: int, axis: tuple[int, int, int, bool], width: int) -> tuple[int, int]:
    """Keys over all tiles of an axis, and the number of tiles."""
    _, _, starts, ends, _ = _axis_tiles(extent, axis, width)
    return int((ends.max(axis=1) - starts.min(axis=1)).sum()), len(starts)


def _tile_shape(spatial: tuple[int, ...], axes: list[tuple[int, int, int, bool]], group: int, extra: int):
    """(heads, t, y, x), a product of 16, with the fewest scores."""
    sizes = (1, 2, 4, 8, 16)
    sums = [{n: _box_sum(extent, axis, n) for n in sizes} for extent, axis in zip(spatial, axes, strict=True)]

    def cost(shape: tuple[int, ...]) -> float:
        keys, tiles = (prod(sums[a][n][i] for a, n in enumerate(shape[1:])) for i in (0, 1))
        return ceil(group / shape[0]) * (keys + tiles * (extra + _TILE_OVERHEAD))

    shapes = [
        (heads, t, y, LANES // (heads * t * y))
        for heads in sizes
        for t in sizes
        for y in sizes
        if heads * t * y <= LANES and heads < 2 * group
    ]
    return min(shapes, key=lambda shape: (cost(shape), shape))


@lru_cache(maxsize=256)
def geometry(window: Window, spatial: tuple[int, ...], group: int, extra: int) -> Geometry:
    """The tiles of a map for heads in groups of ``group`` that share keys; axes are led by ones to three."""
    ones = 3 - window.rank
    spatial = (1,) * ones + spatial
    axes = [(1, 1, 1, False)] * ones + list(
        zip(window.kernel_size, window.stride, window.dilation, window.is_causal, strict=True)
    )
    shape = _tile_shape(spatial, axes, group, extra)
    lanes = np.stack(np.unravel_index(np.arange(LANES), shape))  # [4, 16]: head, t, y, x of each lane
    tables, labels, begins, begin = [], [], [], 0
    for a, (extent, axis) in enumerate(zip(spatial, axes, strict=True)):
        table, label = _axis_table(extent, axis, shape[1 + a], lanes[1 + a])
        begins.append(begin + np.arange(len(table)))
        begin += len(table)
        tables.append(table)
        labels.append(label)
    rows = np.stack(np.meshgrid(*begins, indexing="ij"), axis=-1).reshape(-1, 3)
    label = labels[0][:, None, None]
    for following in (labels[1][None, :, None], labels[2][None, None, :]):
        label = label * (int(following.max()) + 1) + following
    classes, label = np.unique(label, return_inverse=True)
    return Geometry(
        axis_tiles=np.concatenate(tables),
        tiles=np.concatenate([rows, label.reshape(-1, 1)], axis=1).astype(np.int32),
        lane_heads=lanes[0],
        heads_per_tile=shape[0],
        classes=len(classes),
        box_keys=prod(int(table[:, COUNT].max()) for table in tables),
        dilation=tuple(axis[2] for axis in axes),  # type: ignore[arg-type]
    )


def _axis_table(extent: int, axis: tuple[int, int, int, bool], width: int, lanes: np.ndarray):
    """The rows of Geometry.axis_tiles of one axis, and the class of each."""
    group, places, starts, ends, valid = _axis_tiles(extent, axis, width)
    kernel, _, dilation, _ = axis
    low = starts.min(axis=1)
    table = np.empty((len(group), AXIS_COLUMNS), np.int64)
    table[:, FIRST] = group + low * dilation
    table[:, COUNT] = ends.max(axis=1) - low
    for column, values in (
        (POSITION, group[:, None] + places * dilation),
        (START, starts - low[:, None]),
        (END, ends - low[:, None]),
        (ENTRY, low[:, None] - places + kernel - 1),
        (VALID, valid),
    ):
        table[:, column : column + LANES] = values[:, lanes]
    _, label = np.unique(
        np.delete(table, np.r_[FIRST, POSITION:START, VALID:AXIS_COLUMNS], axis=1), axis=0, return_inverse=True
    )
    return table, label.reshape(-1)
