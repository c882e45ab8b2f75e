"""Plans for the forward of maps that fit into a block's shared memory (cuda_src/kernels/resident_forward.cu).

The window, the map's extent in a dilation group and the head dimensions are compiled in, with how many maps a block
has in shared memory; extents, batch, heads and strides are arguments.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from math import ceil, prod

from natcore.planning import listed
from natcore.planning.axis import Axis, up
from natcore.planning.marching_geometry import axes_of
from natcore.planning.plan import Candidate, DeviceFacts, KernelInfo, Plan
from natcore.planning.resident import launch_of
from natcore.planning.resident_geometry import BLOCK_ROWS, MOST, TOKEN, WARPS, Maps, refusal_of_maps, rows_of_bands
from natcore.problem import Call, Problem

OPTIONS = ("stages", "warps", "blocks_per_sm")
MOST_SEEN = 12  # columns of keys of a half band, whose scores and bias are in registers
_OPERANDS = ("q", "k", "v", "rpb", "out", "lse")
_HALF = 8  # columns of queries, at most
_CHUNKS = 4  # of a token
_STAGES = 3  # maps of a block in shared memory: with more, the first one comes later
#: Clocks before a block's first map, of a column of keys of a half band, and of 1,000 bytes that a multiprocessor
#: moves: fitted to 30 measured times on an H200 (6 % rms, 17 % at most). The first is 2,200 more than fitted, as what
#: other kernels' models predict is too much by about so many.
_START, _COLUMN, _KILOBYTE = 9_200, 9.7, 46


@dataclass(frozen=True)
class Geometry(Maps):
    """Half bands of queries, a warp's each, and maps in shared memory."""

    stages: int

    @property
    def halves(self) -> int:
        """Of a band."""
        return ceil(self.columns / _HALF)

    @property
    def workers(self) -> int:
        return self.bands * self.halves

    @cached_property
    def seen(self) -> int:
        """Columns of keys that a half band sees, at most."""
        return columns_seen(self.axes[1])

    @property
    def defines(self) -> tuple[tuple[str, str], ...]:
        p = self.problem
        return self.defines_with(ROWS=self.rows, SEEN=self.seen, HEADS_PER_KV=p.heads // p.heads_kv, STAGES=self.stages)

    @property
    def shared_bytes(self) -> int:
        """SHARED_BYTES of cuda_src/kernels/resident_forward.cu."""
        rows, columns = self.axes
        a_map = up(self.rows * TOKEN * (2 * up(self.columns, 2) + self.columns), 128)
        table = (2 * rows.kernel - 1) * (2 * columns.kernel - 1) * 4
        return self.stages * (a_map + 24) + 16 + self.workers * (16 * TOKEN + 32 * 36) + table

    def blocks_of(self, slices: int) -> int:
        return self.problem.heads * self.map_groups * slices

    def clocks(self, slices: int, facts: DeviceFacts) -> float:
        """Of the busiest multiprocessor, by the cost model."""
        p = self.problem
        turns = ceil(self.blocks_of(slices) / (facts.multiprocessors * self.blocks_per_sm))
        maps = ceil(p.batch / slices) * self.blocks_per_sm
        moved = p.batch * prod(p.spatial) * p.heads * 4 * (up(p.head_dim, 16) + up(p.head_dim_v, 16))
        of_maps = turns * (_START + maps * _COLUMN * self.workers * self.seen)
        return of_maps + _KILOBYTE * moved / 1000 / facts.multiprocessors

    def slices(self, facts: DeviceFacts) -> int:
        """Of the batch, as equal as may be: blocks of a head and dilation group."""
        batch = self.problem.batch
        return min(sorted({ceil(batch / maps) for maps in range(1, batch + 1)}), key=lambda n: self.clocks(n, facts))


@lru_cache(maxsize=4096)
def columns_seen(columns: Axis) -> int:
    longest = columns.lengths[0]
    width = ceil(longest / ceil(longest / _HALF))
    return max(
        columns.keys(min(start + width, length) - 1, length)[1] - columns.keys(start, length)[0]
        for length in columns.lengths
        for start in range(0, length, width)
    )


def geometries(problem: Problem, facts: DeviceFacts, options: Mapping[str, int]) -> Iterator[Geometry]:
    """Those that fit a GPU and have the options, the preferred first."""
    g = Geometry(problem, 1, 1, 1)
    if max(g.rows, g.columns) > MOST or rows_of_bands(g.axes[0]) > BLOCK_ROWS or g.seen > MOST_SEEN:
        return
    if min(options.values(), default=1) < 1:
        return
    # Warps that only copy, if as many are left as have a row of the map; else all copy.
    copiers = ceil(g.columns * _CHUNKS / 32)
    for warps in (g.workers + copiers, g.workers):
        for blocks in range(max(WARPS // warps, 1), 0, -1):
            for stages in range(_STAGES, 1, -1):
                values = {"stages": stages, "warps": warps, "blocks_per_sm": blocks, **options}
                chosen = Geometry(problem, **values)
                legal = chosen.warps in (g.workers, g.workers + copiers) and chosen.stages > 1
                if legal and chosen.warps * chosen.blocks_per_sm <= WARPS and chosen.fits(facts):
                    yield chosen


@lru_cache(maxsize=4096)
def _first(problem: Problem, facts: DeviceFacts, options: tuple[tuple[str, int], ...]) -> Geometry | None:
    return next(geometries(problem, facts, dict(options)), None)


def choose_geometry(problem: Problem, facts: DeviceFacts, options: Mapping[str, int]) -> Geometry | None:
    return _first(problem, facts, tuple(sorted(options.items())))


def plan(call: Call, facts: DeviceFacts, options: Mapping[str, int]) -> Plan:
    """The plan of a call that `refusal` has passed."""
    p = call.problem
    g = choose_geometry(p, facts, options)
    if g is None:
        raise ValueError(f"config: no launch with the options {dict(options)} fits {facts}, for {p}.")
    return Plan((launch_of("resident_forward", call, facts, g, g.slices(facts), _OPERANDS),), 0)


def refusal(call: Call, facts: DeviceFacts) -> str | None:
    """Why the resident forward cannot run a call, or None."""
    p = call.problem
    reason = refusal_of_maps(call, facts)
    if reason is not None:
        return reason
    if columns_seen(axes_of(p)[1]) > MOST_SEEN:
        return (
            f"kernel_size {p.window.kernel_size}: {_HALF} queries of a row see more than {MOST_SEEN} columns of keys."
        )
    if choose_geometry(p, facts, {}) is None:
        return f"map {p.spatial}: {facts} has too little shared memory for two."
    return None


def clocks(call: Call, facts: DeviceFacts) -> float:
    """By the cost model: maps of the busiest multiprocessor."""
    g = choose_geometry(call.problem, facts, {})
    assert g is not None  # refused
    return g.clocks(g.slices(facts), facts)


CANDIDATE = Candidate(
    "resident_forward",
    (KernelInfo("resident_forward", ("sm_80+",), max_registers=255, max_shared_bytes=0),),
    OPTIONS,
    refusal,
    plan,
    partial(listed.small_windows, "forward"),
    directions=("forward",),
    clocks=clocks,
)
