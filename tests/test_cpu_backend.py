"""The CPU backend through its pointer interface, against the definition."""

from __future__ import annotations

import numpy as np
import pytest

from natcore.backends import prepare
from natcore.problem import OPERANDS, RESULTS, Problem, call_of, problem_of
from natcore.views import Device, View
from tests.cases import CASES, Case, check, inputs, numpy_dtype

CPU = Device("cpu")
DTYPES = ("float64", "float32", "float16", "bfloat16")


def view(array: np.ndarray) -> View:
    strides = tuple(s // array.itemsize for s in array.strides)
    return View(array.ctypes.data, array.shape, strides, array.dtype.name, CPU)


def run(direction: str, problem: Problem, arrays: dict[str, np.ndarray], scale: float) -> None:
    """Executes one direction on exactly the operands in ``arrays``."""
    given = {name: arrays[name] for name in OPERANDS[direction] if name in arrays}
    call = call_of(direction, problem, {name: view(a) for name, a in given.items()})  # type: ignore[arg-type]
    pointers = [given[name].ctypes.data if name in given else 0 for name in OPERANDS[direction]]
    prepare(call, CPU)(pointers, scale)


def poisoned(problem: Problem, direction: str) -> dict[str, np.ndarray]:
    """NaN in every result of a direction."""
    return {
        name: np.full(problem.shapes[name], np.nan, numpy_dtype(problem.dtype_of(name)))
        for name in RESULTS[direction]
        if problem.has(name)
    }


def problem_for(case: Case, arrays: dict[str, np.ndarray]) -> tuple[Problem, float]:
    problem = problem_of(case.window, {n: view(a) for n, a in arrays.items() if n in OPERANDS["forward"]})
    return problem, problem.default_scale if case.scale is None else case.scale


def both(case: Case, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All results of a forward and a backward."""
    problem, scale = problem_for(case, arrays)
    results = poisoned(problem, "forward")
    run("forward", problem, arrays | results, scale)
    gradients = poisoned(problem, "backward")
    run("backward", problem, arrays | results | gradients, scale)
    return results | gradients


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case: Case, dtype: str) -> None:
    arrays = inputs(case, dtype)
    check(case, dtype, arrays, both(case, arrays))
