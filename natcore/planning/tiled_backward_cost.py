"""Which `Geometry` of the tiled backward is the cheapest.

Cost model. A block works through its share of regions. For a region each of its warps takes `tile` clocks of a
multiprocessor, `line` for each line of its box and, for each step, `step` and `width` for each 32 elements of a head
and of one of v; of tiles that are not plain, `masked` of that more. Warps without a tile at the edges of the map wait
for the others, mostly. Copying takes `column` for each token of the span. Few warps hide less of their latencies
(`few`), and a block waits for each plane (`plane`) where no other one and no second stage goes on meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from itertools import product
from math import ceil, prod
from typing import NamedTuple

from natcore.planning.plan import DeviceFacts, capability
from natcore.planning.tiled_backward_geometry import TILES, Geometry, Pass, orders
from natcore.problem import Problem


class Rates(NamedTuple):
    """Clocks, and shares of them."""

    tile: float
    line: float
    step: float
    width: float
    masked: float
    edge: float  # of a tile's clocks, where a warp has none
    column: float
    few: float  # over the number of warps
    plane: float
    start: float  # before the first region


#: Fitted to 45 measured times each, of 15 rows of benchmarks/shapes.py, with errors of 9 % and 11 %.
SHORT: dict[Pass, Rates] = {
    "queries": Rates(378.0, 12.8, 4.6, 25.2, 0.53, 0.55, 1.4, 6.0, 1140.0, 15000.0),
    "keys": Rates(188.0, 15.5, 7.7, 25.1, 0.47, 0.95, 3.5, 5.5, 460.0, 6000.0),
}
#: Of float32, fitted to 79 times of both, of 9 rows, with an error of 6 %.
LONG: dict[Pass, Rates] = {
    "queries": Rates(188.0, 12.8, 71.0, 67.0, 0.0, 0.55, 4.6, 5.7, 460.0, 15000.0),
    "keys": Rates(188.0, 15.5, 2.0, 137.0, 0.56, 0.95, 14.6, 3.1, 460.0, 6000.0),
}
STAGED = 0.3  # of the wait for a plane, where there are two stages
MAX_WARPS = 16  # of a block, and of a multiprocessor
#: Warps of a multiprocessor without spills, up to so many steps of 16 elements of a head and of one of v.
WARPS: dict[Pass, tuple[tuple[int, int], ...]] = {
    "queries": ((4, 16), (6, 12), (16, 8)),
    "keys": ((4, 14), (6, 12), (16, 8)),
}
LONG_WARPS = 8  # of float32
SCARCE = 12  # warps, for tiles of 4 columns and for keys, where compilers for sm_100 and later want more registers
RESERVED = 1024  # bytes of shared memory that the driver takes from every block


def choose_geometry(problem: Problem, facts: DeviceFacts, options: Mapping[str, int], of: Pass) -> Geometry | None:
    """The cheapest geometry of a pass, with options in place of free choices; None where nothing fits."""
    return _cheapest(problem, facts, tuple(sorted(options.items())), of)


@lru_cache(maxsize=4096)
def _cheapest(problem: Problem, facts: DeviceFacts, options: tuple[tuple[str, int], ...], of: Pass) -> Geometry | None:
    return min(geometries(problem, facts, dict(options), of), key=lambda g: cost(g, facts), default=None)


def geometries(problem: Problem, facts: DeviceFacts, options: Mapping[str, int], of: Pass) -> Iterator[Geometry]:
    """All geometries worth a thought."""
    given = {"region0", "region1", "blocks_per_sm"} <= set(options)

    def free(name: str, choices: list[int]) -> list[int]:
        return [options[name]] if name in options else choices

    for (number, order), (rows, columns) in product(enumerate(orders(problem.window.rank)), TILES):
        chosen = number in free("ordering", [number]) and columns in free("columns", [columns])
        if not chosen or (order[1] < 0 and rows > 1):
            continue
        unit = Geometry(problem, of, order, (rows, columns), (1, 1), 1, 1)
        counts = [ceil(axis.lengths[0] / n) for axis, n in zip(unit.axes[1:], unit.tile, strict=True)]
        sizes = [sorted({ceil(n / parts) for parts in range(max(1, ceil(n / MAX_WARPS)), n + 1)}) for n in counts]
        regions = product(free("region0", sizes[0]), free("region1", sizes[1]))
        launches = product(free("stages", [1, 2]), free("blocks_per_sm", [1, 2, 3, 4]))
        for region, (stages, blocks) in product(regions, launches):
            if not 1 <= prod(region) <= MAX_WARPS or blocks < 1:
                continue
            g = replace(unit, region=region, stages=stages, blocks_per_sm=blocks)
            limit = (facts.shared_bytes_per_block + RESERVED) // blocks - RESERVED
            few = given or g.warps * blocks <= max_warps(g, facts)
            if few and g.is_legal and g.shared_bytes <= limit:
                yield g


def max_warps(g: Geometry, facts: DeviceFacts) -> int:
    """Warps of a multiprocessor that have the registers they need, without spills."""
    steps = sum(ceil(n / 16) for n in (g.problem.head_dim, g.problem.head_dim_v))
    narrow, newer = g.tile[1] <= 4, capability(facts.arch) >= 100
    if g.problem.dtype == "float32":
        return 0 if newer and narrow and g.own_stages == 2 else LONG_WARPS
    warps = next(warps for most, warps in WARPS[g.of] if steps <= most)
    return min(warps, SCARCE) if newer and (narrow or g.of == "keys") else warps


def cost(g: Geometry, facts: DeviceFacts) -> float:
    """Clocks of the busiest multiprocessor, by the model at the top of this file."""
    rates, p = (LONG if g.problem.dtype == "float32" else SHORT)[g.of], g.problem
    planes, rows, columns = g.reaches
    width, warps = (p.head_dim + p.head_dim_v) / 64, g.warps * g.blocks_per_sm
    lines = planes.units * (columns if g.step_rows == 2 else rows).units * g.seen_heads
    steps = g.mean_steps * (rates.step + rates.width * width) * (1 + rates.masked * (1 - g.plain))
    tiles = prod(ceil(axis.lengths[0] / n) for axis, n in zip(g.axes[1:], g.tile, strict=True))
    tile = rates.tile + lines * rates.line + steps
    tile *= rates.edge + (1 - rates.edge) * tiles / (g.warps * prod(g.regions))
    copies = planes.units * rows.spans * columns.spans * width * g.seen_heads * rates.column
    region = (g.warps * tile + copies) * (1 + rates.few / warps)
    region += rates.plane * planes.units * g.seen_heads / g.blocks_per_sm * (STAGED if g.stages == 2 else 1)
    items = ceil(g.items / g.slices(facts)) * max(1.0, g.heads / (facts.multiprocessors * g.blocks_per_sm))
    return rates.start + items * g.blocks_per_sm * region
