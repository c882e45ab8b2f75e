"""Which geometry of the marching forward is the cheapest.

Cost model. A block's bands are its share of all bands, and one more where it starts in the middle of a strip. In a
step each of its warps works on one tile of a band: TILE + UNIT * units clocks of a multiprocessor that has its share
of warps, where a unit is one m16n8 tile of scores at head_dim 32; few warps hide less. Rows wait for copies where
the ring has no stage to spare or one producer has to bring them all. Fitted to times of 7x7 windows on an H200.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import product
from math import ceil

from natcore.planning.marching_geometry import Geometry
from natcore.planning.plan import DeviceFacts, capability
from natcore.problem import Problem

# Clocks, fitted to 268 measured times with an error of 8 %.
TILE, UNIT, FEW, COLUMN = 108.0, 13.2, 4.3, 14.0
SPARE, ALONE = 0.03, 0.2
START = 12000.0  # before the first band
MOST_WARPS, MOST_STAGES = 16, 8  # of a multiprocessor; of a ring
REGISTERS, MORE_REGISTERS = {90: 0.93}, 1.3  # of those counted, without spills; elsewhere the compiler takes more
RESERVED = 1024  # bytes of shared memory that the driver takes from every block


def choose_geometry(problem: Problem, facts: DeviceFacts, options: Mapping[str, int]) -> Geometry | None:
    """The cheapest geometry of a problem, with options in place of free choices; None where nothing fits."""
    return _cheapest(problem, facts, tuple(sorted(options.items())))


@lru_cache(maxsize=4096)
def _cheapest(problem: Problem, facts: DeviceFacts, options: tuple[tuple[str, int], ...]) -> Geometry | None:
    return min(geometries(problem, facts, dict(options)), key=lambda g: cost(g, facts), default=None)


def geometries(problem: Problem, facts: DeviceFacts, options: Mapping[str, int]) -> Iterator[Geometry]:
    """All geometries worth a thought."""

    def free(name: str, choices: list[int]) -> list[int]:
        return [options[name]] if name in options else choices

    short = max(problem.head_dim, problem.head_dim_v) <= 32
    heads = [h for h in (1, 2, 3, 4, 8) if problem.heads % h == 0]
    shapes = product(free("band", [2, 4, 8]), free("block_rows", [8, 16]), free("groups", [1, 2] if short else [1]))
    for band, block_rows, groups in shapes:
        for tiles, its_heads, blocks in product(
            free("tiles", list(range(1, MOST_WARPS))), free("heads", heads), free("blocks_per_sm", [1, 2, 3])
        ):
            g = Geometry(
                problem, band, block_rows, groups, tiles, its_heads, 1, options.get("query_ring", 2), 1, blocks
            )
            if g.rows[0] > block_rows:
                break
            least = options.get("producers", 1)
            spare = max_warps(g, facts) // blocks - g.consumers
            fixed = "tiles" in options and "heads" in options
            if problem.heads % its_heads or (tiles - 1) * g.strip // tiles >= g.width or (spare < least and not fixed):
                continue
            producers = options.get("producers", max(1, min(spare, 3)))
            yield from _rings(g, producers, facts, options)


def _rings(g: Geometry, producers: int, facts: DeviceFacts, options: Mapping[str, int]) -> Iterator[Geometry]:
    """The geometry with the longest ring that fits, or that of the options."""
    limit = (facts.shared_bytes_per_block + RESERVED) // g.blocks_per_sm - RESERVED
    longest = min(g.rows[1] + 4, max(MOST_STAGES, g.rows[1] + 1))
    for ring in [options["ring"]] if "ring" in options else range(longest, g.rows[1], -1):
        chosen = g.with_ring(ring, producers)
        if not chosen.is_legal:
            return
        if chosen.shared_bytes <= limit:
            yield chosen
            return


def max_warps(g: Geometry, facts: DeviceFacts) -> int:
    """Warps of a multiprocessor that have the registers they need; each of its four parts has a quarter of them."""
    d, v = (ceil(n / 16) for n in (g.problem.head_dim, g.problem.head_dim_v))
    registers = 60 + g.groups * (4 * g.reach[1] + 4 * v + 2 * d) + 4 * max(d, v)
    needed = REGISTERS.get(capability(facts.arch), MORE_REGISTERS) * registers
    return max(4, min(4 * int(512 / needed), 20))


def cost(g: Geometry, facts: DeviceFacts) -> float:
    """Clocks of the busiest multiprocessor, by the model at the top of this file."""
    slices = g.slices(facts)
    bands = ceil(g.items / slices)
    if g.items % slices or bands % g.bands:
        bands += 1
    width = (g.problem.head_dim + g.problem.head_dim_v) / 64
    tile = TILE + UNIT * g.groups * g.reach[1] * width
    warps, producers = g.consumers * g.blocks_per_sm, g.producers * g.blocks_per_sm
    rows = g.band * g.columns * g.heads * width
    step = max(g.consumers * tile * (1 + FEW / warps), rows * COLUMN) * g.blocks_per_sm
    return START + bands * step * (1 + SPARE / (g.ring - g.rows[1])) * (1 + ALONE / producers**2)
