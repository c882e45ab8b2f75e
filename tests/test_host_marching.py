"""The marching kernel's own source, run on the host lane by lane (see tests/host), against the reference."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from natcore.planning import DeviceFacts, Plan, facts_for_arch
from tests import host
from tests.cases import Case, check, check_same_bits
from tests.host import cases
from tests.host.cases import Arrays
from tests.test_marching_forward import CASES, OPTIONS, configured

pytestmark = pytest.mark.skipif(host.COMPILER is None, reason="needs a C++ compiler")
FACTS = replace(facts_for_arch("sm_90a"), multiprocessors=2)  # few blocks, which march far
OLDER = replace(facts_for_arch("sm_80"), multiprocessors=1)  # without stmatrix
FEW = {"heads": 2, "heads_kv": 2, "rpb": "float32"}
BLOCK = Case("nat_block", (16, 17), 7, batch=2, head_dim=32, head_dim_v=32, **FEW)
OWN = [
    BLOCK,
    Case("ragged_dilation", (23, 27), (3, 4), dilation=(2, 3), rpb="float32"),
    Case("causal_columns", (12, 26), (5, 7), is_causal=(False, True), head_dim_v=24, **FEW),
    Case("grouped", (18, 33), 7, heads=4, heads_kv=2, head_dim=16, head_dim_v=16),
    Case("half_tiles", (8, 28), 7, head_dim=32, head_dim_v=32, **FEW),  # three and a half of 8 columns
]
NAMES = ["nat_packed", "even_kernel", "axial", "stride", "gqa", "scale_zero", "scale_tiny", "outliers", "kernel_13"]
NAMES += ["head_dim_80_v_48", "causal_strides", "one_row"]
BY_NAME = {case.name: case for case in [*CASES, *OWN]}
# Options that cut a map otherwise than the planner would.
OTHERS = [
    ("nat_block", "a tile a block"),
    ("nat_block", "one producer"),
    ("nat_block", "long ring"),
    ("half_tiles", "two rows a band"),
    ("half_tiles", "two tiles of two"),
    ("causal_columns", "single groups"),
    ("grouped", "tall blocks"),
    ("ragged_dilation", "two rows a band"),
]


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("host_blocks")


prepared = partial(cases.prepared, "forward")


def planned(case: Case, arrays: Arrays, options: dict[str, int] | None = None, facts: DeviceFacts = FACTS) -> Plan:
    return cases.plan_of("forward", case, arrays, configured(options or {}), facts)


def execute(case: Case, plan: Plan, arrays: Arrays, folder: Path, **how) -> None:
    host.run_on(plan, "forward", arrays, case.its_scale, folder, **how)


def judge(case: Case, dtype: str, folder: Path, options: dict[str, int] | None = None, **how) -> Arrays:
    """See `run_and_check`."""
    return cases.run_and_check("forward", case, dtype, folder, configured(options or {}), FACTS, **how)


@pytest.mark.parametrize("name", [*NAMES, *(case.name for case in OWN)])
def test_cases(name: str, folder: Path) -> None:
    judge(BY_NAME[name], "float16", folder)


@pytest.mark.parametrize(("name", "options"), OTHERS)
def test_other_geometries(name: str, options: str, folder: Path) -> None:
    judge(BY_NAME[name], "bfloat16", folder, OPTIONS[options])


@pytest.mark.parametrize("order", [host.Order.EAGER, 2, 3, 4])
def test_any_order(order: int, folder: Path) -> None:
    """Whichever thread is first and whenever copies land, the results are the same to the bit."""
    check_same_bits(judge(BLOCK, "float16", folder), judge(BLOCK, "float16", folder, order=order))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_older_architecture(dtype: str, folder: Path) -> None:
    arrays, results = prepared(BLOCK, dtype)
    plan = planned(BLOCK, arrays | results, facts=OLDER)
    assert plan.launches[0].kernel.arch == "sm_80"
    execute(BLOCK, plan, arrays | results, folder)
    check(BLOCK, dtype, arrays, results)


# Of these, blocks leave the rows of the ring.
IMAGES = [
    Case("even_width", (10, 56), 7, batch=4, head_dim=32, head_dim_v=32, **FEW),
    Case("odd_width", (11, 25), 7, batch=4, head_dim=32, head_dim_v=32, **FEW),
    Case("odd_groups", (20, 57), 7, dilation=(1, 2), batch=4, head_dim=32, head_dim_v=32, rpb="float32"),
    Case("unequal", (9, 27), 7, batch=4, head_dim=16, head_dim_v=32, **FEW),
    Case("stride_2", (20, 57), 7, stride=2, batch=4, head_dim=32, head_dim_v=32, rpb="float32"),
]


def leaves_rows(plan: Plan) -> bool:
    return any(int(dict(launch.kernel.defines).get("MARGIN", 0)) > 0 for launch in plan.launches)


@pytest.mark.parametrize("case", IMAGES, ids=lambda case: case.name)
def test_what_is_not_a_number_stays_in_its_image(case: Case, folder: Path) -> None:
    assert leaves_rows(cases.check_images_apart("forward", case, folder, configured({}), FACTS))


# ---- that defects are noticed ----

# What, in which file, becomes what, and how it shows in which order.
DEFECTS = {
    "nobody waits for queries": (
        "kernels/marching_forward.cu",
        "mbarrier_wait(barriers.own_full(turn.slot), turn.phase);",
        ";",
        "not finite",
        host.Order.LATE,
    ),
    "arrivals before copies": (
        "common/strip_loads.cuh",
        "cp_async_arrive(barriers.own_full(band_turn.slot))",
        "mbarrier_arrive(barriers.own_full(band_turn.slot))",
        "not finite",
        host.Order.LATE,
    ),
    "keys are overwritten": (
        "common/strip_loads.cuh",
        "mbarrier_wait(barriers.empty(stage.slot), stage.phase ^ 1);",
        ";",
        "error|not finite|deadlock",
        host.Order.EAGER,
    ),
    "keys are never given back": (
        "kernels/marching_forward.cu",
        "mbarrier_arrive(barriers.empty(held.slot))",
        "(void)0",
        "deadlock\n.*mbarrier at byte .*arrivals are missing",
        host.Order.LATE,
    ),
    "the bias is read too soon": (
        "common/strip_bias.cuh",
        "    entry[TABLE] = bias[n] * factor;\n  }\n  named_barrier_sync(1, WORKERS);",
        "    entry[TABLE] = bias[n] * factor;\n  }",
        "error|not finite",
        2,
    ),
    "a lane stays away": (
        "common/strip_tile.cuh",
        "movmatrix_transposed(pack<Element>(c[2 * h], c[2 * h + 1]))",
        "threadIdx.x % 32 == 7 ? 0 : movmatrix_transposed(pack<Element>(c[2 * h], c[2 * h + 1]))",
        "lanes of the warp in movmatrix",
        host.Order.LATE,
    ),
    "rows are not aligned": (
        "common/strip_loads.cuh",
        "chunk * 16;",
        "chunk * 8;",
        "not aligned to 16",
        host.Order.LATE,
    ),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_defects_are_noticed(defect: str, folder: Path, tmp_path: Path) -> None:
    file, text, replacement, error, order = DEFECTS[defect]
    sources = host.with_defect(tmp_path, file, text, replacement)
    with pytest.raises((host.BlockError, AssertionError), match=error):
        judge(BLOCK, "float16", folder, OPTIONS["one producer"], order=order, sources=sources)


def test_short_memory_is_noticed(folder: Path) -> None:
    """A ring too short for a band's rows, and fewer bytes than the kernel takes."""
    options = OPTIONS["two rows a band"]
    with pytest.raises(host.BlockError, match="deadlock"):
        judge(BLOCK, "float16", folder, options, change=cases.doctored(0, RING=3))
    with pytest.raises(host.BlockError, match="bytes of shared memory"):
        judge(BLOCK, "float16", folder, options, change=cases.less_memory(0))
