"""How the banded backward (cuda_src/kernels/banded_backward.cu) cuts a map.

A `Geometry` says how the map is cut (see cuda_src/common/bands.cuh): groups of 8 tokens in bands of
rows, tiles of groups, regions of tiles, one region a step; a block works down the map, region by region.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from math import ceil, prod

from natcore.planning.plan import DeviceFacts
from natcore.planning.tiling import Axis
from natcore.problem import Problem

EXTRA_COST = 2.0  # of an extra block, in blocks


@dataclass(frozen=True)
class Columns:
    """The blocks of columns around groups, on one side: those of every group and, near borders, extra ones."""

    left: int  # columns between a group's first block and its first token
    blocks: int
    extra: bool  # whether some groups take extra blocks
    pad: int  # columns of shared memory to the left of a region
    shared: int  # columns of shared memory
    least: int  # the first and the last column of any block, from its group
    greatest: int
    mean: float  # blocks of a group, extra ones at EXTRA_COST


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


@lru_cache(maxsize=512)
def rows_of(axis: Axis, side: int, region: int) -> tuple[int, int, int]:
    """Rows of shared memory for regions of so many tokens: of one region, of it and the new ones of the next,
    and of the last region and the first of another column of regions."""
    alone = ahead = across = 0
    for length in axis.lengths:
        found = intervals(axis, length)[side]
        spans = [(found[first][0], found[min(first + region, length) - 1][1]) for first in range(0, length, region)]
        alone = max(alone, max(end - start for start, end in spans))
        ahead = max(ahead, alone, *(b[1] - a[0] for a, b in pairwise(spans)), 0)
        across = max(across, ahead, spans[-1][1] - spans[-1][0] + spans[0][1] - spans[0][0])
    return alone, ahead, across


@lru_cache(maxsize=512)
def columns_of(axis: Axis, side: int, group: int, region: int, wide: int) -> Columns:
    """Blocks of ``wide`` columns around groups of so many tokens, the fewest in all: keys around queries (side 0)
    or queries around keys (side 1)."""
    reaches: Counter[tuple[int, int]] = Counter()
    for length in axis.lengths:
        found = intervals(axis, length)[side]
        for first in range(0, length, group):
            left, end = found[first][0], found[min(first + group, length) - 1][1]
            reaches[first - left, end - first] += 1

    def blocks(left: int, right: int, reach: tuple[int, int]) -> float:
        extra = max(0, ceil((reach[0] - left) / wide)) + max(0, ceil((reach[1] - right) / wide))
        return (left + right) / wide + EXTRA_COST * extra

    best = None
    for left in {max(r[0], 0) for r in reaches}:
        for reach in {max(r[1], group) for r in reaches}:
            right = ceil((left + reach) / wide) * wide - left
            cost = sum(n * blocks(left, right, r) for r, n in reaches.items())
            best = min(best or (cost, left, right), (cost, left, right))
    assert best is not None
    _, left, right = best
    pad, end = left, region - group + right
    least, greatest, extra = -left, right - 1, 0
    for length in axis.lengths:
        found = intervals(axis, length)[side]
        for first in range(0, length, group):
            before = max(0, ceil((first - found[first][0] - left) / wide)) * wide + left
            after = found[min(first + group, length) - 1][1] - first
            after = max(0, ceil((after - right) / wide)) * wide + right
            extra |= before > left or after > right
            pad, end = max(pad, before - first % region), max(end, first % region + after)
            least, greatest = min(least, -before), max(greatest, after - 1)
    extras = sum(n * (blocks(left, right, r) - (left + right) / wide) for r, n in reaches.items())
    mean = (left + right) / wide + extras / reaches.total()
    return Columns(left, (left + right) // wide, bool(extra), pad, end + pad, least, greatest, mean)


def up(value: int, multiple: int) -> int:
    return ceil(value / multiple) * multiple


def axes_of(problem: Problem, planes: int) -> tuple[Axis, Axis, Axis]:
    """The three axes of the kernel; where the problem has fewer, ``planes`` that do not see each other lead."""
    w = problem.window
    given = [
        Axis(extent, kernel, stride, dilation, causal)
        for extent, kernel, stride, dilation, causal in zip(
            problem.spatial, w.kernel_size, w.stride, w.dilation, w.is_causal, strict=True
        )
    ]
    lead, none = Axis(planes, 1, 1, 1, False), Axis(1, 1, 1, 1, False)
    return {1: (lead, *given, none), 2: (lead, *given), 3: tuple(given)}[w.rank]  # type: ignore[return-value]


@dataclass(frozen=True)
class Geometry:
    problem: Problem
    band: int  # rows of a group of 8 tokens
    block_rows: int  # of a block of 16 tokens
    groups: int  # of a tile
    region: tuple[int, int, int]  # tokens
    query_warps: int
    warps: int
    blocks_per_sm: int
    ahead: int  # index into what `rows_of` returns
    ring_step: int  # rings are a multiple of so many rows: of 8, and no eight rows meet a bank twice

    @cached_property
    def axes(self) -> tuple[Axis, Axis, Axis]:
        return axes_of(self.problem, self.problem.batch if self.batch_is_axis else 1)

    @property
    def batch_is_axis(self) -> bool:
        """Whether batch entries are the planes of regions; with kernel 1 they do not see each other."""
        return self.problem.window.rank < 3 and self.region[0] > 1

    @property
    def batch(self) -> int:
        return 1 if self.batch_is_axis else self.problem.batch

    @property
    def group_columns(self) -> int:
        return 8 // self.band

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def regions(self) -> tuple[int, ...]:
        return tuple(ceil(axis.lengths[0] / size) for axis, size in zip(self.axes, self.region, strict=True))

    @property
    def items(self) -> int:
        return self.batch * prod(self.problem.window.dilation) * prod(self.regions)

    @cached_property
    def columns(self) -> dict[str, Columns]:
        """`columns_of`, keys around queries (QUERY) and of queries around keys (KEY)."""
        wide = 16 // self.block_rows
        if self.dense:
            blocks = ceil(self.axes[2].lengths[0] / wide)
            least, greatest = self.group_columns - self.region[2], blocks * wide - 1
            shared = max(blocks * wide, self.region[2])
            return dict.fromkeys(("QUERY", "KEY"), Columns(0, blocks, False, 0, shared, least, greatest, blocks))
        axis, group, region = self.axes[2], self.group_columns, self.region[2]
        return {name: columns_of(axis, side, group, region, wide) for side, name in enumerate(("QUERY", "KEY"))}

    @property
    def dense(self) -> bool:
        """Whether a tile is as wide as the map."""
        return self.axes[2].lengths[0] <= self.groups * self.group_columns == self.region[2]

    @cached_property
    def spans(self) -> dict[str, int]:
        """Planes and rows in shared memory: KEY_SPAN_0, KEY_RING, ..."""
        planes = {
            f"{name}_SPAN_0": rows_of(self.axes[0], i, self.region[0])[0] for i, name in enumerate(("KEY", "QUERY"))
        }
        rows = {
            f"{name}_RING": up(rows_of(self.axes[1], i, self.region[1])[self.ahead], self.ring_step)
            for i, name in enumerate(("KEY", "QUERY"))
        }
        return planes | rows

    @property
    def differences(self) -> tuple[int, int]:
        """The least and greatest difference of columns, key - query, that a unit of scores meets."""
        q, k = self.columns["QUERY"], self.columns["KEY"]
        reach = self.group_columns - 1
        return min(q.least - reach, -k.greatest), max(q.greatest, reach - k.least)

    @property
    def table_row(self) -> int:
        least, greatest = self.differences
        return (greatest - least + 4) // 8 * 8 + 4

    @property
    def entries(self) -> int:
        return prod(2 * axis.kernel - 1 for axis in self.axes)

    @cached_property
    def lists(self) -> dict[str, int]:
        """The longest lists of rows, in whole blocks: of keys around bands of queries (QUERY), ..."""
        planes, rows = self.axes[:2]
        found = {}
        for side, name in enumerate(("QUERY", "KEY")):
            count = rows_of(planes, side, 1)[0] * rows_of(rows, side, self.band)[0]
            found[name] = up(count, self.block_rows)
        return found

    @property
    def tables_bytes(self) -> int:
        """sizeof(Tables) of bands.cuh."""
        bands = self.region[0] * self.region[1] // self.band
        tiles = self.region[2] // (self.groups * self.group_columns)
        lists = sum(20 + 2 * (self.band + n * (1 + self.band)) for n in self.lists.values())
        return up(bands * lists + 4 * self.columns["KEY"].shared + 2 * tiles, 4)

    @cached_property
    def shared_bytes(self) -> int:
        """SHARED of bands.cuh."""
        p, s = self.problem, self.spans
        tokens = [up(d, 16) * 2 for d in (p.head_dim, p.head_dim_v)]
        key_columns, query_columns = (self.columns[side].shared for side in ("QUERY", "KEY"))
        key_rows, query_rows = (s[f"{side}_SPAN_0"] * s[f"{side}_RING"] for side in ("KEY", "QUERY"))
        spans = sum(
            rows * (columns * token // 16 | 1) * 16
            for rows, columns in ((key_rows, key_columns), (query_rows, query_columns))
            for token in tokens
        )
        table = up(spans + query_rows * query_columns * 8 + 2 * self.tables_bytes, 16)
        k = self.axes[1].kernel
        rows = (2 * self.axes[0].kernel - 1) * (2 * k - 1)
        rows += (2 * k - k // 2 - 1 - rows) % 8 + 1
        stage = up(table + self.axes[2].kernel * rows * self.table_row * 4, 16)
        sums = stage + self.threads // 32 * 8 * (max(tokens) // 16 | 1) * 16
        return up(sums + self.query_warps * self.entries * 4, 16) + 3 * 224 + 16 + 4 * self.warps

    @property
    def defines(self) -> tuple[tuple[str, str], ...]:
        p = self.problem
        names = {"KERNEL": "kernel", "STRIDE": "stride", "DILATION": "dilation", "CAUSAL": "causal"}
        defines: dict[str, object] = {
            f"{name}_{a}": int(getattr(axis, field))
            for name, field in names.items()
            for a, axis in enumerate(self.axes)
        }
        defines |= {f"REGION_{a}": n for a, n in enumerate(self.region)} | self.spans
        for side, other in (("QUERY", "KEY"), ("KEY", "QUERY")):  # blocks are around SIDE, shared memory is of OTHER
            c = self.columns[side]
            defines |= {f"{side}_LEFT": c.left, f"{side}_BLOCKS": c.blocks, f"{side}_EXTRA": int(c.extra)}
            defines |= {f"{other}_PAD": c.pad, f"{other}_COLUMNS": c.shared, f"{side}_LIST": self.lists[side]}
        defines |= {"LEAST_DIFFERENCE": f"({self.differences[0]})", "TABLE_ROW": self.table_row}
        defines["SHARED"] = self.shared_bytes
        defines |= {"ELEMENT": p.dtype, "HEAD_DIM": p.head_dim, "HEAD_DIM_V": p.head_dim_v, "BAND": self.band}
        defines |= {
            "DENSE": int(self.dense),
            "BLOCK_ROWS": self.block_rows,
            "GROUPS": self.groups,
            "THREADS": self.threads,
        }
        defines |= {"QUERY_WARPS": self.query_warps, "BLOCKS_PER_SM": self.blocks_per_sm}
        if p.rpb_dtype is not None:
            defines["RPB"] = p.rpb_dtype
        return tuple(sorted((name, str(value)) for name, value in defines.items()))

    def slices(self, facts: DeviceFacts) -> int:
        """Blocks that share a head's regions: as many as are resident at once."""
        resident = facts.multiprocessors * self.blocks_per_sm
        return max(1, min(resident // self.problem.heads, self.items))
