"""The backward of maps that fit into a block's shared memory against the reference: ugly cases, launches, random cases.

The geometry tests need no GPU; tests/test_host_resident.py runs the kernel without one.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import ceil

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from natcore.planning import Config, candidates, plan_for, refusal, resident
from natcore.planning.axis import Axis
from natcore.planning.listed import contiguous_call
from natcore.planning.resident_geometry import BAND, BLOCK_COLUMNS, BLOCK_ROWS, GROUP_COLUMNS, choose_geometry
from natcore.problem import Problem, Window
from tests.cases import CASES, WIDE, Case, fitting, problem_for, random_case
from tests.test_fast_backward import DTYPES, FACTS, Run, backward, call_for

PLAIN = {"head_dim": 16, "head_dim_v": 24}
OWN = [
    Case("stage", (14, 14), 7, batch=3, heads=2, heads_kv=2, **WIDE),
    Case("packed", (14, 14), 7, batch=3, heads=2, heads_kv=2, packed=True, **WIDE),
    Case("rounds", (14, 14), 7, batch=85, heads=8, heads_kv=8, **WIDE),
    Case("odd_extents", (13, 15), 7, batch=2, **WIDE),
    Case("full_block", (16, 16), 7, heads=2, heads_kv=2, rpb="same", **PLAIN),
    Case("kernel_is_extent", (7, 7), 7, batch=2, **WIDE),
    Case("wide_kernel", (12, 16), (7, 16), batch=2, **WIDE),
    Case("even_kernel", (12, 10), (6, 4), rpb="same", **PLAIN),
    Case("kernel_3", (14, 14), 3, batch=2, **WIDE),
    Case("ragged_groups", (29, 31), 7, dilation=(3, 2), heads=2, heads_kv=2, **WIDE),
    Case("dilated", (28, 28), 7, dilation=2, batch=2, **WIDE),
    Case("causal_strides", (11, 13), (6, 5), stride=(2, 3), is_causal=(True, False), batch=2, **WIDE),
    Case("causal_columns", (16, 9), 5, is_causal=(False, True), rpb="float32", **PLAIN),
    Case("one_row", (1, 16), (1, 9), rpb="float32", **PLAIN),
    Case("one_column", (16, 1), (7, 1), rpb="float32", **PLAIN),
    Case("no_bias", (14, 14), 7, batch=2, head_dim=32, head_dim_v=32),
    Case("unequal_head_dims", (10, 11), 5, head_dim=8, head_dim_v=32, rpb="float32"),
    Case("outliers", (14, 14), 7, outliers=True, batch=2, **WIDE),
    Case("scale_zero", (14, 14), 7, scale=0.0, **WIDE),
    Case("scale_negative", (14, 14), 7, scale=-0.7, **WIDE),
    Case("scale_tiny", (14, 14), 5, scale=1e-6, **WIDE),
]
BY_NAME = {case.name: case for case in OWN}
EVERY = [*OWN, *(fitting(case) for case in CASES if case.name not in BY_NAME)]
#: Launches other than the planner's, where they fit a case.
OPTIONS: dict[str, dict[str, int]] = {
    "a pair at once": {"at_once": 1},
    "two pairs at once": {"at_once": 2},
    "many warps": {"warps": 16},
    "no warps that only copy": {"warps": 10},
}


def able(case: Case) -> bool:
    return case.batch > 0 and refusal(resident.CANDIDATE, call_for(case), FACTS) is None


ABLE = [case for case in EVERY if able(case)]
NAT = Problem(Window.of(2, 7), 128, (14, 14), 8, 8, 32, 32, 0, "float16", "float32")


def test_cases_are_many() -> None:
    assert len(ABLE) >= 30 and {case.name for case in OWN} <= {case.name for case in ABLE}
    for name, options in OPTIONS.items():
        assert any(choose_geometry(problem_for(case, "float16"), FACTS, options) for case in ABLE), name


# ---- geometry ----


def check_bands(rows: Axis) -> None:
    """Each query's keys are in the 8 rows from where its band's start."""
    for length in rows.lengths:
        for query in range(length):
            band = rows.keys(query // BAND * BAND, length)[0]
            assert band <= rows.keys(query, length)[0] and rows.keys(query, length)[1] <= band + BLOCK_ROWS


@pytest.mark.parametrize("case", ABLE, ids=lambda case: case.name)
def test_units_hold_all_that_is_seen(case: Case) -> None:
    """Each query's keys are in units of its group, and in the 8 rows from where its band's start."""
    g = choose_geometry(problem_for(case, "float16"), FACTS, {})
    assert g is not None and g.shared_bytes <= FACTS.shared_bytes_per_block
    rows, columns = g.axes
    for length in columns.lengths:
        for query, key in product(range(length), repeat=2):
            start, end = columns.keys(query, length)
            first, last = g.pairs_of_groups[query // GROUP_COLUMNS]
            assert not start <= key < end or first <= (key + g.shift) // BLOCK_COLUMNS < last
    check_bands(rows)


@pytest.mark.parametrize("batch", [1, 7, 128, 1000])
def test_blocks_share_the_batch_out(batch: int) -> None:
    g = choose_geometry(replace(NAT, batch=batch), FACTS, {})
    assert g is not None
    slices = g.slices(FACTS)
    assert 1 <= slices <= batch and (ceil(batch / slices) - 1) * slices < batch


def test_planner_prefers_it_on_the_third_stage() -> None:
    assert candidates(contiguous_call("backward", NAT), FACTS)[0].name == "resident"
    assert (
        candidates(contiguous_call("backward", replace(NAT, spatial=(28, 28), heads=4, heads_kv=4)), FACTS)[0].name
        == "rolling"
    )
    assert (
        candidates(contiguous_call("backward", replace(NAT, spatial=(7, 7), heads=16, heads_kv=16)), FACTS)[0].name
        == "whole"
    )


REFUSED = [
    (Case("wide_map", (14, 17), 7, **WIDE), "more than 16 rows or columns"),
    (Case("tall_kernel", (14, 14), (9, 7), **WIDE), "more than 8 rows of keys"),
    (Case("long_rows", (14, 14), 7, head_dim=40, head_dim_v=32), "leaves no room"),
    (Case("grouped", (14, 14), 7, heads=2, heads_kv=1, **WIDE), "grouped heads"),
    (Case("extra", (14, 14), 7, extra=1, **WIDE), "additional keys"),
    (Case("line", (16,), 7, **WIDE), "1-D windows"),
]


@pytest.mark.parametrize(("case", "reason"), REFUSED, ids=lambda value: getattr(value, "name", None))
def test_refusals(case: Case, reason: str) -> None:
    with pytest.raises(NotImplementedError, match=reason):
        plan_for(call_for(case), FACTS, Config("resident"))


def test_there_is_no_forward() -> None:
    with pytest.raises(NotImplementedError, match="no resident kernel for forward"):
        plan_for(contiguous_call("forward", NAT), FACTS, Config("resident"))


def test_options_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="more shared memory"):
        plan_for(contiguous_call("backward", NAT), FACTS, Config("resident", (("blocks_per_sm", 3),)))


def test_workspace_is_small() -> None:
    """The partial sums of drpb, and nothing else."""
    assert 0 < plan_for(contiguous_call("backward", NAT), FACTS, Config("resident")).workspace_bytes <= 1 << 20
    without = contiguous_call("backward", replace(NAT, rpb_dtype=None))
    assert plan_for(without, FACTS, Config("resident")).workspace_bytes == 0


# ---- on a GPU ----


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ABLE, ids=lambda case: case.name)
def test_backward(case: Case, dtype: str) -> None:
    backward(case, dtype, Config("resident"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIONS)
def test_other_launches(name: str) -> None:
    for case in ABLE:
        if choose_geometry(problem_for(case, "float16"), FACTS, OPTIONS[name]) is not None:
            backward(replace(case, batch=5), "float16", Config("resident", tuple(OPTIONS[name].items())))


@pytest.mark.gpu
def test_without_d_lse() -> None:
    backward(BY_NAME["stage"], "bfloat16", Config("resident"), with_d_lse=False)


@pytest.mark.gpu
@seed(22)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(
    case=random_case(256).map(lambda case: fitting(replace(case, extra=0))).filter(able), dtype=st.sampled_from(DTYPES)
)
def test_random_problems(case: Case, dtype: str) -> None:
    backward(case, dtype, Config("resident"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["rounds", "ragged_groups", "causal_strides"])
def test_bitwise_equal_over_1000_runs(name: str) -> None:
    Run(BY_NAME[name], "bfloat16", Config("resident")).repeat(1000)
