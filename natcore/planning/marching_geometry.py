"""How the marching forward (cuda_src/kernels/marching_forward.cu) cuts a map; see cuda_src/common/strips.cuh.

A `Geometry` says how: groups of 8 queries in bands of rows, tiles of groups, strips of tiles down which a block
marches with some heads, and the rings of rows in its shared memory. Pure integers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import ceil

from natcore.planning.plan import DeviceFacts
from natcore.planning.tiling import Axis
from natcore.problem import Problem

MASK_COLUMNS = 16  # of the product that masks columns
MAX_SCORES = 64  # registers of a lane that hold scores
RESTART = 1.0  # what a block loses where it starts in the middle of a strip, in bands


def axes_of(problem: Problem) -> tuple[Axis, Axis]:
    """The two axes of a problem that has two."""
    w = problem.window
    rows, columns = (
        Axis(*values) for values in zip(problem.spatial, w.kernel_size, w.stride, w.dilation, w.is_causal, strict=True)
    )
    return rows, columns


def _up(value: int, multiple: int) -> int:
    return ceil(value / multiple) * multiple


def _odd(size: int) -> int:
    """Bytes of a row, an odd number of 16-byte chunks."""
    return (size // 16 | 1) * 16


@lru_cache(maxsize=4096)
def rows_of(axis: Axis, band: int, shift: int) -> tuple[int, int]:
    """The most rows that a band of queries sees, and the most stages of the ring that hold them."""
    rows = stages = 0
    for length in axis.lengths:
        for number in axis.sample(length, band):
            start = axis.keys(number * band, length)[0]
            end = axis.keys(min(number * band + band, length) - 1, length)[1]
            rows = max(rows, end - start)
            stages = max(stages, (end - 1 + shift) // band - (start + shift) // band + 1)
    return rows, stages


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
        for number in axis.sample(_up(length, strip), tile):
            if length <= strip:
                first = min(number * tile, max(length - tile, 0))
            else:
                first = min(number // tiles * strip, length - strip) + number % tiles * tile
            for x in range(first, min(first + tile, length), group):
                last = min(x + group, length) - 1
                yield x, axis.keys(x, length)[0], axis.keys(last, length)[1], length


@dataclass(frozen=True)
class Geometry:
    problem: Problem
    band: int  # rows of a group of 8 queries
    block_rows: int  # of a block of 16 keys
    groups: int  # of a tile
    tiles: int  # of a strip
    heads: int  # of a block
    ring: int  # stages of keys
    query_ring: int
    producers: int  # warps
    blocks_per_sm: int

    def with_ring(self, ring: int, producers: int) -> Geometry:
        return replace(self, ring=ring, producers=producers)

    @cached_property
    def axes(self) -> tuple[Axis, Axis]:
        return axes_of(self.problem)

    @property
    def group_columns(self) -> int:
        return 8 // self.band

    @property
    def block_columns(self) -> int:
        return 16 // self.block_rows

    @property
    def strip(self) -> int:
        return self.tiles * self.groups * self.group_columns

    @property
    def width(self) -> int:
        """Columns of the longest dilation group."""
        return self.axes[1].lengths[0]

    @property
    def padded(self) -> bool:
        return self.width > self.strip

    @cached_property
    def reach(self) -> tuple[int, int]:
        """Columns left of a group that its first block starts at, and its blocks."""
        return columns_of(self.axes[1], self.group_columns, self.block_columns, self.groups, self.tiles)

    @property
    def columns(self) -> int:
        """Of shared memory."""
        if not self.padded:
            return self.width
        left, blocks = self.reach
        last = self.strip - self.group_columns  # group's first column, from the strip's
        return (max(last, left) if self.groups == 1 else last) + blocks * self.block_columns

    @property
    def shift(self) -> int:
        rows = self.axes[0]
        return (rows.kernel - 1 if rows.causal else rows.kernel // 2) % self.band

    @property
    def rows(self) -> tuple[int, int]:
        return rows_of(self.axes[0], self.band, self.shift)

    @property
    def consumers(self) -> int:
        return self.heads * self.tiles

    @property
    def threads(self) -> int:
        return 32 * (self.consumers + self.producers)

    @property
    def bands(self) -> int:
        return ceil(self.axes[0].lengths[0] / self.band)

    @property
    def strips(self) -> int:
        return ceil(self.width / self.strip)

    @property
    def items(self) -> int:
        d0, d1 = self.problem.window.dilation
        return self.problem.batch * d0 * d1 * self.strips * self.bands

    @property
    def head_groups(self) -> int:
        return self.problem.heads // self.heads

    def slices(self, facts: DeviceFacts) -> int:
        """Blocks that share a group of heads: as many as are resident at once, or fewer with whole strips each."""
        resident = max(1, facts.multiprocessors * self.blocks_per_sm // self.head_groups)
        strips = self.items // self.bands
        whole = ceil(strips / ceil(strips / resident))
        if ceil(strips / whole) * self.bands <= self.items / resident + RESTART:
            return whole
        return min(resident, self.items)

    @property
    def is_legal(self) -> bool:
        """Whether the kernel's own limits hold; shared memory is another matter."""
        scores = self.groups * self.reach[1] * 4
        return (
            self.rows[0] <= self.block_rows
            and self.reach[1] * self.block_columns <= MASK_COLUMNS
            and (scores <= MAX_SCORES or self.groups == 1)
            and self.group_columns % self.block_columns == 0
            and (not self.padded or self.groups > 1 or self.strip + self.reach[0] >= self.reach[1] * self.block_columns)
            and self.problem.heads % self.heads == 0
            and self.rows[1] < self.ring
            and self.axes[1].lengths[-1] >= self.groups * self.group_columns
            and self.threads <= 1024
            and self.items < 1 << 31
        )

    @property
    def shared_bytes(self) -> int:
        """SHARED_BYTES of common/strips.cuh."""
        p = self.problem
        steps = [_up(d, 16) // 16 for d in (p.head_dim, p.head_dim_v)]
        left, blocks = self.reach
        single = self.groups == 1
        right = blocks * self.block_columns - (self.columns if single else self.group_columns + left)
        margin = 0 if self.padded else max(right, 0 if single else left)
        total = 0
        for token in (self.heads * s * 32 for s in steps):
            permuted = self.block_columns * token % 128 == 0
            pitch = _up(self.columns * token, 128) if permuted else _odd(self.columns * token)
            total += _up(self.ring * self.band * pitch, 128) + 2 * _up(margin * token, 128)
        total += self.query_ring * self.band * _up(self.strip * self.heads * steps[0] * 32, 128)
        chunks = 2 * steps[1]  # of a row of the stage, see common/shared_rows.cuh
        total += self.consumers * self.groups * 8 * 16 * (chunks if chunks & (chunks - 1) == 0 else chunks | 1)
        return total + self.heads * 2 * self.table * 4 + 16 * (self.ring + self.query_ring)

    @property
    def table(self) -> int:
        """TABLE of common/strips.cuh: floats of one bias table."""
        left, blocks = self.reach
        width = blocks * self.block_columns
        least = 1 - self.group_columns - (left if self.groups > 1 else width - 1)
        greatest = width - 1 - (left if self.groups > 1 else 0)
        k = self.axes[0].kernel
        rows = 2 * k - 1
        masked = rows + (2 * k - k // 2 - 1 - rows) % 8
        row = (greatest - least + 4) // 8 * 8 + 4
        return (masked + 1) * row

    @property
    def defines(self) -> tuple[tuple[str, str], ...]:
        p = self.problem
        names = {"KERNEL": "kernel", "STRIDE": "stride", "DILATION": "dilation", "CAUSAL": "causal"}
        defines: dict[str, object] = {
            f"{name}_{a}": int(getattr(axis, field))
            for name, field in names.items()
            for a, axis in enumerate(self.axes)
        }
        left, blocks = self.reach
        defines |= {"ELEMENT": p.dtype, "HEAD_DIM": p.head_dim, "HEAD_DIM_V": p.head_dim_v}
        defines |= {"BAND": self.band, "BLOCK_ROWS": self.block_rows, "GROUPS": self.groups, "TILES": self.tiles}
        defines |= {"HEADS": self.heads, "BLOCKS": blocks, "LEFT": left}
        defines |= {"COLUMNS": self.columns, "PADDED": int(self.padded), "SHIFT": self.shift, "RING": self.ring}
        defines |= {"QUERY_RING": self.query_ring, "PRODUCERS": self.producers, "BLOCKS_PER_SM": self.blocks_per_sm}
        if p.rpb_dtype is not None:
            defines["RPB"] = p.rpb_dtype
        return tuple(sorted((name, str(value)) for name, value in defines.items()))
