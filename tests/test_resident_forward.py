"""The forward of maps that fit into a block's shared memory against the reference: ugly cases, launches, random cases.

The geometry tests need no GPU; tests/test_host_resident_forward.py runs the kernel without one.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import ceil

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from natcore.planning import Config, candidates, plan_for, refusal, resident_forward
from natcore.planning.listed import contiguous_call
from natcore.planning.resident_forward import choose_geometry
from natcore.planning.resident_geometry import BAND, BLOCK_ROWS
from natcore.problem import Call, Problem, Window
from tests import test_fast_forward
from tests.cases import CASES, Case, check, inputs, random_case
from tests.test_fast_backward import DTYPES, FACTS, fitting, problem_for

WIDE = {"head_dim": 32, "head_dim_v": 32, "rpb": "float32"}
PLAIN = {"head_dim": 16, "head_dim_v": 24}
OWN = [
    Case("stage", (14, 14), 7, batch=3, heads=2, heads_kv=2, **WIDE),
    Case("packed", (14, 14), 7, batch=3, heads=2, heads_kv=2, packed=True, **WIDE),
    Case("rounds", (14, 14), 7, batch=85, heads=8, heads_kv=8, **WIDE),
    Case("odd_extents", (13, 15), 7, batch=2, **WIDE),
    Case("full_block", (16, 16), 7, heads=2, heads_kv=2, rpb="same", **PLAIN),
    Case("kernel_is_extent", (7, 7), 7, batch=2, **WIDE),
    Case("wide_kernel", (12, 12), (7, 12), batch=2, **WIDE),
    Case("even_kernel", (12, 10), (6, 4), rpb="same", **PLAIN),
    Case("kernel_3", (14, 14), 3, batch=2, **WIDE),
    Case("ragged_groups", (29, 31), 7, dilation=(3, 2), heads=2, heads_kv=2, **WIDE),
    Case("dilated", (28, 28), 7, dilation=2, batch=2, **WIDE),
    Case("causal_strides", (11, 13), (6, 5), stride=(2, 3), is_causal=(True, False), batch=2, **WIDE),
    Case("causal_columns", (16, 9), 5, is_causal=(False, True), rpb="float32", **PLAIN),
    Case("one_row", (1, 16), (1, 9), rpb="float32", **PLAIN),
    Case("one_column", (16, 1), (7, 1), rpb="float32", **PLAIN),
    Case("no_bias", (14, 14), 7, batch=2, head_dim=32, head_dim_v=32),
    Case("grouped", (14, 14), 7, heads=4, heads_kv=2, batch=2, **WIDE),
    Case("unequal_head_dims", (10, 11), 5, head_dim=8, head_dim_v=32, rpb="float32"),
    Case("shorter_values", (9, 14), 5, head_dim=24, head_dim_v=8, rpb="float32"),
    Case("outliers", (14, 14), 7, outliers=True, batch=2, **WIDE),
    Case("scale_zero", (14, 14), 7, scale=0.0, **WIDE),
    Case("scale_negative", (14, 14), 7, scale=-0.7, **WIDE),
    Case("scale_tiny", (14, 14), 5, scale=1e-6, **WIDE),
]
BY_NAME = {case.name: case for case in OWN}
EVERY = [*OWN, *(fitting(case) for case in CASES if case.name not in BY_NAME)]
#: Launches other than the planner's, where they fit a case.
OPTIONS: dict[str, dict[str, int]] = {
    "two maps": {"stages": 2},
    "two blocks": {"stages": 4, "blocks_per_sm": 2},
    "five maps": {"stages": 5},
    "no warps that only copy": {"warps": 10, "stages": 2},
    "warps that only copy": {"warps": 12, "stages": 2},
}


def call_for(case: Case, dtype: str = "float16") -> Call:
    return contiguous_call("forward", problem_for(case, dtype))


def able(case: Case) -> bool:
    return case.batch > 0 and refusal(resident_forward.CANDIDATE, call_for(case), FACTS) is None


ABLE = [case for case in EVERY if able(case)]
NAT = Problem(Window.of(2, 7), 128, (14, 14), 8, 8, 32, 32, 0, "float16", "float32")


def test_cases_are_many() -> None:
    assert len(ABLE) >= 30 and {case.name for case in OWN} <= {case.name for case in ABLE}
    for name, options in OPTIONS.items():
        assert any(choose_geometry(problem_for(case, "float16"), FACTS, options) for case in ABLE), name


# ---- geometry ----


@pytest.mark.parametrize("case", ABLE, ids=lambda case: case.name)
def test_half_bands_hold_all_that_is_seen(case: Case) -> None:
    """Each query's keys are in its half band's columns, and in the 8 rows from where its band's start."""
    g = choose_geometry(problem_for(case, "float16"), FACTS, {})
    assert g is not None and g.shared_bytes <= FACTS.shared_bytes_per_block
    rows, columns = g.axes
    width, stored = ceil(g.columns / g.halves), ceil(g.columns / 2) * 2
    assert width <= 8
    for length in columns.lengths:
        for query in range(length):
            first = min(columns.keys(query // width * width, length)[0], stored - g.seen)
            assert 0 <= first <= columns.keys(query, length)[0] and columns.keys(query, length)[1] <= first + g.seen
    for length in rows.lengths:
        for query in range(length):
            band = rows.keys(query // BAND * BAND, length)[0]
            assert band <= rows.keys(query, length)[0] and rows.keys(query, length)[1] <= band + BLOCK_ROWS


@pytest.mark.parametrize(("batch", "heads"), [*product([1, 7, 128, 1000], [1, 8, 150])])
def test_blocks_share_the_batch_out(batch: int, heads: int) -> None:
    g = choose_geometry(replace(NAT, batch=batch, heads=heads, heads_kv=heads), FACTS, {})
    assert g is not None
    slices = g.slices(FACTS)
    assert 1 <= slices <= batch and (ceil(batch / slices) - 1) * slices < batch
    if batch * heads >= 10 * FACTS.multiprocessors:  # multiprocessors take about as many maps
        most = ceil(g.blocks_of(slices) / FACTS.multiprocessors) * ceil(batch / slices)
        assert most <= 1.3 * batch * heads / FACTS.multiprocessors


def test_planner_prefers_it() -> None:
    """On the third stage of NAT-Tiny, and where dilation groups of others are as large; not where maps are few."""

    def first(**changes: object) -> str:
        return candidates(contiguous_call("forward", replace(NAT, **changes)), FACTS)[0].name

    assert first() == first(batch=1024) == first(batch=16) == first(spatial=(10, 10)) == "resident_forward"
    dilated = replace(NAT, spatial=(56, 56), heads=2, heads_kv=2, window=Window.of(2, 7, dilation=4))
    assert candidates(contiguous_call("forward", dilated), FACTS)[0].name == "resident_forward"
    assert first(batch=1) == "tiled"
    assert first(spatial=(28, 28)) == "marching"
    assert first(spatial=(7, 7)) == "whole"


REFUSED = [
    (Case("wide_map", (14, 17), 7, **WIDE), "more than 16 rows or columns"),
    (Case("tall_kernel", (14, 14), (9, 7), **WIDE), "more than 8 rows of keys"),
    (Case("wide_kernel", (14, 16), (7, 11), **WIDE), "more than 12 columns of keys"),
    (Case("long_rows", (14, 14), 7, head_dim=40, head_dim_v=32), "leaves no room"),
    (Case("extra", (14, 14), 7, extra=1, **WIDE), "additional keys"),
    (Case("line", (16,), 7, **WIDE), "1-D windows"),
]


@pytest.mark.parametrize(("case", "reason"), REFUSED, ids=lambda value: getattr(value, "name", None))
def test_refusals(case: Case, reason: str) -> None:
    with pytest.raises(NotImplementedError, match=reason):
        plan_for(call_for(case), FACTS, Config("resident_forward"))


@pytest.mark.parametrize("options", [{"stages": 7}, {"warps": 15}, {"blocks_per_sm": 2, "stages": 4}])
def test_options_that_do_not_fit(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="no launch with the options"):
        plan_for(contiguous_call("forward", NAT), FACTS, Config("resident_forward", tuple(options.items())))


# ---- on a GPU ----


def forward(case: Case, dtype: str, options: dict[str, int] | None = None) -> None:
    """Runs and checks; results lie poisoned before."""
    arrays = inputs(case, dtype)
    config = Config("resident_forward", tuple((options or {}).items()))
    check(case, dtype, arrays, test_fast_forward.run(case, dtype, arrays, config))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ABLE, ids=lambda case: case.name)
def test_forward(case: Case, dtype: str) -> None:
    forward(case, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIONS)
def test_other_launches(name: str) -> None:
    for case in ABLE:
        if choose_geometry(problem_for(case, "float16"), FACTS, OPTIONS[name]) is not None:
            forward(replace(case, batch=500), "float16", OPTIONS[name])


@pytest.mark.gpu
@seed(24)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(
    case=random_case(256).map(lambda case: fitting(replace(case, extra=0))).filter(able), dtype=st.sampled_from(DTYPES)
)
def test_random_problems(case: Case, dtype: str) -> None:
    forward(case, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["rounds", "ragged_groups", "full_block"])
def test_repeats_are_bitwise_equal(name: str) -> None:
    case = replace(BY_NAME[name], batch=max(BY_NAME[name].batch, 85))
    arrays = inputs(case, "bfloat16")
    first = test_fast_forward.run(case, "bfloat16", arrays, Config("resident_forward"))
    for _ in range(50):
        again = test_fast_forward.run(case, "bfloat16", arrays, Config("resident_forward"))
        assert all((first[n] == again[n]).all() for n in first)
