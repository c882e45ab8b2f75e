"""Unfused attention and dropout in the general kernels' own source, run on the host (see tests/host)."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from natcore.planning import facts_for_arch, plan_for
from natcore.problem import OPERANDS, RESULTS, Direction, Problem, call_of, problem_of
from natcore.unfused import unfused_problem_of
from natcore.views import Device, View
from tests import host
from tests.cases import CASES, DROPOUT_CASES, Case, check, inputs, numpy_dtype, random_case
from tests.host.cases import Arrays, poisoned, spread, view
from tests.test_general_kernels import WIDE_TABLE
from tests.unfused import DIRECTIONS, unfused_check, unfused_inputs

pytestmark = pytest.mark.skipif(host.COMPILER is None, reason="needs a C++ compiler")
FACTS = facts_for_arch("sm_90a")
BY_NAME = {case.name: case for case in CASES}


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("host_unfused")


def run(direction: Direction, case: Case, arrays: Arrays, folder: Path, strided: bool = False) -> Arrays:
    """The results of one direction, in memory that was NaN, as is the workspace."""
    inputs = {n: view(x) for n, x in arrays.items() if n in OPERANDS[direction] and n not in RESULTS[direction]}
    unfused = direction in DIRECTIONS
    problem: Problem = (
        unfused_problem_of(direction, case.window, inputs)
        if unfused
        else problem_of(case.window, inputs, case.dropout_p)
    )
    results = {
        n: poisoned(problem.shapes[n], numpy_dtype(problem.dtype_of(n)), strided)
        for n in RESULTS[direction]
        if problem.has(n)
    }
    given = [(arrays | results).get(n) for n in OPERANDS[direction]]
    views = {n: None if x is None else view(x) for n, x in zip(OPERANDS[direction], given, strict=True)}
    plan = plan_for(call_of(direction, problem, views), FACTS, host.CONFIG)
    scale = case.scale if case.scale is not None else 1.0 if unfused else problem.default_scale
    workspace = host.aligned_bytes(plan.workspace_bytes)
    host.run(plan, [0 if x is None else x.ctypes.data for x in given], scale, workspace.ctypes.data, folder)
    return results


def everything(case: Case, dtype: str, folder: Path, strided: bool = False) -> None:
    arrays = unfused_inputs(case, dtype)
    arrays = {n: spread(x) for n, x in arrays.items()} if strided else arrays
    results = {n: x for direction in DIRECTIONS for n, x in run(direction, case, arrays, folder, strided).items()}
    unfused_check(case, dtype, arrays, results)


@pytest.mark.parametrize("case", [*CASES, WIDE_TABLE], ids=lambda c: c.name)
def test_unfused(case: Case, folder: Path):
    everything(case, "float64", folder)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ["nat_packed", "additional_keys"])
def test_unfused_dtypes(name: str, dtype: str, folder: Path):
    everything(BY_NAME[name], dtype, folder)


@pytest.mark.parametrize("name", ["nat_block", "mqa", "video"])
def test_unfused_strided(name: str, folder: Path):
    everything(BY_NAME[name], "float64", folder, strided=True)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=random_case(max_tokens=100))
def test_random_unfused_problems(case: Case, folder: Path):
    """Any window; head dimensions are pinned, so that few kernels are compiled."""
    pinned = {"head_dim": 4, "head_dim_v": 4, "rpb": "float32" if case.rpb else None}
    everything(Case(**{**vars(case), **pinned}), "float64", folder)


@pytest.mark.parametrize("dtype", ["float64", "float16"])
@pytest.mark.parametrize("case", DROPOUT_CASES, ids=lambda c: c.name)
def test_dropout(case: Case, dtype: str, folder: Path):
    arrays = inputs(case, dtype)
    arrays |= run("forward", case, arrays, folder)
    results = {n: arrays[n] for n in ("out", "lse")} | run("backward", case, arrays, folder)
    check(case, dtype, arrays, results)


def test_only_the_general_kernels_drop_weights():
    case = Case("dropout", (16, 16), 7, head_dim=32, head_dim_v=32, dropout_p=0.5)
    arrays = inputs(case, "float16")
    with_seed = {n: view(x) for n, x in arrays.items() if n in OPERANDS["forward"]}
    plans = []
    for p in (0.0, 0.25, 0.5):
        views = with_seed if p else {n: x for n, x in with_seed.items() if n != "dropout_seed"}
        problem = problem_of(case.window, views, p)
        views |= {"out": View(0, problem.shapes["out"], with_seed["q"].strides, "float16", Device("cpu"))}
        plans.append(plan_for(call_of("forward", problem, views), FACTS))
    names = [[launch.kernel.name for launch in plan.launches] for plan in plans]
    assert names == [["resident_forward"], ["general_forward"], ["general_forward"]]
    assert plans[1].launches[0].kernel == plans[2].launches[0].kernel, "another probability needs no other kernel"
