"""The tiled backward's own sources, run on the host lane by lane (see tests/host), against the reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from natcore.planning import refusal, tiled_backward
from tests import host
from tests.cases import CASES, PLAIN, Case, check_same_bits, fitting
from tests.host.cases import judge_of
from tests.test_fast_backward import call_for
from tests.test_host_marching import FACTS, OLDER

pytestmark = pytest.mark.skipif(host.COMPILER is None, reason="needs a C++ compiler")
OWN = [
    Case("map", (13, 22), 5, heads=2, heads_kv=2, batch=2, rpb="float32", **PLAIN),
    Case("line", (90,), 13, rpb="float32", batch=2, **PLAIN),
    Case("video", (4, 9, 10), (3, 3, 5), rpb="float32", head_dim=24, head_dim_v=8),
    Case("grouped", (9, 11), (3, 5), heads=6, heads_kv=2, rpb="same", **PLAIN),
    Case("large", (18, 19), 15, batch=2, rpb="float32", **PLAIN),
    Case("strides", (13, 21), (5, 6), stride=(2, 3), rpb="float32", **PLAIN),
    Case("ragged_video", (5, 7, 13), (3, 4, 5), dilation=(1, 1, 2), stride=(2, 1, 2), rpb="same", **PLAIN),
    Case("causal_line", (50,), 9, stride=2, is_causal=True, dilation=2, rpb="float32", **PLAIN),
]
#: Few multiprocessors, so that a block has many regions.
FEW = replace(FACTS, multiprocessors=1)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("host_tiled_backward")


def able(case: Case) -> bool:
    return refusal(tiled_backward.CANDIDATE, call_for(case), FACTS) is None


judge = judge_of("backward", "tiled_backward", FEW)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("case", [*OWN, *(fitting(c) for c in CASES if able(fitting(c)))], ids=lambda case: case.name)
def test_cases(case: Case, dtype: str, folder: Path) -> None:
    judge(case, dtype, folder)


@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(40, 24), (64, 32), (24, 80)])
def test_rows_of_float32(head_dim: int, head_dim_v: int, folder: Path) -> None:
    """Own rows in registers, and others in shared memory; n8 tiles without a partner."""
    judge(replace(OWN[0], head_dim=head_dim, head_dim_v=head_dim_v), "float32", folder)


MAP = OWN[0]
#: Options that cut a map otherwise than the planner would.
OTHERS = [
    ("map", {"columns": 4, "region0": 1, "region1": 2, "blocks_per_sm": 1, "stages": 1}),
    ("map", {"columns": 16, "ordering": 1}),
    ("grouped", {"keys_region0": 1, "keys_region1": 2, "keys_blocks_per_sm": 1, "keys_stages": 1}),
    ("video", {"ordering": 2, "keys_ordering": 4, "stages": 1, "keys_stages": 2}),
    ("line", {"region0": 1, "region1": 3, "blocks_per_sm": 1, "stages": 2}),
]


@pytest.mark.parametrize(("name", "options"), OTHERS)
def test_other_geometries(name: str, options: dict[str, int], folder: Path) -> None:
    judge(next(case for case in OWN if case.name == name), "bfloat16", folder, options)


@pytest.mark.parametrize("absent", [("d_lse",), ("dk",), ("dv", "drpb"), ("dk", "dv"), ("dq", "drpb")])
def test_what_may_be_absent(absent: tuple[str, ...], folder: Path) -> None:
    results = judge(MAP, "float16", folder, absent=absent)
    assert set(results) == {"dq", "dk", "dv", "drpb"} - set(absent)


@pytest.mark.parametrize("order", [host.Order.EAGER, 2, 3])
def test_any_order(order: int, folder: Path) -> None:
    """Whichever thread is first and whenever copies land, the results are the same to the bit."""
    first, again = judge(MAP, "float16", folder), judge(MAP, "float16", folder, order=order)
    check_same_bits(first, again)


def test_older_architecture(folder: Path) -> None:
    judge(MAP, "bfloat16", folder, facts=OLDER)


# ---- that defects are noticed ----

# In which file what becomes what, and how it shows.
DEFECTS = {
    "nobody waits for copies": ("common/tiled_gradients.cuh", "cp_async_wait<0>();", ";", "error|not finite"),
    "a copy of nothing names a row below the map": (
        "common/tiled_loads.cuh",
        "source = row < rows ? row : 0;",
        "source = row;",
        "outside of all arrays",
    ),
    "planes are overwritten": (
        "common/tiled_gradients.cuh",
        "__syncthreads();  // the plane has been read",
        ";  // the plane has been read",
        "error|not finite",
    ),
    "delta with the wrong sign": (
        "kernels/tiled_queries.cu",
        "own.minus_delta[2 * h] -= products[h];",
        "own.minus_delta[2 * h] += products[h];",
        "dq: error",
    ),
    "queries of other tiles weigh as well": (
        "kernels/tiled_queries.cu",
        "if (stored) state.own.lse[h] = LOG2_E",
        "state.own.lse[h] = LOG2_E",
        "drpb: error|not finite",
    ),
    "sums go on with tiles of another kind": (
        "common/tiled_gradients.cuh",
        "if (pass.change(next, its)) flags[next_turn] = 1;",
        ";",
        "drpb: error",
    ),
    "a warp's sums are lost": (
        "common/tiled_bias.cuh",
        "for (int warp = 0; warp < WARPS; ++warp) {",
        "for (int warp = 1; warp < WARPS; ++warp) {",
        "drpb: error",
    ),
    "dO . O of a lane's own elements": (
        "common/tiled_products_float32.cuh",
        "sum += __shfl_xor_sync(~0u, sum, 1);",
        ";",
        "dq: error",
    ),
    "results of other queries": (
        "common/tiled_products_float32.cuh",
        "multiply(sum[h], a, its[side][h], sum[h]);",
        "multiply(sum[h], a, its[side][0], sum[h]);",
        "dq: error",
    ),
    "rows are not masked": ("common/tiled_gradients.cuh", "& mask[h][e] & other)", "& mask[h][e])", "error"),
    "columns are not masked": ("common/tiled_gradients.cuh", "& mask[h][e] & other)", "& other)", "error"),
    "the last line is left out": (
        "common/tiled_gradients.cuh",
        "for (int line = 0; line < lines; ++line) {",
        "for (int line = 0; line < lines - 1; ++line) {",
        "dq: error",
    ),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_defects_are_noticed(defect: str, folder: Path, tmp_path: Path) -> None:
    file, text, replacement, error = DEFECTS[defect]
    sources = host.with_defect(tmp_path, file, text, replacement)
    options = {"region0": 1, "region1": 2, "blocks_per_sm": 1, "stages": 1}
    order = 2 if "overwritten" in defect else host.Order.LATE
    dtype = "float32" if "float32" in file else "float16"
    with pytest.raises((host.BlockError, AssertionError), match=error):
        judge(MAP, dtype, folder, options, order=order, sources=sources)
