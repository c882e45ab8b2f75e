"""The marching backward's own sources, run on the host lane by lane (see tests/host), against the reference."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from natcore.planning import DeviceFacts, Plan
from tests import host
from tests.cases import Case, check_same_bits
from tests.host import cases
from tests.host.cases import Arrays
from tests.test_host_marching import FACTS, FEW, IMAGES, OLDER, leaves_rows
from tests.test_marching_backward import CASES, OPTIONS, configured

pytestmark = pytest.mark.skipif(host.COMPILER is None, reason="needs a C++ compiler")
BLOCK = Case("nat_block", (12, 17), 7, batch=2, head_dim=32, head_dim_v=32, **FEW)
OWN = [
    BLOCK,
    Case("half_tiles", (9, 28), 7, rpb="float32", head_dim=32, head_dim_v=16),  # three and a half of 8 columns
    Case("strips", (9, 38), 7, head_dim=16, head_dim_v=32, rpb="same"),
    Case("no_bias", (11, 19), (5, 3), head_dim=24, head_dim_v=8),
]
NAMES = ["ragged_dilation", "even_kernel", "causal_rows_strides", "kernel_is_extent", "outliers", "scale_negative"]
BY_NAME = {case.name: case for case in [*CASES, *OWN]}
# Options that cut a map otherwise than the planner would.
OTHERS = [
    ("half_tiles", "four tiles"),
    ("half_tiles", "two tiles of two"),
    ("strips", "two tiles"),
    ("no_bias", "tall blocks"),
    ("causal_columns", "eight rows a band"),
]


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("host_backward")


prepared = partial(cases.prepared, "backward")


def planned(case: Case, arrays: Arrays, options: dict[str, int], facts: DeviceFacts) -> Plan:
    return cases.plan_of("backward", case, arrays, configured(case, options, facts), facts)


def execute(case: Case, plan: Plan, arrays: Arrays, folder: Path, **how) -> None:
    host.run_on(plan, "backward", arrays, case.its_scale, folder, **how)


def judge(
    case: Case,
    dtype: str,
    folder: Path,
    options: dict[str, int] | None = None,
    facts: DeviceFacts = FACTS,
    **how,
) -> Arrays:
    """See `run_and_check`."""
    config = configured(case, options or {}, facts)
    return cases.run_and_check("backward", case, dtype, folder, config, facts, saved_out=True, **how)


@pytest.mark.parametrize("name", [*NAMES, *(case.name for case in OWN)])
def test_cases(name: str, folder: Path) -> None:
    judge(BY_NAME[name], "float16", folder)


@pytest.mark.parametrize(("name", "options"), OTHERS)
def test_other_geometries(name: str, options: str, folder: Path) -> None:
    judge(BY_NAME[name], "bfloat16", folder, OPTIONS[options])


@pytest.mark.parametrize("absent", [("d_lse",), ("dk",), ("dv", "drpb"), ("dq", "drpb"), ("dq", "dk", "dv")])
def test_what_may_be_absent(absent: tuple[str, ...], folder: Path) -> None:
    results = judge(BLOCK, "float16", folder, absent=absent)
    assert set(results) == {"dq", "dk", "dv", "drpb"} - set(absent)


@pytest.mark.parametrize("batch", [1, 5])
def test_other_shares(batch: int, folder: Path) -> None:
    """Blocks that start in the middle of a strip, or have several."""
    judge(replace(BLOCK, batch=batch), "float16", folder)


@pytest.mark.parametrize("order", [host.Order.EAGER, 2, 3, 4])
def test_any_order(order: int, folder: Path) -> None:
    """Whichever thread is first and whenever copies land, the results are the same to the bit."""
    first, again = judge(BLOCK, "float16", folder), judge(BLOCK, "float16", folder, order=order)
    check_same_bits(first, again)


def test_older_architecture(folder: Path) -> None:
    judge(BLOCK, "bfloat16", folder, facts=OLDER)


@pytest.mark.parametrize(
    "case", [*IMAGES[:-1], replace(IMAGES[-1], name="stride_1", spatial=(9, 29), stride=1)], ids=lambda case: case.name
)
def test_what_is_not_a_number_stays_in_its_image(case: Case, folder: Path) -> None:
    assert leaves_rows(cases.check_images_apart("backward", case, folder, configured(case, {}, FACTS), FACTS))


# ---- that defects are noticed ----

TALL = replace(BLOCK, name="tall", spatial=(26, 9), batch=1)
ODD = replace(BLOCK, name="odd_rows", spatial=(11, 17), batch=1)
# In which case with which options, in which file, what becomes what, and how it shows in which order.
DEFECTS = {
    "nobody waits for queries": (
        BLOCK,
        {},
        "kernels/marching_queries.cu",
        "mbarrier_wait(barriers.own_full(turn.slot), turn.phase);",
        ";",
        "not finite|error",
        host.Order.LATE,
    ),
    "nobody waits for keys": (
        BLOCK,
        {},
        "kernels/marching_keys.cu",
        "mbarrier_wait(barriers.own_full(turn.slot), turn.phase);",
        ";",
        "not finite|error",
        host.Order.LATE,
    ),
    "what lies below the map is not cleared": (
        ODD,
        {"own_ring": 6},
        "common/strip_loads.cuh",
        "const bool all = PASS == QUERIES &&",
        "const bool all = false &&",
        "drpb: .* not finite",
        host.Order.LATE,
    ),
    "delta with the wrong sign": (
        BLOCK,
        {},
        "kernels/marching_queries.cu",
        "given[OWN_RING * BAND * SCALARS_ROW / 4]) - delta;",
        "given[OWN_RING * BAND * SCALARS_ROW / 4]) + delta;",
        "dq: error",
        host.Order.LATE,
    ),
    "queries below the map weigh as others": (
        ODD,
        {},
        "kernels/marching_queries.cu",
        "float2 its_scalars{__int_as_float(0x7f800000), 0.f};",
        "float2 its_scalars{0.f, 0.f};",
        "drpb: error|drpb.*not finite",
        host.Order.LATE,
    ),
    "sums outlive their band's kind": (
        BLOCK,
        {},
        "common/strip_sums.cuh",
        "    flush(table, lane);\n    first_row",
        "    first_row",
        "drpb: error",
        host.Order.LATE,
    ),
    "half a slice of drpb": (
        BLOCK,
        {},
        "kernels/marching_keys.cu",
        "sum += __shfl_xor_sync(~0u, sum, 8);",
        ";",
        "drpb: error",
        host.Order.LATE,
    ),
    "queries are overwritten": (
        TALL,
        {"ring": 5},
        "common/strip_loads.cuh",
        "mbarrier_wait(barriers.empty(stage.slot), stage.phase ^ 1);",
        ";",
        "error|not finite|deadlock",
        host.Order.EAGER,
    ),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_defects_are_noticed(defect: str, folder: Path, tmp_path: Path) -> None:
    case, options, file, text, replacement, error, order = DEFECTS[defect]
    sources = host.with_defect(tmp_path, file, text, replacement)
    with pytest.raises((host.BlockError, AssertionError), match=error):
        judge(case, "float16", folder, options, order=order, sources=sources)


@pytest.mark.parametrize(
    ("of", "name", "less", "error"),
    [
        (0, "RING", 2, "deadlock"),
        (1, "RING", 2, "deadlock"),
        (0, "START_BLOCKS", 1, "dq: error"),
        (1, "START_BLOCKS", 1, "dk: error|dv: error"),
    ],
)
def test_short_plans_are_noticed(of: int, name: str, less: int, error: str, folder: Path) -> None:
    """Rings shorter than what a band sees, and too few blocks near borders."""

    def change(plan: Plan) -> Plan:
        *others, last = dict(plan.launches[of].kernel.defines)[name].split(",")
        return cases.doctored(of, **{name: ",".join([*others, str(int(last) - less)])})(plan)

    options = {"ring": 5} if name == "RING" else None
    with pytest.raises((host.BlockError, AssertionError), match=error):
        judge(BLOCK, "float16", folder, options, change=change)


def test_too_little_shared_memory_is_noticed(folder: Path) -> None:
    with pytest.raises(host.BlockError, match="bytes of shared memory"):
        judge(BLOCK, "float16", folder, change=cases.less_memory(1))
