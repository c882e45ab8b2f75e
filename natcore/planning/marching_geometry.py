"""How the marching kernels (cuda_src/kernels/marching_*.cu) cut a map; see cuda_src/common/strips.cuh.

A `Geometry` says how, for one of three passes: groups of 8 own tokens in bands of rows, tiles of groups, strips of
tiles down which a block marches with some heads, and the rings of rows in its shared memory. Pure integers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import ceil
from typing import Literal

from natcore.planning.axis import Axis, altered, defines_of, intervals, up
from natcore.planning.marching_reach import Reach, reach_of_keys, reach_of_queries, rows_of
from natcore.planning.plan import DeviceFacts
from natcore.problem import Problem

Pass = Literal["forward", "queries", "keys"]  # the values of PASS, in this order
PASSES: tuple[Pass, ...] = ("forward", "queries", "keys")
MASK_COLUMNS = 16  # of the product that masks columns
MAX_SCORES = 64  # registers of a lane that hold scores
MOST_GROUPS = 4  # lanes that make a query's scalars, by eights
RESTART = 1.0  # what a block loses where it starts in the middle of a strip, in bands


def axes_of(problem: Problem) -> tuple[Axis, Axis]:
    """The two axes of a problem that has two."""
    w = problem.window
    rows, columns = (
        Axis(*values) for values in zip(problem.spatial, w.kernel_size, w.stride, w.dilation, w.is_causal, strict=True)
    )
    return rows, columns


def _odd(size: int) -> int:
    """Bytes of a row, an odd number of 16-byte chunks."""
    return (size // 16 | 1) * 16


@dataclass(frozen=True)
class Geometry:
    problem: Problem
    band: int  # rows of a group of 8 queries
    block_rows: int  # of a block of 16 keys
    groups: int  # of a tile
    tiles: int  # of a strip
    heads: int  # of a block
    ring: int  # stages of seen rows
    own_ring: int  # bands
    producers: int  # warps
    blocks_per_sm: int
    of: Pass = "forward"

    def with_ring(self, ring: int, producers: int) -> Geometry:
        return altered(self, ring=ring, producers=producers)

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

    @cached_property
    def width(self) -> int:
        """Columns of the longest dilation group."""
        return self.axes[1].lengths[0]

    @property
    def padded(self) -> bool:
        return self.width > self.strip

    @property
    def own_keys(self) -> bool:
        return self.of == "keys"

    @cached_property
    def reach(self) -> Reach:
        find = reach_of_keys if self.own_keys else reach_of_queries
        return find(self.axes[1], self.group_columns, self.block_columns, self.groups, self.tiles)

    @cached_property
    def shift(self) -> int:
        rows = self.axes[0]
        if self.own_keys:
            return (0 if rows.causal else rows.kernel - 1 - rows.kernel // 2) % self.band
        return (rows.kernel - 1 if rows.causal else rows.kernel // 2) % self.band

    @cached_property
    def rows(self) -> tuple[int, int]:
        return rows_of(self.axes[0], self.band, self.shift, self.own_keys)

    @cached_property
    def row_blocks(self) -> float:
        """Of a band, on average."""
        if not self.own_keys:
            return 1.0
        axis, length = self.axes[0], self.axes[0].lengths[0]
        seen = intervals(axis, length)[1]
        rows = [seen[min(y + self.band, length) - 1][1] - seen[y][0] for y in range(0, length, self.band)]
        return sum(ceil(n / self.block_rows) for n in rows) / len(rows)

    @property
    def consumers(self) -> int:
        return self.heads * self.tiles

    @property
    def threads(self) -> int:
        return 32 * (self.consumers + self.producers)

    @property
    def lines(self) -> int:
        """Of 128 bytes, that a block brings for a band of seen and own tokens."""
        d, v = (ceil(self.heads * n * 2 / 128) for n in (self.problem.head_dim, self.problem.head_dim_v))
        own = {"forward": d, "queries": d + 2 * v, "keys": d + v}[self.of]
        return self.band * (self.reach.columns * (d + v) + self.strip * own)

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
        counts = (self.groups, self.tiles, self.heads, self.own_ring, self.producers, self.blocks_per_sm)
        if self.band not in (2, 4, 8) or self.block_rows not in (8, 16) or min(counts) < 1 or self.groups > MOST_GROUPS:
            return False
        reach = self.reach
        scores = self.groups * reach.blocks * 4
        whole = not self.padded or self.groups > 1 or self.strip + reach.left >= reach.blocks * self.block_columns
        return (
            (self.own_keys or (self.rows[0] <= self.block_rows and whole))
            and max(reach.blocks, reach.edge_blocks) * self.block_columns <= MASK_COLUMNS
            and (self.of != "forward" or scores <= MAX_SCORES or self.groups == 1)
            and self.group_columns % self.block_columns == 0
            and self.problem.heads % self.heads == 0
            and self.rows[1] < self.ring + self.own_keys
            and self.axes[1].lengths[-1] >= self.groups * self.group_columns
            and self.threads <= 1024
            and self.items < 1 << 31
        )

    @cached_property
    def steps(self) -> tuple[int, int]:
        """Of 16 elements: of a head, and of one of v."""
        return up(self.problem.head_dim, 16) // 16, up(self.problem.head_dim_v, 16) // 16

    @property
    def shared_bytes(self) -> int:
        """SHARED_BYTES of common/strips.cuh."""
        p, reach, steps = self.problem, self.reach, self.steps
        total = gap = up(reach.margin * self.heads * max(steps) * 32, 128)
        for token in (self.heads * s * 32 for s in steps):
            permuted = self.block_columns * token % 128 == 0
            copied = up(reach.columns, self.block_columns) if permuted and gap else reach.columns
            pitch = up(copied * token, 128) + gap if permuted else _odd(copied * token + gap)
            total += self.ring * self.band * pitch
        own = {"forward": steps[:1], "queries": (*steps, steps[1]), "keys": steps}[self.of]
        for s in own:
            total += self.own_ring * self.band * up(self.strip * self.heads * s * 32, 128)
        stage = {"forward": steps[1], "queries": steps[0], "keys": max(steps)}[self.of]
        chunks = 2 * stage  # of a row of the stage, see common/shared_rows.cuh
        staged = 1 if self.own_keys else self.groups
        total += self.consumers * staged * 8 * 16 * (chunks if chunks & (chunks - 1) == 0 else chunks | 1)
        total += self.heads * 2 * self.table * 4
        if self.own_keys:
            total += self.ring * self.band * 4 * ((2 * self.heads * reach.columns + 3) // 8 * 8 + 4)
        if self.of == "queries":
            total += 2 * self.own_ring * self.band * self.heads * self.strip * 4
        if self.of == "queries" and p.rpb_dtype is not None:
            total += self.consumers * (self.entries + 1) * 4
        kept = {"forward": 0, "queries": 32 + 32 * 16, "keys": 32 + 32 * 4}[self.of]
        return up(total, 16) + kept * self.consumers + 16 * (self.ring + self.own_ring)

    @property
    def entries(self) -> int:
        """Of one head's bias."""
        rows, columns = self.axes
        return (2 * rows.kernel - 1) * (2 * columns.kernel - 1)

    @cached_property
    def table(self) -> int:
        """TABLE of common/strips.cuh: floats of one bias table."""
        k = self.axes[0].kernel
        rows = 2 * k - 1
        masked = rows + (2 * k - k // 2 - 1 - rows) % 8
        row = (self.reach.greatest - self.reach.least + 4) // 8 * 8 + 4
        return (masked + 1) * row

    @property
    def defines(self) -> tuple[tuple[str, str], ...]:
        p, reach = self.problem, self.reach
        defines: dict[str, object] = {"PASS": PASSES.index(self.of), "ELEMENT": p.dtype, "HEAD_DIM": p.head_dim}
        defines |= {"HEAD_DIM_V": p.head_dim_v, "BAND": self.band, "BLOCK_ROWS": self.block_rows}
        defines |= {"GROUPS": self.groups, "TILES": self.tiles, "HEADS": self.heads}
        defines |= {"BLOCKS": reach.blocks, "LEFT": reach.left, "PAD": reach.pad, "MARGIN": reach.margin}
        for name, ranges in zip(("INNER", "START", "END", "NARROW"), reach.kinds, strict=True):
            defines[f"{name}_BLOCKS"] = ",".join(f"{first},{end}" for first, end in ranges)
        defines |= {"LEAST_DIFFERENCE": f"({reach.least})", "GREATEST_DIFFERENCE": f"({reach.greatest})"}
        defines |= {"COLUMNS": reach.columns, "PADDED": int(self.padded), "SHIFT": self.shift, "RING": self.ring}
        defines |= {"WIDTH": 0 if self.padded else self.axes[1].lengths[-1]}
        defines |= {"OWN_RING": self.own_ring, "PRODUCERS": self.producers, "BLOCKS_PER_SM": self.blocks_per_sm}
        return defines_of(self.axes, p.rpb_dtype, defines)
