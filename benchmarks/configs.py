"""Configs of the tensor core kernels: the planner's own choice spelled out, and others to time beside it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from itertools import product
from math import ceil, inf, prod
from typing import Any

from natcore.compiling import compile_kernel
from natcore.errors import CompileError
from natcore.planning import (
    Candidate,
    Config,
    DeviceFacts,
    candidates,
    marching,
    marching_cost,
    passes,
    plan_for,
    resident_forward,
    resident_geometry,
    rolling_geometry,
    tiled,
    tiled_backward,
    tiled_backward_cost,
    tiling_cost,
    whole_geometry,
)
from natcore.planning.tiling import Geometry as TiledGeometry
from natcore.problem import Call

Cut = tuple[Any, ...]  # how the map is cut: a geometry for each of a candidate's passes
Priced = tuple[float, Cut]  # the cost model's price (clocks) of it

#: Of the configs drawn at random: how much dearer than the cheapest one they may be.
DEAREST = 2.0


def chosen_cut(call: Call, facts: DeviceFacts, candidate: Candidate | None = None) -> Cut:
    """How the map of a call is cut by a candidate with geometries, by default the preferred one. KeyError for the
    general kernels."""
    return _CHOSEN[(candidate or candidates(call, facts)[0]).name](call, facts)


def spelled_out(call: Call, facts: DeviceFacts, candidate: Candidate | None = None) -> Config:
    """A candidate's choice for a call (by default, the preferred one's) as an explicit config; of a candidate
    without geometries, its name."""
    candidate = candidate or candidates(call, facts)[0]
    if candidate.name not in _CHOSEN:
        return Config(candidate.name)
    return _config(candidate, chosen_cut(call, facts, candidate))


def alternatives(call: Call, facts: DeviceFacts, cheapest: int, drawn: int, seed: int = 0) -> list[Config]:
    """Configs beside the planner's choice, which is not among them: the cheapest by the preferred candidate's own
    cost model, each with another cut of the map, some drawn at random from all others, and every other candidate
    that takes the call."""
    preferred, *others = candidates(call, facts)
    rest = [Config(candidate.name) for candidate in others]
    if preferred.name not in _PRICED:
        return rest
    priced = sorted(_PRICED[preferred.name](call, facts), key=lambda entry: entry[0])
    best: dict[tuple, Cut] = {}  # of each shape
    for _, cut in priced:
        best.setdefault(_shape(cut), cut)
    own = spelled_out(call, facts)
    first = [_config(preferred, cut) for cut in best.values()]
    first = [config for config in first if config != own][:cheapest]
    near = [_config(preferred, cut) for price, cut in priced if price <= DEAREST * priced[0][0]]
    near = [config for config in near if config != own and config not in first]
    return first + random.Random(seed).sample(near, min(drawn, len(near))) + rest


def compiled(
    call: Call, facts: DeviceFacts, configs: list[Config | None], deadline: float = inf
) -> list[Config | None]:
    """Those of the configs that can run the call, their kernels compiled into the disk cache; none is begun after
    the deadline (of time.monotonic). Needs no GPU."""
    able = []
    for config in configs:
        if time.monotonic() > deadline:
            break
        try:
            for launch in plan_for(call, facts, config).launches:
                compile_kernel(launch.kernel)
        except (ValueError, NotImplementedError, CompileError):
            continue
        able.append(config)
    return able


def _config(candidate: Candidate, cut: Cut) -> Config:
    """The options of a candidate by which it cuts the map so."""
    options = []
    for geometry in cut:
        prefix = passes.KEYS if getattr(geometry, "of", "") == "keys" else ""
        its = (name for name in candidate.options if name.startswith(passes.KEYS) == bool(prefix))
        options += [(name, _value(geometry, name.removeprefix(prefix))) for name in its]
    return Config(candidate.name, tuple(options))


def _value(geometry: Any, option: str) -> int:
    if option == "axes":
        return int("".join(str(axis) for axis in geometry.order if axis >= 0))
    if option[-1].isdigit():
        return getattr(geometry, option[:-1])[int(option[-1])]
    return int(getattr(geometry, option))


def _shape(cut: Cut) -> tuple:
    names = ("region", "order", "tile", "band", "tiles", "heads")
    return tuple(getattr(geometry, name, None) for geometry in cut for name in names)


def _tiled(call: Call, facts: DeviceFacts) -> Iterator[Priced]:
    """Every tile shape with every even division into regions: more than the planner looks at."""
    p, limit = call.problem, facts.shared_bytes_per_block
    for order, tile in product(tiling_cost.orders(p.window.rank), tiling_cost.TILES):
        if any(a < 0 and n > 1 for a, n in zip(order, tile, strict=True)):
            continue
        unit = TiledGeometry.of(p, order, tile, (1, 1, 1))
        if not tiling_cost.is_legal(unit):
            continue
        counts = [ceil(axis.lengths[0] / n) for axis, n in zip(unit.axes, tile, strict=True)]
        for region in product(*(sorted({ceil(n / parts) for parts in range(1, n + 1)}) for n in counts)):
            if prod(region) > tiling_cost.MAX_TILES or max(region) > tiling_cost.MAX_REGION:
                continue
            for g in tiling_cost.with_warps(TiledGeometry.of(p, order, tile, region)):
                if g.shared_bytes <= limit and tiling_cost.is_legal(g):
                    yield tiling_cost.cost(g, limit, facts.multiprocessors), (g,)


def _marching(call: Call, facts: DeviceFacts) -> Iterator[Priced]:
    """Of the backward, one pass varies while the other is the planner's."""
    chosen = _chosen_marching(call, facts)
    prices = [marching_cost.cost(g, facts) for g in chosen]
    for i, its in enumerate(chosen):
        for g in marching_cost.geometries(call.problem, facts, {}, its.of):
            yield sum(prices) - prices[i] + marching_cost.cost(g, facts), (*chosen[:i], g, *chosen[i + 1 :])


def _chosen_marching(call: Call, facts: DeviceFacts) -> Cut:
    return tuple(
        marching_cost.choose_geometry(call.problem, facts, {}, of) for of in marching.passes_of(call.direction)
    )


def _tiled_backward(call: Call, facts: DeviceFacts) -> Iterator[Priced]:
    """As `_marching`."""
    chosen = _chosen_tiled_backward(call, facts)
    prices = [tiled_backward_cost.cost(g, facts) for g in chosen]
    for i, its in enumerate(chosen):
        for g in tiled_backward_cost.geometries(call.problem, facts, {}, its.of):
            yield sum(prices) - prices[i] + tiled_backward_cost.cost(g, facts), (*chosen[:i], g, *chosen[i + 1 :])


def _chosen_tiled_backward(call: Call, facts: DeviceFacts) -> Cut:
    return tuple(tiled_backward_cost.choose_geometry(call.problem, facts, {}, of) for of in tiled_backward.PASSES)


def _whole(call: Call, facts: DeviceFacts) -> Iterator[Priced]:
    """Other launches, among which the cost model makes no difference."""
    for warps, heads, stages, blocks in product((4, 8, 16), (1, 2, 4, 8), (1, 2), (1, 2, 4)):
        options = {"warps": warps, "heads": heads, "stages": stages, "blocks_per_sm": blocks}
        g = whole_geometry.choose_geometry(call.problem, call.direction, facts, options)
        if g is not None and warps * stages * blocks >= 8:
            yield 1.0, (g,)


def _resident(call: Call, facts: DeviceFacts) -> Iterator[Priced]:
    """Phases and warps, among which the cost model makes no difference."""
    for at_once, warps in product((2, 4, 8), (8, 12, 16)):
        g = resident_geometry.choose_geometry(call.problem, facts, {"at_once": at_once, "warps": warps})
        if g is not None:
            yield 1.0, (g,)


def _resident_forward(call: Call, facts: DeviceFacts) -> Iterator[Priced]:
    """All launches: the cost model knows nothing of maps in flight."""
    for g in resident_forward.geometries(call.problem, facts, {}):
        yield 1.0, (g,)


def _rolling(call: Call, facts: DeviceFacts) -> Iterator[Priced]:
    """Bands on their way, of which the cost model knows little."""
    for g in rolling_geometry.geometries(call.problem, facts, {}):
        yield 1.0, (g,)


_PRICED: dict[str, Callable[[Call, DeviceFacts], Iterator[Priced]]] = {
    "tiled": _tiled,
    "marching": _marching,
    "whole": _whole,
    "resident": _resident,
    "resident_forward": _resident_forward,
    "rolling": _rolling,
    "tiled_backward": _tiled_backward,
}
_CHOSEN: dict[str, Callable[[Call, DeviceFacts], Cut]] = {
    "whole": lambda call, facts: (whole_geometry.choose_geometry(call.problem, call.direction, facts, {}),),
    "resident": lambda call, facts: (resident_geometry.choose_geometry(call.problem, facts, {}),),
    "resident_forward": lambda call, facts: (resident_forward.choose_geometry(call.problem, facts, {}),),
    "rolling": lambda call, facts: (rolling_geometry.choose_geometry(call.problem, facts, {}),),
    "tiled": lambda call, facts: (tiled.configured(call, facts, {}),),
    "marching": _chosen_marching,
    "tiled_backward": _chosen_tiled_backward,
}
