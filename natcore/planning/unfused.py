"""Plans for unfused attention (see natcore.unfused) by the general kernels.

Four gathers do all of it: products of a query with its keys (general_qk), sums over a query's places
(general_av), over the queries that see a key (general_av_key, general_av_additional), and over the
pairs that share an entry of the bias table (general_qk_bias).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from math import ceil, inf, prod

from natcore.planning.build import SPAN, Build, Space, slices_of, sum_partials
from natcore.planning.plan import Constant, Launch, Param, Plan, Scale, Workspace
from natcore.problem import RESULTS, Direction


def _number(build: Build, value: float) -> Constant:
    return Constant(struct.pack("=d" if build.accumulator == "float64" else "=f", value))


def _scale(build: Build) -> Param:
    """Scores have a scale, weighted sums have none."""
    return Scale(build.accumulator) if build.call.direction.startswith("qk") else _number(build, 1.0)


def _products(
    build: Build, rows: str, keys: str, rpb: str | None, additional: str, places: str, empty: float
) -> Launch:
    """places = scale * rows . keys + rpb, and ``empty`` where there is no key."""
    layouts = (rows, keys, *([rpb] if rpb else [None]), additional, places)
    pointers = [Constant(bytes(8)) if name is None else name for name in layouts]
    fill = _number(build, empty)
    grid = build.blocks(build.items(build.problem.heads))
    return build.launch("general_qk", grid, pointers, _scale(build), fill, build.params(layouts))


def _sums(build: Build, places: str, keys: str, additional: str, result: str) -> Launch:
    """result [queries] = scale * sum over places of places * keys."""
    layouts = (places, keys, additional, result)
    grid = build.blocks(build.items(build.problem.heads))
    return build.launch("general_av", grid, layouts, _scale(build), build.params(layouts))


def _sums_by_key(build: Build, places: str, rows: str, result: str) -> Launch:
    """result [keys] = scale * sum over the queries that see the key of places * rows."""
    layouts = (places, rows, result)
    grid = build.blocks(build.items(build.problem.heads_kv))
    return build.launch("general_av_key", grid, layouts, _scale(build), build.params(layouts))


def _sums_by_additional_key(build: Build, space: Space, places: str, rows: str, result: str) -> tuple[Launch, ...]:
    problem = build.problem
    sums = problem.batch * problem.extra * problem.heads_kv
    slices = slices_of(build, prod(problem.spatial) * problem.heads // problem.heads_kv, sums)
    partials = space.take(slices * prod(problem.shapes[result]), build.accumulator)
    params = build.params((places, rows), slices)
    pointers = (places, rows, partials)
    first = build.launch("general_av_additional", (sums * slices, 1, 1), pointers, _scale(build), params)
    return (first, *sum_partials(build, result, partials, slices))


def _sums_by_entry(build: Build, space: Space) -> tuple[Launch, ...]:
    """drpb from d_scores."""
    *rows, row_length = build.problem.shapes["rpb"]
    blocks = prod(rows) * ceil(row_length / SPAN)
    slices = slices_of(build, build.items(1), blocks)
    partials = space.take(slices * prod(build.problem.shapes["rpb"]), build.accumulator)
    params = build.params(("d_scores",), slices)
    first = build.launch("general_qk_bias", (blocks * slices, 1, 1), ("d_scores", partials), params)
    return (first, *sum_partials(build, "drpb", partials, slices))


def _wanted(build: Build) -> set[str]:
    call = build.call
    given = zip(call.operands, call.strides, strict=True)
    return {name for name, strides in given if strides is not None and name in RESULTS[call.direction]}


def _qk(build: Build) -> Plan:
    if build.problem.batch == 0:
        return Plan((), 0)
    return Plan((_products(build, "q", "k", "rpb", "additional_keys", "scores", -inf),), 0)


def _qk_backward(build: Build) -> Plan:
    wanted, space, launches = _wanted(build), Space(), []
    if build.problem.batch == 0:
        return Plan(sum_partials(build, "drpb", Workspace(0), 0) if "drpb" in wanted else (), 0)
    if "dq" in wanted:
        launches.append(_sums(build, "d_scores", "k", "additional_keys", "dq"))
    if "dk" in wanted:
        launches.append(_sums_by_key(build, "d_scores", "q", "dk"))
    if "drpb" in wanted:
        launches += _sums_by_entry(build, space)
    if "d_additional_keys" in wanted:
        launches += _sums_by_additional_key(build, space, "d_scores", "q", "d_additional_keys")
    return Plan(tuple(launches), space.bytes)


def _av(build: Build) -> Plan:
    if build.problem.batch == 0:
        return Plan((), 0)
    return Plan((_sums(build, "weights", "v", "additional_values", "out"),), 0)


def _av_backward(build: Build) -> Plan:
    wanted, space, launches = _wanted(build), Space(), []
    if build.problem.batch == 0:
        return Plan((), 0)
    if "d_weights" in wanted:
        launches.append(_products(build, "d_out", "v", None, "additional_values", "d_weights", 0.0))
    if "dv" in wanted:
        launches.append(_sums_by_key(build, "weights", "d_out", "dv"))
    if "d_additional_values" in wanted:
        launches += _sums_by_additional_key(build, space, "weights", "d_out", "d_additional_values")
    return Plan(tuple(launches), space.bytes)


#: By direction.
PLANS: dict[Direction, Callable[[Build], Plan]] = {
    "qk": _qk,
    "qk_backward": _qk_backward,
    "av": _av,
    "av_backward": _av_backward,
}
