"""Which `Geometry` a tiled kernel should take: a cost model, and the search for its least cost.

The kernels are bound by how many warps are there to hide latencies, so the model counts instructions
and divides by what the resident warps can issue:

    instructions of a block    SETUP for each warp, `load` for 32 chunks of 16 bytes of its span, and for each tile
                               `tile` + (`scores` + `products` width + MASK where windows are clamped) for each n8 block
    clocks of a block          instructions * resident blocks / min(`issue`, resident warps / `latency`) + `wait` and,
                               for each KiB of the span, `copy`
    clocks of the launch       clocks of a block * (waves + TAIL), or one block's where all are resident

with width = (head_dim + head_dim_v) / 64. The constants are read off the compiled kernels (instructions) and
fitted to measured times on an H200 (the others); see benchmarks/results/forward_kernel.md and float32.md. Those of
float32, all fitted, stand for what its long code costs rather than for instructions.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import permutations, product
from math import ceil, inf, prod
from typing import NamedTuple

from natcore.planning.axis import Axis
from natcore.planning.tiling import TILE_QUERIES, Geometry, first_query
from natcore.problem import Problem
from natcore.views import ITEM_SIZES

SETUP, OUTPUT, MASK, TAIL = 800, 60, 18, 0.3


class Rates(NamedTuple):
    load: float
    tile: float
    scores: float
    products: float
    issue: float
    latency: float
    wait: float
    copy: float
    spill: float  # factor, where a kernel needs more registers than its warps leave it


SHORT = Rates(10, 180, 19, 6, 2.5, 6.0, 2100, 0, 1.25)  # of 16-bit elements
LONG = Rates(8, 890, 31, 92, 4.0, 3.1, 1550, 10.4, 3)  # of float32
REGISTERS = 65536  # of a multiprocessor
RESERVED_SHARED = 1024  # bytes of shared memory of every block

MAX_BLOCKS = 64  # n8 blocks of scores of one tile: all are unrolled
MAX_TILES = 64  # of a region
MAX_REGION = 16  # tiles of a region on one axis
MAX_WARPS = 16  # of a multiprocessor
WORD = 32  # keys of a mask word
ROUNDS = (4, 8)  # batch entries of a block that keeps its accumulators

TILES = tuple(t for t in product((1, 2, 4, 8, 16), repeat=3) if prod(t) == TILE_QUERIES)


def is_legal(g: Geometry) -> bool:
    """What common/tiles.cuh asserts."""
    rows = g.halo[2] <= WORD or g.halo[0] == g.halo[1] == 1
    chunks = g.chunk >= g.blocks or g.chunk % 4 == 0
    return rows and chunks and max(g.halo[:2]) <= WORD and g.blocks <= MAX_BLOCKS and prod(g.region) <= 32 * g.warps


def orders(rank: int) -> Iterator[tuple[int, ...]]:
    """Ways to hand the problem's axes to the kernel; -1 stands for a missing one."""
    for order in permutations(range(rank)):
        yield (-1,) * (3 - rank) + order


@lru_cache(maxsize=4096)
def _interior(axis: Axis, tile: int) -> float:
    """The share of tiles of an axis none of whose windows is clamped."""
    if axis.stride > 1:
        return 0.0
    length = axis.lengths[0]
    before, firsts = axis.kernel - 1 if axis.causal else axis.kernel // 2, range(ceil(length / tile))
    if len(firsts) > 256:
        return 1.0
    starts = [first_query(length, tile, n) - before for n in firsts]
    return sum(start >= 0 and start + axis.kernel + tile - 1 <= length for start in starts) / len(starts)


def _registers(g: Geometry) -> tuple[int, int]:
    """Registers that a thread needs, and that the launch bounds leave it."""
    p = g.problem
    each_quarter = ceil(g.warps * g.blocks_per_sm / 4)  # a multiprocessor's warps live in four quarters
    left = min(255, REGISTERS // 4 // 32 // each_quarter // 8 * 8)
    if p.dtype == "float32":
        more = 4 * g.blocks + 25 if g.kept else 30 if g.chunk < g.blocks else 0
        more += 36 if g.chunk > 11 else 0  # read off kernels for sm_90 and sm_100
        return 72 + 4 * g.chunk + more + p.head_dim_v // 2, left
    output = p.head_dim // 4 + p.head_dim_v // 2 + 4
    need = 30 + 8 * g.blocks if g.kept else 58 + (14 if g.halo[2] % 8 else 0) + 4 * min(g.chunk, g.blocks)
    return need + output, left


def rates_of(problem: Problem) -> Rates:
    return LONG if problem.dtype == "float32" else SHORT


def _span_bytes(g: Geometry) -> int:
    """Of global memory."""
    return prod(g.span) * (g.problem.head_dim + g.problem.head_dim_v) * ITEM_SIZES[g.problem.dtype]


class Work(NamedTuple):
    """Of a block, whatever its launch: instructions to load its span and of a tile; tiles, and the share there is."""

    load: float
    tile: float
    tiles: int
    existing: float


def work_of(g: Geometry) -> Work:
    """By the model above. Of a geometry whose accumulators are kept, a tile takes no mask."""
    p, rates = g.problem, rates_of(g.problem)
    width = (p.head_dim + p.head_dim_v) / 64
    each = tuple(zip(g.axes, g.tile, strict=True))
    mask = 0.0 if g.kept else MASK * (1 - prod(_interior(axis, tile) for axis, tile in each))
    tile = g.blocks * (rates.scores + rates.products * width + mask) + rates.tile + OUTPUT * p.head_dim_v / 32
    tile += 20 if g.halo[2] % 8 else 0  # addresses
    tiles, exist = prod(g.region), prod(ceil(axis.lengths[0] / tile) for axis, tile in each)
    load = rates.load * _span_bytes(g) / 16 / 32
    return Work(load, tile, tiles, exist / (prod(g.regions) * tiles))


def cost(g: Geometry, shared_bytes: int, multiprocessors: int, work: Work | None = None) -> float:
    """Clocks of the launch, by the model above. ``shared_bytes`` is the limit of one block, ``work`` that of g."""
    resident = min(g.blocks_per_sm, (shared_bytes + RESERVED_SHARED) // (g.shared_bytes + RESERVED_SHARED))
    if resident < 1:
        return inf
    load, tile, tiles, existing = work or work_of(g)
    rates = rates_of(g.problem)
    turns = 0.6 * ceil(tiles / g.warps) * g.warps + 0.4 * tiles  # idle warps leave room to others
    instructions = SETUP * g.warps + g.rounds * (load + turns * existing * tile)
    need, left = _registers(g)
    issued = min(rates.issue, resident * g.warps / rates.latency)
    clocks = instructions * resident / issued * (rates.spill if need > left else 1)
    clocks += (rates.wait + rates.copy * _span_bytes(g) / 1024) * (g.rounds if g.stages == 1 else 1)
    waves = g.grid / (multiprocessors * resident)
    return clocks * (waves + TAIL if waves > 1 else 1)


def with_warps(g: Geometry) -> Iterator[Geometry]:
    """The geometry with each sensible number of warps, blocks per multiprocessor and rounds."""
    tiles, whole = prod(g.region), prod(g.regions) == 1
    for warps in range(max(1, ceil(tiles / 8)), min(tiles, 8) + 1):
        for blocks in range(1, MAX_WARPS // warps + 1):
            yield g.with_launch(warps, blocks)
            if whole and warps == tiles and g.chunk >= g.blocks:
                for rounds in ROUNDS:
                    yield g.with_launch(warps, blocks, stages=2, rounds=min(rounds, g.problem.batch))


def _shapes(problem: Problem) -> list[Geometry]:
    """The tile shapes with the least work, as regions of one tile."""
    shapes, rates = [], rates_of(problem)
    for order in orders(problem.window.rank):
        for tile in TILES:
            if all(a >= 0 or n == 1 for a, n in zip(order, tile, strict=True)):
                g = Geometry.of(problem, order, tile, (1, 1, 1))
                if is_legal(g):
                    tiles = prod(ceil(axis.lengths[0] / n) for axis, n in zip(g.axes, g.tile, strict=True))
                    block = rates.scores + rates.products
                    shapes.append((tiles * (rates.tile + g.blocks * block), order, tile, g))
    return [g for *_, g in sorted(shapes, key=lambda s: s[:3])[:3]]


@lru_cache(maxsize=4096)
def choose_geometry(problem: Problem, shared_bytes: int, multiprocessors: int) -> Geometry | None:
    """The cheapest geometry that fits into the shared memory of a block, or None."""
    best: tuple[float, Geometry] | None = None
    for unit in _shapes(problem):
        counts = [ceil(axis.lengths[0] / n) for axis, n in zip(unit.axes, unit.tile, strict=True)]
        sizes = [
            sorted({ceil(n / parts) for parts in range(1, n + 1) if ceil(n / parts) <= MAX_REGION}) for n in counts
        ]
        for region in product(*sizes):
            if prod(region) > MAX_TILES:
                continue
            smallest = Geometry.of(problem, unit.order, unit.tile, region)
            if smallest.shared_bytes > shared_bytes:
                continue
            work = work_of(smallest)
            for g in with_warps(smallest):
                if g.shared_bytes <= shared_bytes:
                    price = cost(g, shared_bytes, multiprocessors, None if g.kept else work)
                    if best is None or price < best[0]:
                        best = (price, g)
    return None if best is None else best[1]
