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
from natcore.problem import Window
from tests import test_resident
from tests.cases import CASES, WIDE, Case, fitting, problem_for, random_case
from tests.test_fast_backward import DTYPES, FACTS
from tests.test_fast_forward import call_for, forward, repeat
from tests.test_resident import NAT, check_bands

OWN = [
    *(case for case in test_resident.OWN if case.name != "wide_kernel"),  # of more than 12 columns of keys
    Case("wide_kernel", (12, 12), (7, 12), batch=2, **WIDE),
    Case("grouped", (14, 14), 7, heads=4, heads_kv=2, batch=2, **WIDE),
    Case("shorter_values", (9, 14), 5, head_dim=24, head_dim_v=8, rpb="float32"),
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


def able(case: Case) -> bool:
    return case.batch > 0 and refusal(resident_forward.CANDIDATE, call_for(case), FACTS) is None


ABLE = [case for case in EVERY if able(case)]


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
    check_bands(rows)


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
    *((case, reason) for case, reason in test_resident.REFUSED if case.name != "grouped"),
    (Case("wide_kernel", (14, 16), (7, 11), **WIDE), "more than 12 columns of keys"),
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


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ABLE, ids=lambda case: case.name)
def test_forward(case: Case, dtype: str) -> None:
    forward(case, dtype, Config("resident_forward"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIONS)
def test_other_launches(name: str) -> None:
    for case in ABLE:
        if choose_geometry(problem_for(case, "float16"), FACTS, OPTIONS[name]) is not None:
            forward(replace(case, batch=500), "float16", Config("resident_forward", tuple(OPTIONS[name].items())))


@pytest.mark.gpu
@seed(24)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(
    case=random_case(256).map(lambda case: fitting(replace(case, extra=0))).filter(able), dtype=st.sampled_from(DTYPES)
)
def test_random_problems(case: Case, dtype: str) -> None:
    forward(case, dtype, Config("resident_forward"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["rounds", "ragged_groups", "full_block"])
def test_repeats_are_bitwise_equal(name: str) -> None:
    case = replace(BY_NAME[name], batch=max(BY_NAME[name].batch, 85))
    repeat(case, "bfloat16", Config("resident_forward"), 50)
