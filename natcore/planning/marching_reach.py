"""What own tokens see, in whole rows and blocks of columns: the reach of the marching kernels' tiles.

Own tokens are queries and see keys or, in the backward of keys, the other way round. Pure integers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import ceil

from natcore.planning.axis import Axis
from natcore.planning.marching_tiles import Cut, Place, Ranges, blocks_of, numbers_of, seen_by


@lru_cache(maxsize=4096)
def rows_of(axis: Axis, band: int, shift: int, own_keys: bool) -> tuple[int, int]:
    """The most rows that a band of own tokens sees, and the most stages of the ring that hold them."""
    rows = stages = 0
    for length in axis.lengths:
        for number in axis.sample(length, band):
            start = seen_by(axis, number * band, length, own_keys)[0]
            end = seen_by(axis, min(number * band + band, length) - 1, length, own_keys)[1]
            rows = max(rows, end - start)
            stages = max(stages, (end - 1 + shift) // band - (start + shift) // band + 1)
    return rows, stages


@dataclass(frozen=True)
class Reach:
    """Blocks of columns around groups of own tokens, and what they need of shared memory and of the bias table."""

    left: int  # columns left of a group that its first block starts at, away from borders
    blocks: int  # of such a group
    kinds: tuple[Ranges, ...]  # which blocks the groups of each kind of tile take
    units: float  # pairs of a group and a block in a tile, on average
    pad: int  # columns of shared memory left of a strip of several
    columns: int  # of shared memory
    margin: int  # columns by which blocks leave these, at most, on either side
    least: int  # the least and the greatest difference of columns, seen - own, that a block holds
    greatest: int

    @property
    def edge_blocks(self) -> int:
        """The most of a tile near a border."""
        return max(blocks_of(ranges) for ranges in self.kinds[1:])


@lru_cache(maxsize=4096)
def reach_of_queries(axis: Axis, group: int, block: int, groups: int, tiles: int) -> Reach:
    left, blocks = columns_of(axis, group, block, groups, tiles)
    cut = Cut(axis, group, block, groups, tiles, False, left, blocks)
    columns, single = axis.lengths[0], groups == 1
    if cut.padded:
        last = cut.strip - group  # the last group's first column, from the strip's
        columns = (max(last, left) if single else last) + blocks * block
    inside = blocks * block  # tiles of one group keep their blocks inside the map
    firsts = {p: max(min(p.x - left, p.length - inside), 0) if single else p.x - left for p in cut.places()}
    kinds, margin = cut.kinds(firsts), 0
    if not cut.padded:
        for place, first in firsts.items():
            taken = [first + at * block for ends in kinds[cut.kind(place)][: place.groups] for at in ends]
            margin = max(margin, -min(taken), max(taken) - columns)
    least = 1 - group - (left if groups > 1 else blocks * block - 1)
    greatest = blocks * block - 1 - (left if groups > 1 else 0)
    return Reach(left, blocks, kinds, cut.units(kinds), left, columns, margin, least, greatest)


@lru_cache(maxsize=4096)
def reach_of_keys(axis: Axis, group: int, block: int, groups: int, tiles: int) -> Reach:
    """Away from borders the queries around a group of keys lie as the keys around a group of queries do, mirrored."""
    left = 0 if axis.causal else axis.kernel - 1 - axis.kernel // 2
    blocks = ceil((group + axis.kernel - 1) / block)
    cut = Cut(axis, group, block, groups, tiles, True, left, blocks)
    kind_of = {place: cut.kind(place) for place in cut.places()}
    edge = Counter()  # blocks of the kinds of tiles near borders
    for place, kind in kind_of.items():
        reach = cut.seen(place, place.groups - 1)[1] - cut.seen(place, 0)[0]
        edge[kind] = max(edge[kind], ceil(reach / block) if kind else 0)
    columns = max(axis.lengths[0], max(edge.values(), default=0) * block)
    pad, right = left, (tiles - 1) * cut.tile - left + blocks_of(cut.inner) * block
    firsts: dict[Place, int] = {}
    for place, kind in kind_of.items():
        firsts[place] = first = place.x - left if not kind else cut.seen(place, 0)[0]
        if kind and not cut.padded:
            firsts[place] = first = min(first, columns - edge[kind] * block)
        if kind:
            pad, right = max(pad, place.start - first), max(right, first + edge[kind] * block - place.start)
        if kind and axis.stride > 1:  # such a tile may stand anywhere in a strip
            pad = max(pad, place.x - first)
            right = max(right, (tiles - 1) * cut.tile + first - place.x + edge[kind] * block)
    kinds = cut.kinds(firsts)
    least, greatest = _differences(cut, kinds, firsts)
    columns = pad + right if cut.padded else columns
    return Reach(left, blocks, kinds, cut.units(kinds), pad, columns, 0, least, greatest)


def _differences(cut: Cut, kinds: tuple[Ranges, ...], firsts: dict[Place, int]) -> tuple[int, int]:
    """The least and the greatest difference of columns, seen - own, that a group and a block that it takes hold."""
    found = [
        (
            first + begin * cut.block - (place.x + (g + 1) * cut.group - 1),
            first + end * cut.block - 1 - (place.x + g * cut.group),
        )
        for place, first in firsts.items()
        for g, (begin, end) in enumerate(kinds[cut.kind(place)][: place.groups])
    ]
    return min(least for least, _ in found), max(greatest for _, greatest in found)


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
        for number in numbers_of(axis, length, tile, tiles):
            if length <= strip:
                first = min(number * tile, max(length - tile, 0))
            else:
                first = min(number // tiles * strip, length - strip) + number % tiles * tile
            for x in range(first, min(first + tile, length), group):
                last = min(x + group, length) - 1
                yield x, axis.keys(x, length)[0], axis.keys(last, length)[1], length
