"""The general kernels' own source, run on the host (see tests/host): geometry, strides, plans, gradients."""

from __future__ import annotations

import ctypes
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings

from natcore.planning import facts_for_arch
from natcore.problem import OPERANDS, RESULTS, Direction, problem_of
from natcore.reference import neighborhood
from tests import host
from tests.cases import CASES, Case, check, inputs, numpy_dtype, random_case
from tests.host.cases import plan_of, poisoned, spread, view

pytestmark = pytest.mark.skipif(host.COMPILER is None, reason="needs a C++ compiler")
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")
FACTS = facts_for_arch("sm_90a")
WIDE_TABLE = Case("wide_table", (45,), 20, rpb="float32")
SOME = [c for c in CASES if c.name in ("nat_packed", "gqa", "additional_keys", "odd_head_dim")]


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("host_kernels")


def run(direction: Direction, case: Case, arrays: dict[str, np.ndarray], folder: Path) -> None:
    """Runs a plan; results are arrays among the operands. The workspace starts as NaN."""
    plan = plan_of(direction, case, arrays, host.CONFIG, FACTS)
    workspace = host.aligned_bytes(plan.workspace_bytes)
    pointers = [arrays[n].ctypes.data if n in arrays else 0 for n in OPERANDS[direction]]
    scale = case.its_scale
    host.run(plan, pointers, scale, workspace.ctypes.data, folder)


def everything(case: Case, dtype: str, folder: Path, strided: bool = False) -> None:
    """Forward and backward of a case against the reference."""
    arrays = inputs(case, dtype)
    if strided:
        arrays = {name: spread(x) for name, x in arrays.items()}
    problem = problem_of(case.window, {n: view(arrays[n]) for n in arrays if not n.startswith("d_")})
    results = {
        name: poisoned(problem.shapes[name], numpy_dtype(problem.dtype_of(name)), strided)
        for direction in DIRECTIONS
        for name in RESULTS[direction]
        if problem.has(name)
    }
    arrays |= results
    run("forward", case, arrays, folder)
    run("backward", case, arrays, folder)
    check(case, dtype, arrays, results)


@pytest.fixture(scope="session")
def compiled(folder: Path) -> Path:
    """The folder, with all kernels of the fixed cases: compiled two at a time."""
    specs = set()
    for case, dtype in [(c, "float64") for c in CASES] + [
        (c, d) for c in SOME for d in ("float32", "float16", "bfloat16")
    ]:
        arrays = inputs(case, dtype)
        problem = problem_of(case.window, {n: view(arrays[n]) for n in arrays if not n.startswith("d_")})
        for direction in DIRECTIONS:
            full = arrays | {
                n: poisoned(problem.shapes[n], numpy_dtype(problem.dtype_of(n)), False)
                for n in OPERANDS[direction]
                if n not in arrays and problem.has(n)
            }
            specs |= {launch.kernel for launch in plan_of(direction, case, full, host.CONFIG, FACTS).launches}
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda spec: host.kernel(spec, folder), specs))
    return folder


@pytest.mark.parametrize("case", [*CASES, WIDE_TABLE], ids=lambda c: c.name)
def test_cases_float64(case: Case, compiled: Path):
    everything(case, "float64", compiled)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("case", SOME, ids=lambda c: c.name)
def test_other_dtypes(case: Case, dtype: str, compiled: Path):
    everything(case, dtype, compiled)


@pytest.mark.parametrize("name", ["nat_block", "gqa", "additional_keys", "video"])
def test_strided(name: str, folder: Path):
    """Gaps full of NaN and a negative stride on every operand and result."""
    everything(next(c for c in CASES if c.name == name), "float64", folder, strided=True)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_random_problems(dtype: str, folder: Path):
    """Any window; head dimensions are pinned, so that few kernels are compiled."""

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(case=random_case(max_tokens=100))
    def judge(case: Case) -> None:
        pinned = {"head_dim": 4, "head_dim_v": 8, "rpb": "float32" if case.rpb else None}
        everything(replace(case, **pinned), dtype, folder)

    judge()


def test_absent_results_and_d_lse(folder: Path):
    """Each gradient alone, without d_lse, equals the one computed with all others."""
    case = next(c for c in CASES if c.name == "additional_keys")
    arrays = inputs(case, "float64")
    del arrays["d_lse"]
    problem = problem_of(case.window, {n: view(arrays[n]) for n in arrays if n != "d_out"})
    arrays |= {name: poisoned(problem.shapes[name], np.dtype(float), False) for name in ("out", "lse")}
    without_lse = {n: x for n, x in arrays.items() if n != "lse"} | {"out": arrays["out"].copy()}
    run("forward", case, arrays, folder)
    run("forward", case, without_lse, folder)
    np.testing.assert_array_equal(arrays["out"], without_lse["out"])
    full = {name: poisoned(problem.shapes[name], np.dtype(float), False) for name in RESULTS["backward"]}
    run("backward", case, arrays | full, folder)
    for name, expected in full.items():
        assert np.isfinite(expected).all()
        alone = poisoned(expected.shape, expected.dtype, False)
        run("backward", case, {**arrays, name: alone}, folder)
        np.testing.assert_array_equal(alone, expected)


def test_windows_and_their_inverse(folder: Path):
    """keys_of against the definition and queries_of against its inverse, for every problem up to extent 24."""
    library = host.build("window.cc", folder, {})
    cases = [
        (extent, kernel, stride, dilation, causal)
        for extent in range(1, 25)
        for kernel in range(1, extent + 1)
        for dilation in range(1, extent // kernel + 1)
        for stride in range(1, kernel + 1)
        for causal in (0, 1)
    ]
    assert len(cases) > 5000
    for case in cases:
        extent, _, _, dilation, _ = case
        keys, queries = ((ctypes.c_int * (2 * extent))() for _ in range(2))
        library.keys_and_queries(*case, keys, queries)
        seers = defaultdict(list)  # of each key position, the in-group indices of the queries that see it
        for x in range(extent):
            start, end = neighborhood(x, *case[:4], bool(case[4]))
            assert (keys[2 * x], keys[2 * x + 1]) == (start, end), (case, x)
            for n in range(start, end):
                seers[n * dilation + x % dilation].append(x // dilation)
        for x in range(extent):
            assert list(range(queries[2 * x], queries[2 * x + 1])) == seers[x], (case, x)
