"""Unfused attention and dropout: their definitions, and the CPU backend through its pointer interface."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from natcore import reference, reference_unfused
from natcore.backends import prepare
from natcore.problem import OPERANDS, RESULTS, Direction, Problem, call_of, problem_of
from natcore.reference_dropout import factors, philox
from natcore.unfused import unfused_problem_of
from natcore.views import Device, View
from tests.cases import CASES, DROPOUT_CASES, Case, check, inputs, numpy_dtype, random_case
from tests.unfused import DIRECTIONS, unfused_check, unfused_inputs

CPU = Device("cpu")
DTYPES = ("float64", "float32", "float16", "bfloat16")
#: Several slabs and tasks, and more keys than a chunk has.
LARGE = Case("large", (40, 24), 11, heads=2, heads_kv=1, head_dim=16, head_dim_v=24, rpb="float32", extra=2)

Arrays = dict[str, np.ndarray]


def view(x: np.ndarray) -> View:
    return View(x.ctypes.data, x.shape, tuple(s // x.itemsize for s in x.strides), x.dtype.name, CPU)


def problem_for(direction: Direction, case: Case, arrays: Arrays) -> Problem:
    given = {n: view(x) for n, x in arrays.items() if n in OPERANDS[direction] and n not in RESULTS[direction]}
    if direction in DIRECTIONS:
        return unfused_problem_of(direction, case.window, given)
    return problem_of(case.window, given, case.dropout_p)


def run(direction: Direction, case: Case, arrays: Arrays) -> Arrays:
    """The results of one direction, in memory that was NaN."""
    problem = problem_for(direction, case, arrays)
    results = {
        name: np.full(problem.shapes[name], np.nan, numpy_dtype(problem.dtype_of(name)))
        for name in RESULTS[direction]
        if problem.has(name)
    }
    given = [(arrays | results).get(name) for name in OPERANDS[direction]]
    views = {n: None if x is None else view(x) for n, x in zip(OPERANDS[direction], given, strict=True)}
    scale = case.scale if case.scale is not None else 1.0 if direction in DIRECTIONS else problem.default_scale
    prepare(call_of(direction, problem, views), CPU)([0 if x is None else x.ctypes.data for x in given], scale)
    return results


def unfused(case: Case, arrays: Arrays) -> Arrays:
    return {name: x for direction in DIRECTIONS for name, x in run(direction, case, arrays).items()}


def fused(case: Case, arrays: Arrays) -> Arrays:
    results = run("forward", case, arrays)
    return results | run("backward", case, arrays | results)


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_definitions_agree(case: Case):
    """av(softmax(qk)) is attention, and so is the chain of their gradients."""
    x = inputs(case, "float64")
    scale = case.its_scale
    bias, keys, values = (x.get(n) for n in ("rpb", "additional_keys", "additional_values"))
    window, (q, k, v) = case.window, (x[n] for n in "qkv")
    out, _ = reference.forward(q, k, v, window, scale=scale, rpb=bias, additional_keys=keys, additional_values=values)
    fused = reference.backward(
        x["d_out"], q, k, v, window, scale=scale, rpb=bias, additional_keys=keys, additional_values=values
    )
    weights = softmax(reference_unfused.qk(q, k, window, scale=scale, rpb=bias, additional_keys=keys))
    np.testing.assert_allclose(reference_unfused.av(weights, v, window, additional_values=values), out, atol=1e-12)
    av = reference_unfused.av_backward(x["d_out"], weights, v, window, additional_values=values)
    d_scores = weights * (av.d_weights - (weights * av.d_weights).sum(axis=-1, keepdims=True))
    qk = reference_unfused.qk_backward(d_scores, q, k, window, scale=scale, rpb=bias, additional_keys=keys)
    for name, expected in fused._asdict().items():
        actual = qk._asdict().get(name, av._asdict().get(name))
        assert (actual is None) is (expected is None)
        if expected is not None:
            np.testing.assert_allclose(actual, expected, atol=1e-10, err_msg=name)


def test_philox():
    """Known answers of Random123 (kat_vectors, philox2x32 10)."""
    for counter, key, words in (
        (0, 0, (0xFF1DAE59, 0x6CD10DF2)),
        ((1 << 64) - 1, 0xFFFFFFFF, (0x2C3F628B, 0xAB4FD7AD)),
        (0x85A308D3_243F6A88, 0x13198A2E, (0xDD7CE038, 0xF62A4C12)),
    ):
        assert tuple(int(word) for word in philox(np.uint64(counter), key)) == words


def test_dropout_is_what_it_says():
    """Of many weights the right share is kept, whatever the seed, and each of them is divided by 1 - p."""
    window, spatial = CASES[0].window, (40, 40)
    kept = []
    for seed in (0, 1, 2**31):
        weights = factors(window, 1, spatial, 4, 0, 0.3, seed)
        assert set(np.unique(weights)) == {0, 1 / 0.7}
        kept.append(weights > 0)
        pairs = 1600 * 49 * 4
        assert abs(kept[-1].sum() / pairs - 0.7) < 5 * (0.21 / pairs) ** 0.5
    both = (kept[0] & kept[1]).sum() / pairs
    assert abs(both - 0.49) < 5 * (0.25 / pairs) ** 0.5, "seeds are not independent"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*CASES, LARGE], ids=lambda c: c.name)
def test_unfused_on_the_cpu(case: Case, dtype: str):
    arrays = unfused_inputs(case, dtype)
    unfused_check(case, dtype, arrays, unfused(case, arrays))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(random_case(max_tokens=100), st.sampled_from(("float64", "float32")))
def test_random_unfused_problems_on_the_cpu(case: Case, dtype: str):
    arrays = unfused_inputs(case, dtype)
    unfused_check(case, dtype, arrays, unfused(case, arrays))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", DROPOUT_CASES, ids=lambda c: c.name)
def test_dropout_on_the_cpu(case: Case, dtype: str):
    arrays = inputs(case, dtype)
    check(case, dtype, arrays, fused(case, arrays))


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(random_case(max_tokens=100), st.floats(0.01, 0.99), st.integers(0, 2**32 - 1))
def test_random_dropout_on_the_cpu(case: Case, p: float, seed: int):
    # Of a score of exactly 0 the tolerance is 0, too: left to the tests without dropout.
    changes = {"dropout_p": p, "dropout_seed": seed, "scale": case.scale or None}
    case = Case(**{**vars(case), **changes})
    arrays = inputs(case, "float64")
    check(case, "float64", arrays, fused(case, arrays))


@pytest.mark.parametrize(
    ("direction", "changes", "words"),
    [
        ("qk", {"q": (2, 8, 4, 16)}, ["q has 4 axes", "na2d_qk"]),
        ("qk", {"k": (2, 8, 9, 4, 8)}, ["q", "(2, 8, 9, 4, 16)", "(2, 8, 9, 4, 8)", "axis 4"]),
        ("qk", {"k": (2, 8, 9, 3, 16)}, ["4 heads", "3", "multiple"]),
        ("qk", {"rpb": (4, 5, 4)}, ["rpb", "(4, 5, 4)", "axis 2"]),
        ("qk", {"additional_keys": (2, 0, 4, 16)}, ["additional_keys", "extra >= 1"]),
        ("av", {"weights": (2, 8, 9, 4, 8)}, ["weights", "(2, 8, 9, 4, 9)", "axis 4"]),
        ("av", {"additional_values": (2, 3, 4, 16)}, ["weights", "(2, 8, 9, 4, 12)"]),
        ("av", {"v": (2, 8, 8, 4, 16)}, ["v", "axis 2"]),
    ],
)
def test_bad_unfused_problems(direction: Direction, changes: dict, words: list[str]):
    shapes = {"q": (2, 8, 9, 4, 16), "k": (2, 8, 9, 4, 16), "v": (2, 8, 9, 4, 16), "weights": (2, 8, 9, 4, 9)}
    views = {n: view(np.zeros(s, np.float32)) for n, s in (shapes | changes).items() if n in OPERANDS[direction]}
    with pytest.raises(ValueError) as error:
        unfused_problem_of(direction, Case("window", (8, 9), 3).window, views)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, float("nan")])
def test_bad_dropout(p: float):
    views = {n: view(np.zeros((1, 4, 1, 4), np.float32)) for n in "qkv"}
    with pytest.raises(ValueError, match="dropout_p"):
        problem_of(Case("window", (4,), 3).window, views | {"dropout_seed": view(np.zeros(1, np.uint32))}, p)
