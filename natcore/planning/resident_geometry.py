"""What the resident kernels know of maps (cuda_src/common/resident_map.cuh), and how the backward groups their tokens
(cuda_src/common/resident.cuh). Pure integers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import ceil

from natcore.planning.axis import Axis, defines_of, up
from natcore.planning.marching_geometry import axes_of
from natcore.planning.operands import refusal_of_elements, refusal_of_strides
from natcore.planning.plan import DeviceFacts
from natcore.problem import Call, Problem

BAND, GROUP_COLUMNS, BLOCK_ROWS, BLOCK_COLUMNS = 2, 4, 8, 2
MOST = 16  # rows, and columns
MAX_HEAD_DIM = 32
TOKEN = 64  # bytes
WARPS = 16  # of a multiprocessor, by their registers
_MOST_PAIRS = 8
_COPIERS = 2  # warps that do nothing else in a phase's first part
_RESERVED = 1 << 10  # bytes of shared memory that a block takes beside its own


@dataclass(frozen=True)
class Maps:
    """Maps in the shared memory of a block, and the launch."""

    problem: Problem
    warps: int
    blocks_per_sm: int

    @cached_property
    def axes(self) -> tuple[Axis, Axis]:
        return axes_of(self.problem)

    @property
    def rows(self) -> int:
        return self.axes[0].lengths[0]

    @property
    def columns(self) -> int:
        return self.axes[1].lengths[0]

    @property
    def bands(self) -> int:
        return ceil(self.rows / BAND)

    @property
    def map_groups(self) -> int:
        """Dilation groups."""
        d0, d1 = self.problem.window.dilation
        return d0 * d1

    @property
    def shared_bytes(self) -> int:
        raise NotImplementedError

    @property
    def defines(self) -> tuple[tuple[str, str], ...]:
        raise NotImplementedError

    def slices(self, facts: DeviceFacts) -> int:
        """Of the batch: blocks of a head and dilation group."""
        raise NotImplementedError

    def maps_in_turn(self, facts: DeviceFacts) -> int:
        """Of the busiest multiprocessor."""
        slices = self.slices(facts)
        blocks = self.problem.heads * self.map_groups * slices
        return ceil(self.problem.batch / slices) * ceil(blocks / facts.multiprocessors)

    def fits(self, facts: DeviceFacts) -> bool:
        return self.blocks_per_sm * (self.shared_bytes + _RESERVED) <= facts.shared_bytes_per_block + _RESERVED

    def defines_with(self, **own: object) -> tuple[tuple[str, str], ...]:
        p = self.problem
        values = {"ELEMENT": p.dtype, "HEAD_DIM": p.head_dim, "HEAD_DIM_V": p.head_dim_v, "WARPS": self.warps}
        values |= {"COLUMNS": self.columns, "BLOCKS_PER_SM": self.blocks_per_sm}
        return defines_of(self.axes, p.rpb_dtype, values | own)


@dataclass(frozen=True)
class Geometry(Maps):
    """Pairs of columns of keys, from column -shift on, and how many of them are worked on at once."""

    shift: int
    at_once: int  # pairs of a phase

    @property
    def groups(self) -> int:
        """Of a band."""
        return ceil(self.columns / GROUP_COLUMNS)

    @property
    def halves(self) -> int:
        """Of a band: two groups each, a warp's."""
        return ceil(self.groups / 2)

    @cached_property
    def pairs_of_groups(self) -> tuple[tuple[int, int], ...]:
        """Of each group, the first pair of columns of which it sees something, and the one after the last."""
        return _pairs_of_groups(self.axes[1], self.shift)

    @property
    def pairs(self) -> int:
        return max(end for _, end in self.pairs_of_groups)

    @property
    def units(self) -> int:
        """Of a band."""
        return sum(end - first for first, end in self.pairs_of_groups)

    @property
    def defines(self) -> tuple[tuple[str, str], ...]:
        return self.defines_with(
            ROWS=self.rows,
            SHIFT=self.shift,
            PAIRS=self.pairs,
            FIRST_PAIRS=hex(sum(first << 4 * g for g, (first, _) in enumerate(self.pairs_of_groups))),
            END_PAIRS=hex(sum(end << 4 * g for g, (_, end) in enumerate(self.pairs_of_groups))),
            AT_ONCE=self.at_once,
        )

    @property
    def distances(self) -> int:
        """DISTANCES of common/resident.cuh: of a unit's pair and group."""
        apart = GROUP_COLUMNS // BLOCK_COLUMNS
        least = min(first - apart * g for g, (first, _) in enumerate(self.pairs_of_groups))
        return max(end - apart * g for g, (_, end) in enumerate(self.pairs_of_groups)) - least

    @property
    def shared_bytes(self) -> int:
        """SHARED_BYTES of common/resident.cuh."""
        seen, queries = self.rows * self.pairs * BLOCK_COLUMNS * TOKEN, self.bands * self.groups * 8 * TOKEN
        of_pairs = [sum(first <= pair < end for first, end in self.pairs_of_groups) for pair in range(self.pairs)]
        units = max(sum(of_pairs[i : i + self.at_once]) for i in range(0, self.pairs, self.at_once))
        differences = BLOCK_COLUMNS * self.distances + GROUP_COLUMNS - 1
        table = (2 * self.axes[0].kernel + 7) * ((differences + 3) // 8 * 8 + 4) * 4
        total = 4 * seen + 6 * queries + 256 + self.bands * units * 512
        return (
            total
            + self.warps * 16 * TOKEN
            + self.bands * (self.halves * 128 + 4)
            + table
            + up(self.bands, 2) * 64
            + self.halves * 128
            + self.bands * 64
        )

    def slices(self, facts: DeviceFacts) -> int:
        """Of the batch, as equal as may be: blocks of a head and dilation group."""
        p = self.problem
        slices = max(facts.multiprocessors * self.blocks_per_sm // (p.heads * self.map_groups), 1)
        return ceil(p.batch / ceil(p.batch / slices))


@lru_cache(maxsize=4096)
def _pairs_of_groups(columns: Axis, shift: int) -> tuple[tuple[int, int], ...]:
    found = []
    for start in range(0, columns.lengths[0], GROUP_COLUMNS):
        seen = [
            columns.keys(query, length)
            for length in columns.lengths
            for query in range(start, min(start + GROUP_COLUMNS, length))
        ]
        first, end = min(its[0] for its in seen), max(its[1] for its in seen)
        found.append(((first + shift) // BLOCK_COLUMNS, ceil((end + shift) / BLOCK_COLUMNS)))
    return tuple(found)


def rows_of_bands(rows: Axis) -> int:
    """Of keys that a band sees, at most."""
    most = 0
    for length in rows.lengths:
        for row in range(0, length, BAND):
            most = max(most, rows.keys(min(row + BAND, length) - 1, length)[1] - rows.keys(row, length)[0])
    return most


def refusal_of_tokens(call: Call, facts: DeviceFacts, kernel: str) -> str | None:
    """Why no kernel of whole maps can take a call's window, tokens and strides, or None."""
    p = call.problem
    reason = refusal_of_elements(call, facts, kernel)
    if reason is not None:
        return reason
    if p.window.rank != 2:
        return f"{p.window.rank}-D windows are for the tiled kernels."
    if p.extra or p.batch == 0:
        return "additional keys and empty batches are for the general kernel."
    if max(p.head_dim, p.head_dim_v) > MAX_HEAD_DIM:
        return f"head_dim {p.head_dim}, head_dim_v {p.head_dim_v}: beyond {MAX_HEAD_DIM} a map leaves no room."
    return refusal_of_strides(call, 1 << 24, "the 32 bits of offsets inside a map", first=1)


def refusal_of_maps(call: Call, facts: DeviceFacts) -> str | None:
    """Why no resident kernel can take a call's maps, or None."""
    p = call.problem
    reason = refusal_of_tokens(call, facts, "resident")
    if reason is not None:
        return reason
    rows, columns = axes_of(p)
    if max(rows.lengths[0], columns.lengths[0]) > MOST:
        return f"map {p.spatial}, dilation {p.window.dilation}: more than {MOST} rows or columns in a dilation group."
    if rows_of_bands(rows) > BLOCK_ROWS:
        return f"kernel_size {p.window.kernel_size}: two rows of queries see more than {BLOCK_ROWS} rows of keys."
    return None


def geometries(problem: Problem, facts: DeviceFacts, options: Mapping[str, int]) -> Iterator[Geometry]:
    """Those that fit a GPU and have the options, the preferred first: the most pairs of a phase, then of blocks."""
    rows, columns = axes_of(problem)
    if max(rows.lengths[0], columns.lengths[0]) > MOST or rows_of_bands(rows) > BLOCK_ROWS:
        return
    if min(options.values(), default=1) < 1:
        return
    found = [Geometry(problem, 1, 1, shift, 1) for shift in range(BLOCK_COLUMNS)]
    shape = min((g for g in found if g.pairs <= _MOST_PAIRS), key=lambda g: g.units)
    for at_once in (8, 4, 2, 1):
        its = min(options.get("at_once", at_once), shape.pairs)
        halves = shape.bands * shape.halves
        warps = min(max(halves + _COPIERS, 2 * its), WARPS)
        for blocks in range(max(WARPS // warps, 1), 0, -1):
            values = {"warps": warps, "blocks_per_sm": blocks, **options, "at_once": its}
            g = Geometry(problem, shift=shape.shift, **values)
            if halves <= g.warps <= WARPS and g.columns <= 8 * g.warps and g.fits(facts):
                yield g


def choose_geometry(problem: Problem, facts: DeviceFacts, options: Mapping[str, int]) -> Geometry | None:
    return next(geometries(problem, facts, options), None)
