"""The tiled backward kernels against the reference, over the ugly cases and geometries of all shapes.

The geometry tests need no GPU. tests/test_fast_random.py has random problems of its own, and
tests/test_host_tiled_backward.py runs the kernels without a GPU.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import product
from math import prod
from pathlib import Path

import pytest

from natcore.planning import Config, plan_for, refusal, tiled_backward
from natcore.planning.axis import Axis, intervals
from natcore.planning.plan import DeviceFacts
from natcore.planning.tiled_backward_cost import choose_geometry
from natcore.planning.tiled_backward_geometry import PASSES, Geometry, Pass
from natcore.planning.tiling import first_query
from tests import host, test_marching_backward
from tests.cases import CASES as EVERY
from tests.cases import PLAIN, WIDE, Case, fitting, problem_for
from tests.test_fast_backward import DTYPES, FACTS, MORE, Run, backward, call_for, of_passes

OWN = [
    Case("video_7", (5, 17, 18), (3, 7, 7), head_dim=64, head_dim_v=64, rpb="float32", batch=2),
    Case("video_cube", (6, 13, 12), 5, heads=2, heads_kv=2, head_dim=64, head_dim_v=64, rpb="same"),
    Case("video_strides", (7, 11, 10), (4, 5, 3), stride=(2, 1, 3), dilation=(1, 2, 1), **WIDE),
    Case("video_plain", (4, 16, 16), (3, 5, 5), batch=2, heads=2, heads_kv=2, **PLAIN),
    Case("line_63", (1000,), 63, batch=2, heads=2, heads_kv=2, **WIDE),
    Case("line_causal", (601,), 63, is_causal=True, heads=2, heads_kv=2, head_dim=64, head_dim_v=64, rpb="float32"),
    Case("line_strides", (333,), 17, stride=5, dilation=2, batch=2, **WIDE),
    Case("line_without_bias", (300,), 31, head_dim=64, head_dim_v=64),
    Case("grouped", (19, 23), 7, heads=8, heads_kv=2, batch=2, **WIDE),
    Case("grouped_video", (3, 9, 9), 3, heads=6, heads_kv=2, head_dim=24, head_dim_v=40, rpb="same"),
    Case("grouped_line", (130,), 9, heads=4, heads_kv=1, head_dim=64, head_dim_v=32),
    Case("large_14", (32, 31), 14, batch=3, **WIDE),
    Case("large_causal", (30, 21), (13, 15), is_causal=(True, False), **WIDE),
    Case("long_head_dims", (16, 17), 9, head_dim=128, head_dim_v=128, rpb="float32"),
    Case("packed", (20, 25), (3, 13), heads=2, heads_kv=2, packed=True, batch=2, **WIDE),
]


def able(case: Case, dtype: str = "float16") -> bool:
    return refusal(tiled_backward.CANDIDATE, call_for(case, dtype), FACTS) is None


_DISTINCT = {case.name: case for case in [*map(fitting, EVERY), *MORE, *test_marching_backward.OWN, *OWN]}
CASES = [case for case in _DISTINCT.values() if able(case)]
OPTIONS = {
    "one warp": {"region0": 1, "region1": 1, "blocks_per_sm": 1},
    "two planes": {"region0": 1, "region1": 3, "blocks_per_sm": 1, "stages": 2},
    "one plane": {"region0": 2, "region1": 1, "blocks_per_sm": 2, "stages": 1},
    "squares": {"columns": 4},
    "two rows": {"columns": 8},
    "one row": {"columns": 16},
    "axes otherwise": {"ordering": 1},
}


def geometry_for(case: Case, of: Pass, options: dict[str, int], facts: DeviceFacts = FACTS) -> Geometry | None:
    return choose_geometry(problem_for(case, "float16"), facts, options, of)


def configured(case: Case, options: dict[str, int], facts: DeviceFacts = FACTS) -> Config:
    """Each pass with the options, where they fit it."""
    return of_passes("tiled_backward", options, lambda of: geometry_for(case, of, options, facts) is not None)


PAIRS = [
    (case, name)
    for case in CASES
    for name, options in OPTIONS.items()
    if any(geometry_for(case, of, options) is not None for of in PASSES)
]


def test_cases_are_many() -> None:
    """The kernels take all cases of this file and all other small windows; each option set fits both passes of some."""
    assert {case.name for case in OWN} <= {case.name for case in CASES} and len(CASES) >= 60
    for of, (name, options) in product(PASSES, OPTIONS.items()):
        assert any(geometry_for(case, of, options) for case in CASES), (of, name)


# ---- geometry ----


def check_axis(g: Geometry, a: int) -> None:
    """On axis 1 or 2 every token is stored once, by a tile whose box holds all that it sees, in shared memory."""
    axis, tile, region = g.axes[a], g.tile[a - 1], g.region[a - 1]
    unit = (g.step_rows, 16 // g.step_rows)[a - 1]
    in_lines = (a == 2) == (g.step_rows == 2)  # whether units of the axis are lines, or steps
    for length in axis.lengths:
        seen, stored = intervals(axis, length)[g.own_keys], Counter()
        for number in range(-(-length // tile)):
            first = first_query(length, tile, number)
            end = min(first + tile, length)
            stored.update(range(max(first, number * tile), end))
            low, high = seen[first][0], seen[end - 1][1]
            units = -(-(high - low) // unit)
            assert all(low <= seen[x][0] and seen[x][1] <= high for x in range(first, end))
            assert units <= (g.lines if in_lines else g.steps)
            start = seen[first_query(length, tile, number // region * region)][0]
            assert low >= start and low - start + units * unit <= g.span[a - 1], (g, length, number)
            check_differences(g, a, range(first, first + tile), range(low, low + units * unit))
            if plain(axis, g.own_keys, first, tile, length):
                check_plain(axis, g.own_keys, range(first, first + tile), range(low, low + units * unit), length)
        assert stored == Counter(range(length)), (g, length)


def plain(axis: Axis, own_keys: bool, first: int, tile: int, length: int) -> bool:
    """As struct Tile of common/tiled_boxes.cuh has it."""
    last = first + tile - 1
    if tile == 1 or axis.stride > 1 or last >= length:
        return False
    if own_keys:
        return last + axis.kernel <= length if axis.causal else axis.kernel <= first and last < length - axis.kernel
    return axis.causal or (first >= axis.kernel // 2 and last - axis.kernel // 2 + axis.kernel <= length)


def check_plain(axis: Axis, own_keys: bool, own: range, seen: range, length: int) -> None:
    """Of a plain tile, the table's mask is what the windows say, for all places of the box."""
    first = -(axis.kernel - 1) if axis.causal else -(axis.kernel // 2)
    keys, queries = intervals(axis, length)
    for x, y in product(own, seen):
        difference = x - y if own_keys else y - x
        start, end = (queries if own_keys else keys)[x]
        assert (start <= y < end) == (first <= difference < first + axis.kernel), (axis, own_keys, x, y)


def check_differences(g: Geometry, a: int, own: range, seen: range) -> None:
    """The table has an entry for every difference in a box."""
    found = [seen[0] - own[-1], seen[-1] - own[0]]
    if g.own_keys:
        found = [-difference for difference in found]
    r = g.reaches[a]
    assert r.least <= min(found) and max(found) <= r.greatest and r.greatest - r.least < g.differences[a]


@pytest.mark.parametrize("of", PASSES)
@pytest.mark.parametrize("options", [{}, *OPTIONS.values()], ids=["chosen", *OPTIONS])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_geometry_covers_every_pair(case: Case, options: dict[str, int], of: Pass) -> None:
    g = geometry_for(case, of, options)
    if g is None:
        pytest.skip("the case does not fit the options")
    assert g.of == of and g.is_legal and g.shared_bytes <= FACTS.shared_bytes_per_block
    names = {"region0": g.region[0], "region1": g.region[1], "columns": g.columns, "ordering": g.ordering}
    names |= {"stages": g.stages, "blocks_per_sm": g.blocks_per_sm}
    assert all(names[name] == value for name, value in options.items())
    for a in (1, 2):
        check_axis(g, a)
    for length in g.axes[0].lengths:
        seen = intervals(g.axes[0], length)[g.own_keys]
        assert max(end - start for start, end in seen) <= g.reaches[0].box
        for x, (start, end) in enumerate(seen):
            check_differences(g, 0, range(x, x + 1), range(start, end))


def test_long_axes_are_cut_alike() -> None:
    """Of a very long axis only a part is looked at, with the same result."""
    for kernel, stride, causal in ((63, 1, False), (17, 5, False), (64, 3, True)):
        case = Case("line", (9001,), kernel, stride=stride, is_causal=causal, **PLAIN)
        for of in PASSES:
            g = geometry_for(case, of, {})
            assert g is not None
            check_axis(g, 2)


def test_the_kernels_count_their_shared_memory_alike(tmp_path: Path) -> None:
    """Geometry.shared_bytes is SHARED_BYTES of common/tiled_boxes.cuh, for one geometry of each kind."""
    if host.COMPILER is None:
        pytest.skip("needs a C++ compiler")
    found: dict[tuple, Geometry] = {}
    for case, options, of in product(CASES, ({}, OPTIONS["two planes"]), PASSES):
        g = geometry_for(case, of, options)
        if g is not None:
            found.setdefault((of, g.tile, g.stages, g.biased, g.seen_heads > 1, g.pitches), g)
    for case, of in product((OWN[0], OWN[4], OWN[9]), PASSES):
        g = choose_geometry(problem_for(case, "float32"), FACTS, {}, of)
        assert g is not None
        found.setdefault((of, g.pitches), g)
    assert len(found) >= 20
    for g in [*list(found.values())[:-6:2], *list(found.values())[-6:]]:
        library = host.build("boxes.cc", tmp_path, dict(g.defines))
        assert library.shared_bytes() == g.shared_bytes, g


@pytest.mark.parametrize(
    ("case", "change", "reason"),
    [
        (Case("large", (200, 200), 101, rpb="float32"), {}, r"\(101, 101\)"),
        (Case("long", (8000,), 3001), {"head_dim": 128, "head_dim_v": 128}, r"\(3001,\)"),
        (Case("more", (40, 40), 7), {"extra": 2}, "additional keys"),
        (Case("wide", (40, 40), 7), {"head_dim": 136}, "head_dim 136"),
        (Case("odd", (40, 40), 7), {"head_dim_v": 12}, "head_dim_v 12"),
        (Case("double", (40, 40), 7), {"dtype": "float64"}, "float32, float16 and bfloat16"),
        (Case("wide_single", (40, 40), 7), {"dtype": "float32", "head_dim": 128, "head_dim_v": 72}, "beyond 192"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_refusals(case: Case, change: dict, reason: str) -> None:
    """What the kernels do not take, they say, with the numbers."""
    call = call_for(fitting(case))
    call = replace(call, problem=replace(call.problem, **change))
    with pytest.raises(NotImplementedError, match=reason):
        plan_for(call, FACTS, Config("tiled_backward"))


def test_far_strides_are_refused() -> None:
    call = call_for(Case("map", (40, 40), 7, **WIDE))
    index = call.operands.index("k")
    strides = [*call.strides]
    strides[index] = (1 << 33, 1 << 30, 1 << 24, 32, 1)
    with pytest.raises(NotImplementedError, match="beyond 32 bits"):
        plan_for(replace(call, strides=tuple(strides)), FACTS, Config("tiled_backward"))


@pytest.mark.parametrize(
    "options",
    [{"stages": 3}, {"keys_stages": 0}, {"columns": 5}, {"region0": 40}, {"keys_ordering": 9}, {"blocks_per_sm": 0}],
    ids=str,
)
def test_options_that_do_not_fit_are_an_error(options: dict[str, int]) -> None:
    of = "keys" if next(iter(options)).startswith("keys_") else "queries"
    with pytest.raises(ValueError, match=f"no geometry of {of}"):
        plan_for(call_for(CASES[0]), FACTS, Config("tiled_backward", tuple(options.items())))


def test_workspace_is_small() -> None:
    """At most one tensor of q's size plus 16 MiB: 8 bytes a query and head, and partial sums of drpb."""
    for spatial, kernel, d in (((56, 56), 15, 32), ((16, 56, 56), (3, 7, 7), 64), ((8192,), 127, 64)):
        case = Case("row", spatial, kernel, heads=4, heads_kv=4, batch=4, head_dim=d, head_dim_v=d, rpb="float32")
        plan = plan_for(call_for(case), FACTS, Config("tiled_backward"))
        queries = 4 * prod(spatial) * 4
        assert 8 * queries <= plan.workspace_bytes <= 2 * d * queries + (16 << 20)


# ---- on a GPU ----


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*DTYPES, "float32"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cases(case: Case, dtype: str) -> None:
    if not able(case, dtype):
        pytest.skip("the case does not fit the dtype")
    backward(case, dtype, Config("tiled_backward"), saved_out=True)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [c for c in CASES if c.head_dim == c.head_dim_v and c.heads == c.heads_kv][::3],
    ids=lambda case: case.name,
)
def test_otherwise_packed_and_without_d_lse(case: Case) -> None:
    """Separate operands where `test_cases` has packed ones, and the other way round."""
    backward(
        replace(case, packed=not case.packed), "float16", Config("tiled_backward"), with_d_lse=False, saved_out=True
    )


@pytest.mark.gpu
@pytest.mark.parametrize(("case", "name"), PAIRS[::7], ids=lambda value: getattr(value, "name", value))
def test_other_geometries(case: Case, name: str) -> None:
    backward(case, "bfloat16", configured(case, OPTIONS[name]), saved_out=True)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["video_7", "line_63", "grouped", "large_14"])
def test_bitwise_equal_over_1000_runs(name: str) -> None:
    Run(next(case for case in CASES if case.name == name), "bfloat16", Config("tiled_backward")).repeat(1000)
