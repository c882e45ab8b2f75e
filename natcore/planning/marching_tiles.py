"""Tiles of the marching kernels on the axis of columns, and which of its blocks each group of a tile takes.

As struct Tile of cuda_src/common/strip_tile.cuh finds them. Pure integers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import ceil

from natcore.planning.axis import Axis, intervals

INNER, AT_START, AT_END, NARROW = KINDS = range(4)  # of tiles, see cuda_src/common/strips.cuh
Ranges = tuple[tuple[int, int], ...]  # the blocks [first, end) of a tile that each group takes; (0, 0) for no group


def blocks_of(ranges: Ranges) -> int:
    return max(end for _, end in ranges)


def units_of(ranges: Ranges) -> int:
    """Pairs of a group and a block."""
    return sum(end - first for first, end in ranges)


def seen_by(axis: Axis, x: int, length: int, own_keys: bool) -> tuple[int, int]:
    return intervals(axis, length)[1][x] if own_keys else axis.keys(x, length)


def numbers_of(axis: Axis, length: int, tile: int, tiles: int) -> list[int]:
    """Tile numbers among which every pattern of windows occurs: `Axis.sample`'s and, because the last strip is moved
    back inside the map, all of the last two strips."""
    count = ceil(length / (tiles * tile)) * tiles
    return sorted({*axis.sample(count * tile, tile), *range(max(count - 2 * tiles, 0), count)})


@dataclass(frozen=True)
class Place:
    """Where a tile lies."""

    length: int  # columns of its dilation group
    start: int  # of its strip
    x: int  # its first column
    groups: int  # how many it has: all or, of a NARROW one, one


@dataclass(frozen=True)
class Cut:
    """An axis of columns in groups, tiles and strips, and what groups see in blocks."""

    axis: Axis
    group: int  # columns
    block: int  # columns
    groups: int  # of a tile
    tiles: int  # of a strip
    own_keys: bool
    left: int  # columns left of a group that its first block starts at, away from borders
    blocks: int  # of such a group

    @property
    def tile(self) -> int:
        return self.group * self.groups

    @property
    def strip(self) -> int:
        return self.tile * self.tiles

    @property
    def padded(self) -> bool:
        return self.axis.lengths[0] > self.strip

    @property
    def inner(self) -> Ranges:
        """Of a tile away from borders."""
        step = self.group // self.block
        return tuple((g * step, g * step + self.blocks) for g in range(self.groups))

    def places(self) -> Iterator[Place]:
        """Those of tiles that exist, among which every pattern of windows occurs."""
        for length in self.axis.lengths:
            for number in numbers_of(self.axis, length, self.tile, self.tiles):
                strip, its = divmod(number, self.tiles)
                start = min(strip * self.strip, max(length - self.strip, 0))
                x = start + min(its * self.tile, max(min(self.strip, length) - self.tile, 0))
                owned = strip * self.strip if self.padded else number * self.tile
                if owned < length and x + self.tile > owned:
                    others = max(owned - x, 0) // self.group  # groups of another tile
                    narrow = self.groups > 1 and others == self.groups - 1
                    yield Place(length, start, x + narrow * others * self.group, 1 if narrow else self.groups)

    def kind(self, place: Place) -> int:
        axis, x, end = self.axis, place.x, place.x + self.tile
        if place.groups < self.groups:
            return NARROW
        if self.own_keys:
            margin, first = 0 if axis.causal else axis.kernel, x - self.left
            clamped = x < margin or end > place.length - margin
            clamped |= first < 0 or first + blocks_of(self.inner) * self.block > place.length
        else:
            before = axis.kernel - 1 if axis.causal else axis.kernel // 2
            clamped = x < before or end - 1 - before + axis.kernel > place.length
        if axis.stride > 1:
            return AT_START
        return INNER if not clamped else AT_START if x + end <= place.length else AT_END

    def seen(self, place: Place, g: int) -> tuple[int, int]:
        """The columns that a group sees."""
        x, last = place.x + g * self.group, place.length - 1
        own = min(x, last), min(x + self.group - 1, last)
        start, end = (seen_by(self.axis, at, place.length, self.own_keys) for at in own)
        return start[0], end[1]

    def kinds(self, firsts: Mapping[Place, int]) -> tuple[Ranges, ...]:
        """The ranges of tiles of each kind: the fewest blocks that hold all that each group sees. ``firsts``: the
        first columns of tiles' first blocks. Of a kind that does not occur, all are empty."""
        found: list[Ranges] = [((0, 0),) * self.groups for _ in KINDS]
        for place, first in firsts.items():
            kind = self.kind(place)
            seen = [[at - first for at in self.seen(place, g)] for g in range(place.groups)]
            its = [(start // self.block, ceil(end / self.block)) for start, end in seen]
            its += [(0, 0)] * (self.groups - place.groups)
            found[kind] = self.inner if kind == INNER else _union(found[kind], tuple(its))
        return tuple(found)

    def units(self, kinds: tuple[Ranges, ...]) -> float:
        """Pairs of a group and a block in a tile, on average over those of all strips."""
        length = self.axis.lengths[0]
        total = ceil(length / self.strip) * self.tiles
        known = len(numbers_of(self.axis, length, self.tile, self.tiles))
        found = [units_of(kinds[self.kind(place)]) for place in self.places() if place.length == length]
        rest = kinds[AT_START] if self.axis.stride > 1 else self.inner
        return (sum(found) + (total - known) * units_of(rest)) / total


def _union(one: Ranges, other: Ranges) -> Ranges:
    if not units_of(one):
        return other
    return tuple((min(a[0], b[0]), max(a[1], b[1])) for a, b in zip(one, other, strict=True))
