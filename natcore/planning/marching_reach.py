"""What own tokens see, in whole rows and blocks of columns: the reach of the marching kernels' tiles.

Own tokens are queries and see keys or, in the backward of keys, the other way round. Pure integers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import ceil

from natcore.planning.axis import Axis, intervals


@lru_cache(maxsize=4096)
def rows_of(axis: Axis, band: int, shift: int, own_keys: bool) -> tuple[int, int]:
    """The most rows that a band of own tokens sees, and the most stages of the ring that hold them."""
    rows = stages = 0
    for length in axis.lengths:
        for number in axis.sample(length, band):
            start = _seen(axis, number * band, length, own_keys)[0]
            end = _seen(axis, min(number * band + band, length) - 1, length, own_keys)[1]
            rows = max(rows, end - start)
            stages = max(stages, (end - 1 + shift) // band - (start + shift) // band + 1)
    return rows, stages


def _seen(axis: Axis, x: int, length: int, own_keys: bool) -> tuple[int, int]:
    return intervals(axis, length)[1][x] if own_keys else axis.keys(x, length)


@dataclass(frozen=True)
class Reach:
    """Blocks of columns around groups of own tokens, and what they need of shared memory and of the bias table."""

    left: int  # columns left of a group that its first block starts at
    blocks: int  # of a group
    edge_blocks: int  # of a tile of keys near a border, for all of its groups
    pad: int  # columns of shared memory left of a strip of several
    columns: int  # of shared memory
    least: int  # the least and the greatest difference of columns, seen - own, that a block holds
    greatest: int


def _tiles(axis: Axis, length: int, tile: int, tiles: int) -> list[int]:
    """Tile numbers among which every pattern of windows occurs: `Axis.sample`'s and, because the last strip is moved
    back inside the map, all of the last two strips."""
    count = ceil(length / (tiles * tile)) * tiles
    return sorted({*axis.sample(count * tile, tile), *range(max(count - 2 * tiles, 0), count)})


@lru_cache(maxsize=4096)
def reach_of_queries(axis: Axis, group: int, block: int, groups: int, tiles: int) -> Reach:
    left, blocks = columns_of(axis, group, block, groups, tiles)
    strip, width = group * groups * tiles, axis.lengths[0]
    columns = width
    if width > strip:
        last = strip - group  # the last group's first column, from the strip's
        columns = (max(last, left) if groups == 1 else last) + blocks * block
    least = 1 - group - (left if groups > 1 else blocks * block - 1)
    return Reach(left, blocks, 0, left, columns, least, blocks * block - 1 - (left if groups > 1 else 0))


@lru_cache(maxsize=4096)
def reach_of_keys(axis: Axis, group: int, block: int, groups: int, tiles: int) -> Reach:
    """Away from borders the queries around a group of keys lie as the keys around a group of queries do, mirrored."""
    left = 0 if axis.causal else axis.kernel - 1 - axis.kernel // 2
    blocks = ceil((group + axis.kernel - 1) / block)
    tile, strip, width = group * groups, group * groups * tiles, axis.lengths[0]
    regular = ((groups - 1) * group // block + blocks) * block
    margin = 0 if axis.causal else axis.kernel
    found = []  # of clamped tiles: first column, the strip's, and the columns that see its keys
    pad, right = left, (tiles - 1) * tile - left + regular
    for length in axis.lengths:
        seen = intervals(axis, length)[1]
        for number in _tiles(axis, length, tile, tiles):
            start = min(number // tiles * strip, max(length - strip, 0))
            x = start + min(number % tiles * tile, max(min(strip, length) - tile, 0))
            first = x - left
            if axis.stride > 1 or x < max(margin, left) or x + tile > length - margin or first + regular > length:
                found.append((x, start, seen[x][0], seen[min(x + tile, length) - 1][1]))
    edge = max((ceil((end - first) / block) for _, _, first, end in found), default=0)
    least, greatest = 1 - group - left, blocks * block - 1 - left
    padded, columns = width > strip, max(width, edge * block)
    for x, start, first, _ in found:
        first = first if padded else min(first, columns - edge * block)
        pad, right = max(pad, start - first), max(right, first + edge * block - start)
        if axis.stride > 1:  # such a tile may stand anywhere in a strip
            pad, right = max(pad, x - first), max(right, (tiles - 1) * tile + first - x + edge * block)
        least, greatest = min(least, first - x - tile + 1), max(greatest, first + edge * block - 1 - x)
    return Reach(left, blocks, edge, pad, pad + right if padded else columns, least, greatest)


@lru_cache(maxsize=4096)
def columns_of(axis: Axis, group: int, block: int, groups: int, tiles: int) -> tuple[int, int]:
    """How many columns left of a group of so many its first block starts, and its blocks: the fewest.

    The blocks of a tile of one group stay inside the map.
    """
    found = list(_groups(axis, group, groups, tiles))
    blocks = 1
    while True:
        for left in sorted({x - start for x, start, _, _ in found}):
            for x, start, end, length in found:
                first = x - left
                if groups == 1:
                    first = max(min(first, length - blocks * block), 0)
                if start < first or first + blocks * block < end:
                    break
            else:
                return left, blocks
        blocks += 1


def _groups(axis: Axis, group: int, groups: int, tiles: int) -> Iterator[tuple[int, int, int, int]]:
    """First columns of groups, the columns that they see and the map's, among which every pattern occurs."""
    tile = group * groups
    strip = tile * tiles
    for length in axis.lengths:
        for number in _tiles(axis, length, tile, tiles):
            if length <= strip:
                first = min(number * tile, max(length - tile, 0))
            else:
                first = min(number // tiles * strip, length - strip) + number % tiles * tile
            for x in range(first, min(first + tile, length), group):
                last = min(x + group, length) - 1
                yield x, axis.keys(x, length)[0], axis.keys(last, length)[1], length
