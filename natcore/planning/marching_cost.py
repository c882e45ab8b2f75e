"""Which geometry of the marching kernels is the cheapest.

Cost model. A block's bands are its share of all bands, and one more where it starts in the middle of a strip. In a
step each of its warps works on one tile of a band: tile + unit * units + line * lines clocks of a multiprocessor that
has its share of warps, where a unit is one m16n8 tile of scores at head_dim 32 and a line is one of 128 bytes that is
brought, in part or whole; few warps hide less, and many in one block wait for each other. Rows wait for copies where
the ring has no stage to spare or one producer has to bring them all. Fitted to times of 7x7 windows on an H200.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import product
from math import ceil
from typing import NamedTuple

from natcore.planning.marching_geometry import Geometry, Pass
from natcore.planning.plan import DeviceFacts, capability
from natcore.problem import Problem


class Rates(NamedTuple):
    """Clocks, and shares of a step."""

    tile: float
    unit: float
    few: float  # of a step, over the number of warps
    column: float  # to copy
    spare: float  # of a step, over the stages to spare
    alone: float  # of a step, over the square of the number of producers
    start: float  # before the first band
    coupled: float  # of a step, over the warps of a block, which wait for each other's rows
    line: float


#: Fitted to 261, 56 and 24 measured times, with errors of 11 %, 4 % and 4 %; then `start` of the backward to batch 1,
#: and of the forward `line` and `column` such that the fewest choices of benchmarks/plans.py are more than 10 % off.
RATES: dict[Pass, Rates] = {
    "forward": Rates(90.0, 12.9, 4.3, 11.0, 0.03, 0.2, 12000.0, 0.0, 0.1),
    "queries": Rates(64.7, 11.8, 17.3, 22.6, 0.004, 0.25, 12000.0, 0.014, 0.0),
    "keys": Rates(139.7, 14.1, 5.5, 24.0, 0.011, 0.058, 11900.0, 0.0265, 0.0),
}
MASKED = 1.1  # a tile's cost where all windows count as clamped
TALL = 1.2  # of the backward, with blocks of 16 rows
MOST_TILES, MOST_STAGES = 15, 8  # of a block; of a ring
MORE_REGISTERS = {90: 1.0, 100: 1.65}, 1.35  # what compilers take, of those counted, without spills; elsewhere
REGISTERS = ((20, 96), (16, 128), (12, 168), (8, 255))  # of a thread, where a multiprocessor has so many warps
SQUEEZED = 1.28, 1.05  # the forward does with 96 where so many more are counted; and what that costs
CROWDED = 1.05  # of keys, where more than 12 warps leave 128 of them
SCATTERED, NARROW_MAP = 1.165, 32  # of keys, one head of several on maps of so few columns
RESERVED = 1024  # bytes of shared memory that the driver takes from every block


def choose_geometry(
    problem: Problem, facts: DeviceFacts, options: Mapping[str, int], of: Pass = "forward"
) -> Geometry | None:
    """The cheapest geometry of a pass, with options in place of free choices; None where nothing fits."""
    return _cheapest(problem, facts, tuple(sorted(options.items())), of)


@lru_cache(maxsize=4096)
def _cheapest(problem: Problem, facts: DeviceFacts, options: tuple[tuple[str, int], ...], of: Pass) -> Geometry | None:
    return min(geometries(problem, facts, dict(options), of), key=lambda g: cost(g, facts), default=None)


def geometries(
    problem: Problem, facts: DeviceFacts, options: Mapping[str, int], of: Pass = "forward"
) -> Iterator[Geometry]:
    """All geometries worth a thought."""
    if min(options.values(), default=1) < 1:
        return

    def free(name: str, choices: list[int]) -> list[int]:
        return [options[name]] if name in options else choices

    short = max(problem.head_dim, problem.head_dim_v) <= 32
    heads = [h for h in (1, 2, 3, 4, 8) if problem.heads % h == 0]
    # What the model does not know: of the backward, blocks of 16 rows are slower where 8 hold a band's rows, bands of 4
    # rows of queries than of 2 (kernel 3: 142 us against 124), and of 8 than of 4; so are bands of 8 rows of several
    # heads.
    tall = problem.window.kernel_size[0] > 7
    block_rows = free("block_rows", [8, 16] if of == "forward" or tall else [8])
    bands = free("band", [2, 4, 8] if of != "queries" else [2, 4] if tall else [2])
    shapes = product(bands, block_rows, free("groups", [1, 2] if short else [1]))
    for band, height, groups in shapes:
        for tiles, its_heads, blocks in product(
            free("tiles", list(range(1, MOST_TILES + 1))),
            free("heads", [1] if band == 8 else heads),
            free("blocks_per_sm", [1, 2, 3]),
        ):
            own_ring = options.get("own_ring", 2 if of == "forward" else 1)
            g = Geometry(problem, band, height, groups, tiles, its_heads, 1, own_ring, 1, blocks, of)
            if g.rows[0] > height and of != "keys":
                break
            least = options.get("producers", 1)
            spare = max_warps(g, facts) // blocks - g.consumers
            fixed = "tiles" in options and "heads" in options
            if problem.heads % its_heads or (tiles - 1) * g.strip // tiles >= g.width or (spare < least and not fixed):
                continue
            for producers in free("producers", list(range(1, max(1, min(spare, 3)) + 1))):
                yield from _rings(g, producers, facts, options)


def _rings(g: Geometry, producers: int, facts: DeviceFacts, options: Mapping[str, int]) -> Iterator[Geometry]:
    """The geometry with the longest ring that fits, or that of the options."""
    limit = (facts.shared_bytes_per_block + RESERVED) // g.blocks_per_sm - RESERVED
    longest = min(g.rows[1] + 4, max(MOST_STAGES, g.rows[1] + 1))
    for ring in [options["ring"]] if "ring" in options else range(longest, g.rows[1] - g.own_keys, -1):
        chosen = g.with_ring(ring, producers)
        if not chosen.is_legal:
            return
        if chosen.shared_bytes <= limit:
            yield chosen
            return


def max_warps(g: Geometry, facts: DeviceFacts) -> int:
    """Warps of a multiprocessor that have the registers they need, without spills."""
    d, v = g.steps
    if g.of == "forward":
        needed = 56 + g.groups * (3.7 * g.reach.blocks + 3.7 * v + 1.9 * d) + 3.7 * max(d, v)
    elif g.of == "queries":
        needed = (
            (38 if g.problem.rpb_dtype is None else 28)
            + 4 * g.reach.blocks
            + g.groups * (6 * d + 2 * v + 12)
            + 8 * d
            + 4 * v
        )
    else:
        needed = 40 + g.groups * (6 * d + 6 * v + 8) + 8 * max(d, v)
    if g.of != "forward" and max(g.problem.window.dilation) > 1:
        needed += 10
    of_arch, elsewhere = MORE_REGISTERS
    needed *= of_arch.get(capability(facts.arch), elsewhere)
    most, *others = REGISTERS
    if g.of == "forward" and needed <= most[1] * SQUEEZED[0]:
        return most[0]
    return next((warps for warps, registers in (most, *others) if needed <= registers), 4)


def cost(g: Geometry, facts: DeviceFacts) -> float:
    """Clocks of the busiest multiprocessor, by the model at the top of this file."""
    rates = RATES[g.of]
    slices = g.slices(facts)
    bands = ceil(g.items / slices)
    if g.items % slices or bands % g.bands:
        bands += 1
    width = (g.problem.head_dim + g.problem.head_dim_v) / 64
    tile = rates.tile + rates.unit * g.reach.units * g.row_blocks * width
    tile *= MASKED if g.axes[1].stride > 1 else 1
    tile *= TALL if g.of != "forward" and g.block_rows == 16 else 1
    tile += rates.line * g.lines / g.consumers
    warps, producers = g.consumers * g.blocks_per_sm, g.producers * g.blocks_per_sm
    rows = g.band * g.reach.columns * g.heads * width
    step = max(g.consumers * tile * (1 + rates.few / warps), rows * rates.column) * g.blocks_per_sm
    step *= SQUEEZED[1] if warps + producers > REGISTERS[1][0] else 1
    if g.own_keys:
        step *= CROWDED if warps + producers > REGISTERS[2][0] else 1
        step *= SCATTERED if g.heads == 1 and g.problem.heads > 2 and g.width <= NARROW_MAP else 1
    waits = (1 + rates.spare / (g.ring - g.rows[1] + g.own_keys)) * (1 + rates.alone / producers**2)
    waits *= 1 + rates.coupled * g.consumers
    return rates.start + bands * step * waits
