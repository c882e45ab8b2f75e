"""The kernels of whole maps (at most 64 tokens) against the reference, over ugly cases, launches and random problems.

The geometry tests need no GPU; tests/test_host_whole.py runs the kernels without one.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import ceil, prod

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from natcore.planning import Config, candidates, plan_for, refusal, whole
from natcore.planning.listed import contiguous_call
from natcore.planning.whole_geometry import MAX_TILES, axes_of, choose_geometry, tile_for, tiles_of
from natcore.problem import Call, Direction, Problem, Window
from tests.cases import CASES, PLAIN, WIDE, Case, fitting, problem_for, random_case
from tests.test_fast_backward import DTYPES, FACTS, Run, backward
from tests.test_fast_forward import forward, repeat

DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")
OWN = [
    Case("stage", (7, 7), 7, batch=5, heads=2, heads_kv=2, **WIDE),
    Case("packed", (7, 7), 7, batch=3, heads=4, heads_kv=4, packed=True, **WIDE),
    Case("rounds", (7, 7), 7, batch=43, heads=8, heads_kv=8, **WIDE),
    Case("three_heads", (7, 6), (7, 6), batch=2, heads=3, heads_kv=3, rpb="same", **PLAIN),
    Case("grouped", (7, 7), 7, batch=2, heads=4, heads_kv=2, **PLAIN),
    Case("kernel_3", (7, 7), 3, batch=2, **WIDE),
    Case("eight_by_eight", (8, 8), (7, 4), rpb="same", **PLAIN),
    Case("full_eight", (8, 8), 8, stride=3, **WIDE),
    Case("ragged_groups", (13, 15), (5, 7), dilation=2, heads=2, heads_kv=2, batch=2, **WIDE),
    Case("full_groups", (14, 14), 7, dilation=2, heads=2, heads_kv=2, batch=2, **WIDE),
    Case("cube", (4, 4, 4), (3, 2, 4), rpb="float32", **PLAIN),
    Case("full_cube", (2, 4, 6), (2, 4, 6), rpb="float32", **PLAIN),
    Case("line", (61,), 31, rpb="float32", **PLAIN),
    Case("full_line", (16,), 16, rpb="float32", **PLAIN),
    Case("square_tiles", (4, 12), (4, 5), is_causal=(True, False), rpb="float32", **PLAIN),
    Case("columns", (7, 3), (7, 3), batch=2, rpb="float32", **PLAIN),
    Case("causal_strides", (6, 7), (5, 6), stride=(2, 3), is_causal=(True, False), batch=2, rpb="float32", **PLAIN),
    Case("one_token", (1,), 1, rpb="float32"),
    Case("unequal_head_dims", (5, 6), (5, 6), head_dim=8, head_dim_v=32, rpb="float32"),
    Case("unequal_teams", (6, 7), (6, 7), heads=4, heads_kv=4, head_dim=16, head_dim_v=24, batch=3, rpb="float32"),
    Case("longer_queries", (7, 5), (7, 5), head_dim=32, head_dim_v=24, rpb="float32"),
    Case("long_rows", (2, 8), (2, 5), head_dim=80, head_dim_v=96, rpb="float32"),
    Case("outliers", (7, 7), 7, outliers=True, batch=2, **WIDE),
    Case("scale_zero", (7, 7), 7, scale=0.0, **WIDE),
    Case("scale_negative", (7, 7), 7, scale=-0.7, **WIDE),
    Case("scale_tiny", (7, 7), 5, scale=1e-6, **WIDE),
]
BY_NAME = {case.name: case for case in OWN}
EVERY = [*OWN, *(fitting(case) for case in CASES if case.name not in BY_NAME)]
#: Launches other than the planner's, where they fit a case.
OPTIONS: dict[str, dict[str, int]] = {
    "one warp": {"warps": 1, "heads": 1, "blocks_per_sm": 1},
    "two stages": {"warps": 4, "heads": 1, "stages": 2, "blocks_per_sm": 1},
    "three stages": {"warps": 2, "heads": 1, "stages": 3, "blocks_per_sm": 1},
    "heads side by side": {"warps": 8, "heads": 4, "blocks_per_sm": 1},
}


def call_for(direction: Direction, case: Case, dtype: str = "float16") -> Call:
    return contiguous_call(direction, problem_for(case, dtype))


def able(direction: Direction, case: Case) -> bool:
    return case.batch > 0 and refusal(whole.CANDIDATE, call_for(direction, case), FACTS) is None


FORWARD, BACKWARD = ([case for case in EVERY if able(direction, case)] for direction in DIRECTIONS)


def test_cases_are_many() -> None:
    assert len(FORWARD) >= 16 and len(BACKWARD) >= 28
    own = {case.name for case in OWN}
    assert own <= {case.name for case in FORWARD + BACKWARD}
    for name, options in OPTIONS.items():
        for direction, cases in zip(DIRECTIONS, (FORWARD, BACKWARD), strict=True):
            fits = [choose_geometry(problem_for(case, "float16"), direction, FACTS, options) for case in cases]
            assert any(fits), (direction, name)


# ---- geometry ----


def test_tiles_cover_every_map_with_the_fewest() -> None:
    shapes = [t for t in product((1, 2, 4, 8), repeat=3) if prod(t) == 8]
    for spatial in [(7, 7), (8, 8), (4, 16), (16, 4), (5, 5), (10, 6), (64,), (65,), (4, 4, 4), (2, 5, 6), (9, 7)]:
        problem = Problem(Window.of(len(spatial), 1), 1, spatial, 1, 1, 32, 32, 0, "float16", None)
        least = min(prod(tiles_of(axes_of(problem), shape)) for shape in shapes)
        tile = tile_for(problem)
        assert (tile is None) == (least > MAX_TILES), spatial
        assert tile is None or prod(tiles_of(axes_of(problem), tile)) == least


@pytest.mark.parametrize("case", BACKWARD, ids=lambda case: case.name)
def test_blocks_share_the_batch_out(case: Case) -> None:
    """Every map has a warp, shared memory suffices, and blocks differ by at most one round."""
    for direction, batch in product(DIRECTIONS, (1, 7, 128, 1000)):
        problem = problem_for(replace(case, batch=batch), "float16")
        g = choose_geometry(problem, direction, FACTS, {})
        assert g is not None and g.shared_bytes <= FACTS.shared_bytes_per_block
        at_once, slices = g.at_once, g.slices(FACTS)
        assert at_once * g.heads * g.split == g.warps
        assert problem.heads % g.heads == 0 and 1 <= slices <= ceil(batch / at_once)
        rounds = ceil(batch / (at_once * slices))
        assert (rounds - 1) * at_once * slices < batch


def test_all_see_all_only_where_they_do() -> None:
    full = {
        case.name
        for case in OWN
        if (g := choose_geometry(problem_for(case, "float16"), "forward", FACTS, {})) and g.full
    }
    others = {
        "kernel_3",
        "eight_by_eight",
        "ragged_groups",
        "cube",
        "line",
        "square_tiles",
        "causal_strides",
        "scale_tiny",
        "long_rows",
    }
    assert full == set(BY_NAME) - others


def test_planner_prefers_it() -> None:
    """The fourth stage of NAT-Tiny in both directions, and every backward that it takes."""
    nat = Problem(Window.of(2, 7), 128, (7, 7), 16, 16, 32, 32, 0, "float16", "float32")
    for direction, batch in product(DIRECTIONS, (1, 128, 1024)):
        assert candidates(contiguous_call(direction, replace(nat, batch=batch)), FACTS)[0].name == "whole"
    for case in BACKWARD:
        assert candidates(call_for("backward", case), FACTS)[0].name == "whole", case.name


REFUSED = [
    ("forward", Case("partial", (7, 7), 5, **WIDE), "for the tiled kernel"),
    ("forward", Case("long_rows", (7, 7), 7, head_dim=40, head_dim_v=32), "beyond 32"),
    ("forward", Case("many_tokens", (9, 8), (9, 8), **WIDE), "more than 8 tiles"),
    ("backward", Case("many_tokens", (9, 8), 7, **WIDE), "more than 8 tiles"),
    ("backward", Case("long_rows", (7, 7), 7, head_dim=64, head_dim_v=64), "256 registers"),
    ("backward", Case("grouped", (7, 7), 7, heads=2, heads_kv=1, **WIDE), "grouped heads"),
    ("backward", Case("extra", (7, 7), 7, extra=1, **WIDE), "additional keys"),
]


@pytest.mark.parametrize(("direction", "case", "reason"), REFUSED, ids=lambda value: getattr(value, "name", None))
def test_refusals(direction: Direction, case: Case, reason: str) -> None:
    with pytest.raises(NotImplementedError, match=reason):
        plan_for(call_for(direction, case), FACTS, Config("whole"))


def test_heads_that_lie_apart_are_copied_one_by_one() -> None:
    call = call_for("forward", BY_NAME["packed"])
    assert dict(plan_for(call, FACTS, Config("whole")).launches[0].kernel.defines)["HEADS"] == "2"
    strides = list(call.strides)
    strides[1] = (7 * 7 * 4 * 40, 7 * 4 * 40, 4 * 40, 40, 1)
    apart = replace(call, strides=tuple(strides))
    assert dict(plan_for(apart, FACTS, Config("whole")).launches[0].kernel.defines)["HEADS"] == "1"
    with pytest.raises(ValueError, match="heads 2"):
        plan_for(apart, FACTS, Config("whole", (("heads", 2),)))


def test_small_problems_are_spread_out() -> None:
    """No multiprocessor has two teams' maps while another one has none."""
    nat = Problem(Window.of(2, 7), 1, (7, 7), 16, 16, 32, 32, 0, "float16", "float32")
    for batch, teams, stages in ((1, 1, 1), (16, 1, 1), (17, 2, 1), (128, 4, 2), (1024, 4, 2)):
        g = choose_geometry(replace(nat, batch=batch), "forward", FACTS, {})
        assert g is not None and (g.at_once, g.stages, g.heads, g.split) == (teams, stages, 2, 2), batch


def test_far_strides_are_refused() -> None:
    call = call_for("forward", BY_NAME["stage"])
    strides = list(call.strides)
    strides[0] = (1 << 30, 1 << 24, 64, 32, 1)
    assert "beyond" in str(refusal(whole.CANDIDATE, replace(call, strides=tuple(strides)), FACTS))


def test_workspace_is_small() -> None:
    """The partial sums of drpb, and nothing else."""
    nat = Problem(Window.of(2, 7), 128, (7, 7), 16, 16, 32, 32, 0, "float16", "float32")
    assert 0 < plan_for(contiguous_call("backward", nat), FACTS, Config("whole")).workspace_bytes <= 1 << 20
    assert plan_for(contiguous_call("forward", nat), FACTS, Config("whole")).workspace_bytes == 0


# ---- on a GPU ----


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", FORWARD, ids=lambda case: case.name)
def test_forward(case: Case, dtype: str) -> None:
    forward(case, dtype, Config("whole"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", BACKWARD, ids=lambda case: case.name)
def test_backward(case: Case, dtype: str) -> None:
    backward(case, dtype, Config("whole"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_other_launches(direction: Direction, name: str) -> None:
    for case in FORWARD if direction == "forward" else BACKWARD:
        if choose_geometry(problem_for(case, "float16"), direction, FACTS, OPTIONS[name]) is None:
            continue
        run = forward if direction == "forward" else backward
        run(replace(case, batch=5), "float16", Config("whole", tuple(OPTIONS[name].items())))


@pytest.mark.gpu
def test_without_d_lse() -> None:
    backward(BY_NAME["stage"], "bfloat16", Config("whole"), with_d_lse=False)


SMALL = random_case(64).map(lambda case: fitting(replace(case, extra=0)))


@pytest.mark.gpu
@seed(21)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(case=SMALL, dtype=st.sampled_from(DTYPES))
def test_random_problems(case: Case, dtype: str) -> None:
    """Of the forward, the same maps with windows as large as they are."""
    if able("backward", case):
        backward(case, dtype, Config("whole"))
    kernel = tuple(n // d for n, d in zip(case.spatial, case.window.dilation, strict=True))
    spatial = tuple(n * d for n, d in zip(kernel, case.window.dilation, strict=True))
    full = replace(case, spatial=spatial, kernel_size=kernel, stride=1, is_causal=False)
    if able("forward", full):
        forward(full, dtype, Config("whole"), seed=3)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["rounds", "ragged_groups", "cube"])
def test_bitwise_equal_over_1000_runs(name: str) -> None:
    Run(BY_NAME[name], "bfloat16", Config("whole")).repeat(1000)


@pytest.mark.gpu
def test_forward_repeats_are_bitwise_equal() -> None:
    repeat(BY_NAME["rounds"], "float16", Config("whole"), 50)
