"""How the rolling backward (cuda_src/kernels/rolling_backward.cu) groups the tokens of a map; see
cuda_src/common/rolling.cuh. Pure integers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import ceil

from natcore.planning.axis import Axis, intervals, up
from natcore.planning.marching_geometry import axes_of
from natcore.planning.plan import DeviceFacts
from natcore.planning.resident_geometry import (
    BAND,
    BLOCK_COLUMNS,
    BLOCK_ROWS,
    GROUP_COLUMNS,
    TOKEN,
    WARPS,
    Maps,
    rows_of_bands,
)
from natcore.problem import Problem

MOST_COLUMNS = 32
MOST_GROUPS = 3  # of queries that see a pair
_PLACES = 8  # for dS of a query's pairs
AHEAD = (3, 2)  # bands on their way, the preferred first
_WEIGHTS = 256  # bytes of dS of a query


@dataclass(frozen=True)
class Columns:
    """Pairs of columns of keys, from column -shift on, of a map's longest dilation group and the others."""

    axis: Axis
    shift: int

    @property
    def pairs(self) -> int:
        return ceil((self.axis.lengths[0] + self.shift) / BLOCK_COLUMNS)

    @property
    def groups(self) -> int:
        """Of queries, in a band."""
        return ceil(self.axis.lengths[0] / GROUP_COLUMNS)

    def queries(self, pair: int, length: int) -> tuple[int, int]:
        """struct PairQueries: the first column of the groups that see a pair, and how many they are."""
        first, last = max(pair * BLOCK_COLUMNS - self.shift, 0), min(pair * BLOCK_COLUMNS - self.shift + 1, length - 1)
        if first > last:
            return 0, 0
        seen_by = intervals(self.axis, length)[1]
        groups = ceil((seen_by[last][1] - seen_by[first][0]) / GROUP_COLUMNS)
        return min(seen_by[first][0], length - groups * GROUP_COLUMNS), groups

    @cached_property
    def all_queries(self) -> tuple[tuple[int, int, int], ...]:
        """Of each dilation group's length and pair: pair, first column, groups."""
        return tuple((p, *self.queries(p, length)) for length in self.axis.lengths for p in range(self.pairs))

    @cached_property
    def most_groups(self) -> int:
        return max(groups for _, _, groups in self.all_queries)

    @property
    def units(self) -> int:
        """Of a band: groups that see a pair."""
        return sum(groups for _, _, groups in self.all_queries[: self.pairs])

    @cached_property
    def inner(self) -> tuple[int, int]:
        """Pairs, from the first on and before the end, near which no window of any dilation group is clamped: relative
        to the pair, the same queries see the same columns."""

        def sight(pair: int, length: int) -> object:
            first, groups = self.queries(pair, length)
            column = pair * BLOCK_COLUMNS - self.shift
            if column < 0 or column + 1 >= length:
                return None
            keys = [self.axis.keys(x, length) for x in range(first, first + groups * GROUP_COLUMNS)]
            return first - column, tuple((start - column, end - column) for start, end in keys)

        middle = self.pairs // 2
        usual = {sight(middle, length) for length in self.axis.lengths}
        alike = [{sight(p, length) for length in self.axis.lengths} == usual for p in range(self.pairs)]
        if len(usual) > 1 or None in usual:
            return 0, 0
        first = next(p for p in range(middle, -1, -1) if p == 0 or not alike[p - 1])
        return first, next(p for p in range(middle, self.pairs + 1) if p == self.pairs or not alike[p])

    @cached_property
    def seen_pairs(self) -> int:
        """Of a group of queries that starts at a multiple of its columns."""
        most = 1
        for length in self.axis.lengths:
            for start in range(0, length, GROUP_COLUMNS):
                keys = [self.axis.keys(x, length) for x in range(start, min(start + GROUP_COLUMNS, length))]
                first = (min(k[0] for k in keys) + self.shift) // BLOCK_COLUMNS
                most = max(most, (max(k[1] for k in keys) - 1 + self.shift) // BLOCK_COLUMNS - first + 1)
        return most

    @property
    def is_legal(self) -> bool:
        """Whether each pair's groups are the map's, and a query's places are those of one pair at most."""
        if self.seen_pairs > min(_PLACES, self.pairs) or self.most_groups > MOST_GROUPS:
            return False
        for length in self.axis.lengths:
            owners: dict[tuple[int, int], int] = {}
            for pair in range(self.pairs):
                first, groups = self.queries(pair, length)
                for x in range(first, first + groups * GROUP_COLUMNS):
                    if x < 0 or owners.setdefault((x, pair % _PLACES), pair) != pair:
                        return False
            for start in range(0, length, GROUP_COLUMNS):
                pair = min(
                    (self.axis.keys(start, length)[0] + self.shift) // BLOCK_COLUMNS, self.pairs - self.seen_pairs
                )
                for x in range(start, min(start + GROUP_COLUMNS, length)):
                    for p in range(pair, pair + self.seen_pairs):
                        if owners.get((x, p % _PLACES), p) != p:
                            return False
        return True


@dataclass(frozen=True)
class Rows:
    """What bands of queries need of the rows of keys, by pairs of rows."""

    lead: int  # pairs of rows after its own, at most
    kept: int  # pairs of rows before its own, at most
    offset: int  # of the first row that most bands see, from their first


@lru_cache(maxsize=1024)
def rows_of(axis: Axis) -> Rows:
    lead = kept = 0
    offsets: list[int] = []
    for length in axis.lengths:
        for row in range(0, length, BAND):
            start, end = axis.keys(row, length)[0], axis.keys(min(row + BAND, length) - 1, length)[1]
            lead = max(lead, (end - 1) // BAND - row // BAND)
            kept = max(kept, row // BAND - start // BAND)
            offsets.append(start - row)
    return Rows(lead, kept, max(offsets, key=offsets.count))


@lru_cache(maxsize=1024)
def columns_of(axis: Axis) -> Columns | None:
    """The shift with the fewest units and pairs; None where no one fits."""
    if not GROUP_COLUMNS * MOST_GROUPS <= axis.lengths[-1] <= axis.lengths[0] <= MOST_COLUMNS:
        return None
    legal = [c for c in (Columns(axis, shift) for shift in range(BLOCK_COLUMNS)) if c.is_legal]
    return min(
        legal,
        key=lambda c: (max(c.pairs, WARPS - 1), 3 * c.units + 2 * c.pairs + c.groups * c.seen_pairs),
        default=None,
    )


@dataclass(frozen=True)
class Geometry(Maps):
    """A warp for each pair of columns of keys and one that copies."""

    ahead: int  # bands on their way
    shift: int  # of the pairs

    @cached_property
    def split(self) -> Columns:
        return Columns(self.axes[1], self.shift)

    @property
    def ring(self) -> int:
        """Rows of keys in shared memory: of a band, of the one before, of which dQ is still made, and on their way."""
        rows = rows_of(self.axes[0])
        return BAND * (self.ahead + rows.lead + rows.kept + 2)

    @property
    def defines(self) -> tuple[tuple[str, str], ...]:
        rows, split = rows_of(self.axes[0]), self.split
        first, end = split.inner
        return self.defines_with(
            SHIFT=split.shift,
            PAIRS=split.pairs,
            MOST_GROUPS=split.most_groups,
            FIRST_INNER=first,
            END_INNER=end,
            SEEN_PAIRS=split.seen_pairs,
            LEAD=rows.lead,
            OFFSET=rows.offset,
            AHEAD=self.ahead,
            RING=self.ring,
        )

    @property
    def shared_bytes(self) -> int:
        """What common/rolling.cuh has: ROWS_AT, and what follows."""
        split, first, end = self.split, *self.split.inner
        queries = split.groups * 8
        keys = 2 * self.ring * split.pairs * BLOCK_COLUMNS * TOKEN
        of_queries = (self.ahead + 2) * queries * (3 * TOKEN + 8) + 2 * queries * (_WEIGHTS + 16)
        table = (2 * self.axes[0].kernel + 7) * ((8 * split.most_groups + 3) // 8 * 8 + 4) * 4
        tables = (split.pairs - (end - first) + 1) * table
        sums = 0 if self.problem.rpb_dtype is None else split.most_groups * 512
        of_warps = split.pairs * (sums + 4 * (2 * TOKEN + 16) + 4) + split.groups * 512
        return up(keys + of_queries + tables + of_warps, 8) + 8 + self.bands * (BAND * BLOCK_ROWS + 1) * 4 + 4

    def slices(self, facts: DeviceFacts) -> int:
        """Of the batch, as equal as may be: blocks of a head and dilation group."""
        p = self.problem
        slices = max(facts.multiprocessors * self.blocks_per_sm // (p.heads * self.map_groups), 1)
        return ceil(p.batch / ceil(p.batch / slices))


def refusal_of_window(problem: Problem) -> str | None:
    """Why the window does not fit the warps' share of a map, or None."""
    rows, columns = axes_of(problem)
    if columns.lengths[0] > MOST_COLUMNS or columns.lengths[-1] < GROUP_COLUMNS * MOST_GROUPS:
        return (
            f"map {problem.spatial}, dilation {problem.window.dilation}: a row of a dilation group must have"
            f" {GROUP_COLUMNS * MOST_GROUPS} to {MOST_COLUMNS} columns."
        )
    if rows_of_bands(rows) > BLOCK_ROWS:
        size = problem.window.kernel_size
        return f"kernel_size {size}: two rows of queries see more than {BLOCK_ROWS} rows of keys."
    if columns_of(columns) is None:
        return f"kernel_size {problem.window.kernel_size}: two columns of keys are seen by too many columns of queries."
    return None


def geometries(problem: Problem, facts: DeviceFacts, options: Mapping[str, int]) -> Iterator[Geometry]:
    """Those that fit a GPU and have the options, the preferred first."""
    if refusal_of_window(problem) is not None or min(options.values(), default=1) < 1 or options.get("ahead", 2) < 2:
        return
    split = columns_of(axes_of(problem)[1])
    assert split is not None
    warps = split.pairs + 1
    for blocks in range(max(WARPS // warps, 1), 0, -1):
        for ahead in AHEAD:
            values = {"blocks_per_sm": blocks, "ahead": ahead, **options}
            g = Geometry(problem, warps, shift=split.shift, **values)
            if g.fits(facts):
                yield g


def choose_geometry(problem: Problem, facts: DeviceFacts, options: Mapping[str, int]) -> Geometry | None:
    return next(geometries(problem, facts, options), None)
