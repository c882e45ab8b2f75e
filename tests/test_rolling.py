"""The backward of maps that a block marches down in one pass against the reference: ugly cases, launches, random cases.

The geometry tests need no GPU; tests/test_host_rolling.py runs the kernel without one.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import ceil

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from natcore.planning import Config, candidates, plan_for, refusal, rolling
from natcore.planning.listed import contiguous_call
from natcore.planning.resident_geometry import BAND, BLOCK_COLUMNS, BLOCK_ROWS, GROUP_COLUMNS
from natcore.planning.rolling_geometry import Columns, Geometry, choose_geometry, columns_of, rows_of
from natcore.problem import Problem, Window
from tests.cases import CASES, WIDE, Case, fitting, problem_for, random_case
from tests.test_fast_backward import DTYPES, FACTS, Run, backward, call_for

PLAIN = {"head_dim": 16, "head_dim_v": 24}
TWO = {"batch": 2, "heads": 2, "heads_kv": 2}
OWN = [
    Case("stage", (28, 28), 7, **TWO, **WIDE),
    Case("rounds", (9, 18), 7, batch=135, heads=4, heads_kv=4, **WIDE),
    Case("packed", (16, 22), 7, packed=True, **TWO, **WIDE),
    Case("seven_rows", (7, 20), 7, batch=3, **WIDE),
    Case("eight_rows", (8, 19), 7, batch=3, **WIDE),
    Case("nine_rows", (9, 17), 7, batch=3, **WIDE),
    Case("odd_extents", (13, 29), 7, **TWO, **WIDE),
    Case("widest", (12, 32), 7, **TWO, **WIDE),
    Case("narrowest", (26, 12), 7, **TWO, **WIDE),
    Case("tall", (75, 23), 7, batch=2, **WIDE),
    Case("kernel_3", (11, 27), 3, rpb="same", **TWO, **PLAIN),
    Case("kernel_5", (12, 21), 5, **TWO, **WIDE),
    Case("even_kernel", (12, 19), (6, 4), rpb="same", **PLAIN),
    Case("uneven_kernel", (14, 30), (3, 7), batch=2, **WIDE),
    Case("ragged_groups", (29, 43), 7, dilation=(3, 2), heads=2, heads_kv=2, **WIDE),
    Case("causal", (12, 26), (5, 7), is_causal=True, batch=2, **WIDE),
    Case("causal_rows", (15, 24), 7, is_causal=(True, False), batch=2, **WIDE),
    Case("strides", (12, 24), (7, 5), stride=2, batch=2, **WIDE),
    Case("no_bias", (11, 23), 7, batch=2, head_dim=32, head_dim_v=32),
    Case("unequal_head_dims", (10, 18), (7, 5), head_dim=8, head_dim_v=32, rpb="float32"),
    Case("outliers", (14, 25), 7, outliers=True, batch=2, **WIDE),
    Case("scale_zero", (10, 18), 7, scale=0.0, **WIDE),
    Case("scale_negative", (10, 18), 7, scale=-0.7, **WIDE),
    Case("scale_tiny", (10, 18), 5, scale=1e-6, **WIDE),
]
BY_NAME = {case.name: case for case in OWN}
EVERY = [*OWN, *(fitting(case) for case in CASES if case.name not in BY_NAME)]
#: Launches other than the planner's, where they fit a case.
OPTIONS: dict[str, dict[str, int]] = {"two bands ahead": {"ahead": 2}, "many bands ahead": {"ahead": 5}}
NAT = Problem(Window.of(2, 7), 128, (28, 28), 4, 4, 32, 32, 0, "float16", "float32")


def able(case: Case) -> bool:
    return case.batch > 0 and refusal(rolling.CANDIDATE, call_for(case), FACTS) is None


ABLE = [case for case in EVERY if able(case)]


def geometry_of(case: Case) -> Geometry:
    g = choose_geometry(problem_for(case, "float16"), FACTS, {})
    assert g is not None
    return g


def test_cases_are_many() -> None:
    assert {case.name for case in OWN} <= {case.name for case in ABLE}
    for name, options in OPTIONS.items():
        assert any(choose_geometry(problem_for(case, "float16"), FACTS, options) for case in ABLE), name


# ---- geometry ----


def seen_by(g: Columns, key: int, length: int) -> list[int]:
    return [x for x in range(length) if g.axis.keys(x, length)[0] <= key < g.axis.keys(x, length)[1]]


@pytest.mark.parametrize("case", ABLE, ids=lambda case: case.name)
def test_columns(case: Case) -> None:
    """A pair's groups hold all queries that see it, on the map; a group's pairs all that it sees; and no two pairs of
    which a group reads dS have the same place of a query."""
    columns = geometry_of(case).split
    for length in columns.axis.lengths:
        writers: dict[tuple[int, int], set[int]] = {}
        for pair in range(columns.pairs):
            first, groups = columns.queries(pair, length)
            its = range(first, first + groups * GROUP_COLUMNS)
            assert groups == 0 or (first >= 0 and its[-1] < length)
            for key in range(pair * BLOCK_COLUMNS - columns.shift, (pair + 1) * BLOCK_COLUMNS - columns.shift):
                assert not 0 <= key < length or set(seen_by(columns, key, length)) <= set(its)
            for x in its:
                writers.setdefault((x, pair % 8), set()).add(pair)
        for x, key in product(range(length), repeat=2):
            start = columns.axis.keys(x // GROUP_COLUMNS * GROUP_COLUMNS, length)[0]
            pair = min((start + columns.shift) // BLOCK_COLUMNS, columns.pairs - columns.seen_pairs)
            if x in seen_by(columns, key, length):
                assert pair <= (key + columns.shift) // BLOCK_COLUMNS < pair + columns.seen_pairs
            for read in range(pair, pair + columns.seen_pairs):
                assert writers.get((x, read % 8), {read}) == {read}


@pytest.mark.parametrize("case", ABLE, ids=lambda case: case.name)
def test_rows(case: Case) -> None:
    """What a band sees has come when it is its turn, and lies in the ring until its dQ is made."""
    g = geometry_of(case)
    rows, needed = g.axes[0], rows_of(g.axes[0])
    for length in rows.lengths:
        for band in range(ceil(length / BAND)):
            start = rows.keys(band * BAND, length)[0]
            end = rows.keys(min(band * BAND + 1, length - 1), length)[1]
            assert end - start <= BLOCK_ROWS and (end - 1) // BAND <= band + needed.lead
            newest = band + 1 + g.ahead + needed.lead  # pair of rows, when dQ of this band is made
            assert newest - start // BAND < g.ring // BAND


@pytest.mark.parametrize("case", ABLE, ids=lambda case: case.name)
def test_inner_pairs_look_alike(case: Case) -> None:
    columns = geometry_of(case).split
    views = set()
    for length, pair in product(columns.axis.lengths, range(*columns.inner)):
        first, groups = columns.queries(pair, length)
        own = pair * BLOCK_COLUMNS - columns.shift
        keys = (columns.axis.keys(x, length) for x in range(first, first + groups * GROUP_COLUMNS))
        views.add((first - own, tuple((start - own, end - own) for start, end in keys)))
    assert len(views) <= 1


def test_third_of_the_stages() -> None:
    """28 columns: 15 pairs, of which those near borders, but for the first and last, are seen by 2 or 3 groups."""
    columns = columns_of(choose_geometry(NAT, FACTS, {}).axes[1])  # type: ignore[union-attr]
    assert columns is not None and (columns.shift, columns.pairs, columns.units, columns.inner) == (1, 15, 30, (4, 11))


@pytest.mark.parametrize("batch", [1, 7, 128, 1000])
def test_blocks_share_the_batch_out(batch: int) -> None:
    g = choose_geometry(replace(NAT, batch=batch), FACTS, {})
    assert g is not None
    slices = g.slices(FACTS)
    assert 1 <= slices <= batch and (ceil(batch / slices) - 1) * slices < batch


def test_planner_prefers_it_on_the_second_stage() -> None:
    assert candidates(contiguous_call("backward", NAT), FACTS)[0].name == "rolling"
    others = {(56, 56): "marching", (14, 14): "resident", (7, 7): "whole"}
    for spatial, name in others.items():
        assert candidates(contiguous_call("backward", replace(NAT, spatial=spatial)), FACTS)[0].name == name


@pytest.mark.parametrize("spatial", [(17, 17), (20, 20), (24, 24), (32, 32), (56, 28), (14, 28)])
def test_planner_prefers_it_where_it_was_faster(spatial: tuple[int, int]) -> None:
    assert candidates(contiguous_call("backward", replace(NAT, spatial=spatial)), FACTS)[0].name == "rolling"


@pytest.mark.parametrize("batch", [1, 8])
def test_planner_does_not_prefer_it_for_few_maps(batch: int) -> None:
    """A map is one block's, so few maps leave multiprocessors idle."""
    assert candidates(contiguous_call("backward", replace(NAT, batch=batch)), FACTS)[0].name != "rolling"


REFUSED = [
    (Case("wide_map", (14, 33), 7, **WIDE), "12 to 32 columns"),
    (Case("narrow_map", (14, 11), 7, **WIDE), "12 to 32 columns"),
    (Case("tall_kernel", (14, 20), (9, 7), **WIDE), "more than 8 rows of keys"),
    (Case("wide_kernel", (14, 28), (7, 9), **WIDE), "seen by too many columns"),
    (Case("long_rows", (14, 20), 7, head_dim=40, head_dim_v=32), "leaves no room"),
    (Case("grouped", (14, 20), 7, heads=2, heads_kv=1, **WIDE), "grouped heads"),
    (Case("extra", (14, 20), 7, extra=1, **WIDE), "additional keys"),
    (Case("line", (16,), 7, **WIDE), "1-D windows"),
]


@pytest.mark.parametrize(("case", "reason"), REFUSED, ids=lambda value: getattr(value, "name", None))
def test_refusals(case: Case, reason: str) -> None:
    with pytest.raises(NotImplementedError, match=reason):
        plan_for(call_for(case), FACTS, Config("rolling"))


def test_too_little_shared_memory() -> None:
    with pytest.raises(NotImplementedError, match="too little shared memory"):
        plan_for(contiguous_call("backward", NAT), replace(FACTS, shared_bytes_per_block=160 << 10), Config("rolling"))
    with pytest.raises(ValueError, match="more shared memory"):
        plan_for(contiguous_call("backward", NAT), FACTS, Config("rolling", (("blocks_per_sm", 2),)))
    with pytest.raises(ValueError, match="ahead"):
        plan_for(contiguous_call("backward", NAT), FACTS, Config("rolling", (("ahead", 1),)))


def test_workspace_is_small() -> None:
    """The partial sums of drpb, and nothing else."""
    assert 0 < plan_for(contiguous_call("backward", NAT), FACTS, Config("rolling")).workspace_bytes <= 1 << 20
    without = contiguous_call("backward", replace(NAT, rpb_dtype=None))
    assert plan_for(without, FACTS, Config("rolling")).workspace_bytes == 0


# ---- on a GPU ----


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ABLE, ids=lambda case: case.name)
def test_backward(case: Case, dtype: str) -> None:
    backward(case, dtype, Config("rolling"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIONS)
def test_other_launches(name: str) -> None:
    for case in ABLE:
        if choose_geometry(problem_for(case, "float16"), FACTS, OPTIONS[name]) is not None:
            backward(replace(case, batch=5), "float16", Config("rolling", tuple(OPTIONS[name].items())))


@pytest.mark.gpu
def test_without_d_lse() -> None:
    backward(BY_NAME["stage"], "bfloat16", Config("rolling"), with_d_lse=False)


@pytest.mark.gpu
@seed(23)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(
    case=random_case(800).map(lambda case: fitting(replace(case, extra=0))).filter(able), dtype=st.sampled_from(DTYPES)
)
def test_random_problems(case: Case, dtype: str) -> None:
    backward(case, dtype, Config("rolling"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["rounds", "ragged_groups", "causal"])
def test_bitwise_equal_over_1000_runs(name: str) -> None:
    Run(BY_NAME[name], "bfloat16", Config("rolling")).repeat(1000)
