"""Which geometry of the banded backward is the cheapest.

Cost model. A step of one multiprocessor takes STEP + TILE * tiles + UNIT * units + LOAD * tokens brought clocks; a
tile is one of queries and one of keys, a unit one m16n8 tile of scores, of queries or of keys, at head_dim 32. A
block's steps are its share of all regions, rounded up. A step whose rows could not be fetched during the one before it
waits for them, WAIT clocks; rings that are no multiple of 8 rows meet bank conflicts. Fitted to times of 31 geometries
of 7x7 windows on an H200, which it meets within 7 % rms.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import product
from math import ceil, prod

from natcore.planning.banded_geometry import Geometry, axes_of, intervals
from natcore.planning.plan import DeviceFacts
from natcore.problem import Problem

# Clocks, fitted to measured times.
STEP, TILE, UNIT, LOAD, WAIT, CONFLICT = 3300.0, 200.0, 39.0, 17.0, 9000.0, 80.0


def choose_geometry(problem: Problem, facts: DeviceFacts, options: Mapping[str, int]) -> Geometry | None:
    """The cheapest geometry of a problem, with options in place of free choices; None where nothing fits."""
    return _cheapest(problem, facts, tuple(sorted(options.items())))


@lru_cache(maxsize=4096)
def _cheapest(problem: Problem, facts: DeviceFacts, options: tuple[tuple[str, int], ...]) -> Geometry | None:
    fitting = [g for g in _geometries(problem, dict(options)) if g.shared_bytes <= facts.shared_bytes_per_block]
    return min(fitting, key=lambda g: cost(g, facts), default=None)


def _shape(problem: Problem) -> tuple[int, int]:
    """The rows of a group and of a block: little waste where a band's windows fill the rows of a block."""
    rank, kernel = problem.window.rank, problem.window.kernel_size
    rows = kernel[0] if rank < 3 else kernel[1]
    if rank == 1:
        return 8, 16
    return 2 if rows in (6, 7, 15) else 4 if rows <= 5 or rows >= 10 else 8, 8 if rows <= 7 else 16


def _geometries(problem: Problem, options: Mapping[str, int]) -> Iterator[Geometry]:
    """All regions worth a thought. Wide heads and windows take more registers: 8 warps have 255 each, 12 have 168."""
    band, block_rows = _shape(problem)
    band, block_rows = options.get("band", band), options.get("block_rows", block_rows)
    short = max(problem.head_dim, problem.head_dim_v) <= 32
    few = short and problem.window.kernel_size[-1] <= 9  # registers for sums of drpb
    groups = options.get("groups", 2 if few and band < 8 else 1)
    tile = groups * 8 // band
    rank, extents = problem.window.rank, problem.spatial
    lengths = [axis.lengths[0] for axis in axes_of(problem, 1)]
    for planes, rows, columns, ahead, ring_step in product(
        _choices(options, "region0", [1] if rank == 3 else [1, 2, 4, 8]),
        _choices(options, "region1", [band * n for n in range(1, 13)]),
        _choices(options, "region2", [tile * n for n in range(1, 7)]),
        _choices(options, "ahead", [2, 1, 0]),
        _choices(options, "ring_step", [8, 1]),
    ):
        if rows >= lengths[1] + band or columns >= lengths[2] + tile:
            continue
        whole = rank < 3 and extents[0] <= rows and (rank == 1 or extents[1] <= columns)
        if planes > 1 and not (whole and planes <= problem.batch):
            continue
        tiles = planes * rows * columns // (8 * groups)
        warps = options.get("warps", 12 if few and tiles > 8 else 8)
        query_warps = options.get("query_warps", ceil(tiles / ceil(tiles / warps)))
        blocks = options.get("blocks_per_sm", 1)
        yield Geometry(
            problem, band, block_rows, groups, (planes, rows, columns), query_warps, warps, blocks, ahead, ring_step
        )  # fmt: skip


def _choices(options: Mapping[str, int], name: str, free: list[int]) -> list[int]:
    return [options[name]] if name in options else free


def cost(g: Geometry, facts: DeviceFacts) -> float:
    """Clocks, by the model at the top of this file."""
    p = g.problem
    tile = g.group_columns * g.groups
    lengths = [axis.lengths[0] for axis in g.axes]
    tiles = lengths[0] * ceil(lengths[1] / g.band) * ceil(lengths[2] / tile) / prod(g.regions)
    units = sum(g.columns[side].mean * _row_blocks(g, i) for i, side in enumerate(("QUERY", "KEY"))) * g.groups
    width = (p.head_dim + p.head_dim_v) / 64
    brought = g.region[0] * (g.region[1] if g.ahead else g.spans["QUERY_RING"]) * g.columns["KEY"].shared
    step = STEP + (TILE + UNIT * units * width) * tiles + LOAD * brought * width
    step += WAIT * (1, 1 / g.regions[1], 0)[g.ahead] + (CONFLICT * tiles if g.ring_step == 1 else 0)
    return ceil(g.items / g.slices(facts)) * step


def _row_blocks(g: Geometry, side: int) -> float:
    """The mean number of row blocks of a band."""
    found = intervals(g.axes[1], g.axes[1].lengths[0])[side]
    spans = [found[min(i + g.band, len(found)) - 1][1] - found[i][0] for i in range(0, len(found), g.band)]
    return sum(ceil(span * g.axes[0].kernel / g.block_rows) for span in spans) / len(spans)
