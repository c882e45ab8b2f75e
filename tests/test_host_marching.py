"""The marching kernel's own source, run on the host lane by lane (see tests/host), against the reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from natcore.planning import Config, DeviceFacts, Plan, facts_for_arch, plan_for
from natcore.problem import OPERANDS, call_of, problem_of
from tests import host
from tests.cases import Case, check, inputs, numpy_dtype
from tests.test_general_kernels import poisoned, view
from tests.test_marching_forward import CASES, OPTIONS

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


def aligned(x: np.ndarray) -> np.ndarray:
    """A copy that 16-byte loads take."""
    copy = host.aligned_bytes(x.nbytes).view(x.dtype).reshape(x.shape)
    copy[...] = x
    return copy


def prepared(case: Case, dtype: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Operands of the forward, and its results, all NaN."""
    # Parts of one packed array, as they are; its rows are whole 16-byte chunks.
    arrays = {n: x if case.packed and n in "qkv" else aligned(x) for n, x in inputs(case, dtype).items()}
    problem = problem_of(case.window, {n: view(arrays[n]) for n in ("q", "k", "v", "rpb") if n in arrays})
    shapes = {n: (problem.shapes[n], numpy_dtype(problem.dtype_of(n))) for n in ("out", "lse")}
    return arrays, {n: aligned(poisoned(*kind, False)) for n, kind in shapes.items()}


def planned(
    case: Case, arrays: dict[str, np.ndarray], options: dict[str, int] | None = None, facts: DeviceFacts = FACTS
) -> Plan:
    views = {n: view(arrays[n]) for n in OPERANDS["forward"] if n in arrays}
    call = call_of("forward", problem_of(case.window, views), views)
    return plan_for(call, facts, Config("marching", tuple((options or {}).items())))


def execute(case: Case, plan: Plan, arrays: dict[str, np.ndarray], folder: Path, **how) -> None:
    host.run_on(plan, "forward", arrays, case.its_scale, folder, **how)


def judge(case: Case, dtype: str, folder: Path, options: dict[str, int] | None = None, **how) -> None:
    """Runs a case and checks it; ``how`` is for `run_blocks`."""
    arrays, results = prepared(case, dtype)
    execute(case, planned(case, arrays | results, options), arrays | results, folder, **how)
    check(case, dtype, arrays, results)


@pytest.mark.parametrize("name", [*NAMES, *(case.name for case in OWN)])
def test_cases(name: str, folder: Path) -> None:
    judge(BY_NAME[name], "float16", folder)


@pytest.mark.parametrize(("name", "options"), OTHERS)
def test_other_geometries(name: str, options: str, folder: Path) -> None:
    judge(BY_NAME[name], "bfloat16", folder, OPTIONS[options])


@pytest.mark.parametrize("order", [host.Order.EAGER, 2, 3, 4])
def test_any_order(order: int, folder: Path) -> None:
    """Whichever thread is first and whenever copies land, the results are the same to the bit."""
    arrays, results = prepared(BLOCK, "float16")
    everything = arrays | results
    plan = planned(BLOCK, everything)
    execute(BLOCK, plan, everything, folder)
    first = {n: x.copy() for n, x in results.items()}
    for x in results.values():
        x[...] = np.nan
    execute(BLOCK, plan, everything, folder, order=order)
    for name, x in results.items():
        np.testing.assert_array_equal(x, first[name])


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
    """What is read outside windows gets a weight of 0, and 0 times NaN is NaN: it must not be another image's."""
    arrays, results = prepared(case, "float16")
    for name in "qkv":
        arrays[name][1::2] = np.nan
    plan = planned(case, arrays | results)
    assert leaves_rows(plan)
    for order in (host.Order.EAGER, host.Order.LATE):
        execute(case, plan, arrays | results, folder, order=order)
        assert not np.isnan(results["out"][::2].astype(np.float32)).any()


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
    arrays, results = prepared(BLOCK, "float16")
    plan = planned(BLOCK, arrays | results, OPTIONS["two rows a band"])
    (launch,) = plan.launches
    defines = dict(launch.kernel.defines) | {"RING": "3"}
    short = replace(launch, kernel=replace(launch.kernel, defines=tuple(sorted(defines.items()))))
    with pytest.raises(host.BlockError, match="deadlock"):
        execute(BLOCK, replace(plan, launches=(short,)), arrays | results, folder)
    with pytest.raises(host.BlockError, match="bytes of shared memory"):
        less = replace(launch, shared_bytes=launch.shared_bytes - 16)
        execute(BLOCK, replace(plan, launches=(less,)), arrays | results, folder)
