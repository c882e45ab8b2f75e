"""The CPU backend through its pointer interface, against the definition."""

from __future__ import annotations

import dataclasses
import mmap
import os
import threading
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from natcore.backends import prepare
from natcore.backends.cpu import compiled, gradients, threads
from natcore.backends.cpu.executable import Executable
from natcore.planning import Config
from natcore.problem import OPERANDS, RESULTS, Problem, call_of, problem_of
from natcore.views import Device, View
from tests.cases import CASES, Case, check, expected, inputs, numpy_dtype, random_case

CPU = Device("cpu")
DTYPES = ("float64", "float32", "float16", "bfloat16")
#: Several slabs and tasks, in both directions; a table, and additional keys.
LARGE = Case("large", (40, 24), 5, heads=2, heads_kv=1, head_dim=16, head_dim_v=24, rpb="float32", extra=2)

Arrays = dict[str, np.ndarray]


def view(array: np.ndarray) -> View:
    strides = tuple(s // array.itemsize for s in array.strides)
    return View(array.ctypes.data, array.shape, strides, array.dtype.name, CPU)


def problem_for(case: Case, arrays: Arrays) -> tuple[Problem, float]:
    problem = problem_of(case.window, {n: view(a) for n, a in arrays.items() if n in OPERANDS["forward"]})
    return problem, problem.default_scale if case.scale is None else case.scale


def run(direction: str, case: Case, arrays: Arrays) -> None:
    """Executes one direction on exactly the operands in ``arrays``."""
    problem, scale = problem_for(case, arrays)
    operands = [arrays.get(name) for name in OPERANDS[direction]]
    views = {name: view(a) for name, a in zip(OPERANDS[direction], operands, strict=True) if a is not None}
    call = call_of(direction, problem, views)  # type: ignore[arg-type]
    prepare(call, CPU)([0 if a is None else a.ctypes.data for a in operands], scale)


def poisoned(case: Case, arrays: Arrays, direction: str) -> Arrays:
    """NaN in every result of a direction."""
    problem, _ = problem_for(case, arrays)
    return {
        name: np.full(problem.shapes[name], np.nan, numpy_dtype(problem.dtype_of(name)))
        for name in RESULTS[direction]
        if problem.has(name)
    }


def both(case: Case, arrays: Arrays) -> Arrays:
    """All results of a forward and a backward."""
    results = poisoned(case, arrays, "forward")
    run("forward", case, arrays | results)
    gradients = poisoned(case, arrays, "backward")
    run("backward", case, arrays | results | gradients)
    return results | gradients


def equal(a: Arrays, b: Arrays) -> bool:
    """Bit by bit."""
    return a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*CASES, LARGE], ids=lambda case: case.name)
def test_case(case: Case, dtype: str) -> None:
    arrays = inputs(case, dtype)
    check(case, dtype, arrays, both(case, arrays))


@settings(max_examples=100, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=random_case(), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
def test_random_case(case: Case, dtype: str, seed: int) -> None:
    arrays = inputs(case, dtype, seed)
    check(case, dtype, arrays, both(case, arrays))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_inputs_may_be_reversed_broadcast_or_spread_out(dtype: str) -> None:
    case = dataclasses.replace(LARGE, batch=2)
    arrays = inputs(case, dtype)
    arrays["q"] = arrays["q"][::-1, :, ::-1]
    arrays["k"] = np.broadcast_to(arrays["k"][:1], arrays["k"].shape)
    arrays["v"] = np.broadcast_to(arrays["v"][:, :, :1], arrays["v"].shape)
    arrays["d_out"] = np.concatenate([arrays["d_out"]] * 2, axis=-1)[:, ::-1, :, :, 3 : 3 + case.head_dim_v]
    arrays["rpb"] = arrays["rpb"][::-1, ::-1]
    arrays["additional_keys"] = arrays["additional_keys"][:, ::-1]
    check(case, dtype, arrays, both(case, arrays))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_results_may_be_strided_and_what_lies_between_stays(dtype: str) -> None:
    arrays = inputs(LARGE, dtype)
    plain = both(LARGE, arrays)
    for direction in ("forward", "backward"):
        wide = {}
        for name, a in poisoned(LARGE, arrays, direction).items():
            if "lse" not in name and name != "drpb":
                wide[name] = np.full((*a.shape[:-1], a.shape[-1] + 3), 7, a.dtype)
        results = {name: a[..., 1:-2] for name, a in wide.items()}
        run(direction, LARGE, arrays | ({} if direction == "forward" else plain) | results)
        for name, a in wide.items():
            assert (results[name] == plain[name]).all(), name
            assert (a[..., 0] == 7).all()
            assert (a[..., -2:] == 7).all()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", [*RESULTS["forward"], *RESULTS["backward"]])
def test_any_result_alone(name: str, dtype: str) -> None:
    arrays = inputs(LARGE, dtype)
    plain = both(LARGE, arrays)
    direction = "forward" if name in RESULTS["forward"] else "backward"
    given = arrays if direction == "forward" else arrays | {n: plain[n] for n in RESULTS["forward"]}
    result = poisoned(LARGE, arrays, direction)[name]
    run(direction, LARGE, given | {name: result})
    check(LARGE, dtype, arrays, {name: result})


def test_without_a_gradient_of_the_lse() -> None:
    arrays = inputs(LARGE, "float32")
    arrays["d_lse"][:] = 0
    plain = both(LARGE, arrays)
    check(LARGE, "float32", arrays, plain)
    del arrays["d_lse"]
    assert equal(both(LARGE, arrays), plain)


def test_an_empty_batch_has_zero_gradient_of_the_bias() -> None:
    case = dataclasses.replace(LARGE, batch=0)
    results = both(case, inputs(case, "float32"))
    assert results["drpb"].shape == (2, 9, 9)
    assert not results["drpb"].any()


def _alone(monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    monkeypatch.setattr(threads, "worker_count", lambda: workers)
    monkeypatch.setattr(gradients, "worker_count", lambda: workers)
    monkeypatch.setattr(threads, "_pool", None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("batch", [1, 48])
def test_results_do_not_depend_on_time_or_threads(batch: int, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = dataclasses.replace(LARGE, batch=batch)
    arrays = inputs(case, dtype)
    first = both(case, arrays)
    for workers in (1, 2, 5, 5, 5):
        _alone(monkeypatch, workers)
        assert equal(both(case, arrays), first)


def test_the_sums_of_slabs_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several slabs per (batch entry, kv head) really occur here, and several waves of them."""
    _alone(monkeypatch, 1)
    arrays = inputs(dataclasses.replace(LARGE, batch=9), "float16")
    problem, _ = problem_for(LARGE, arrays)
    executable = prepare(call_of("backward", problem, {n: view(a) for n, a in arrays.items()}), CPU)
    assert isinstance(executable, Executable)
    assert len(executable.sharing.slabs) > 2
    case = dataclasses.replace(LARGE, batch=9)
    check(case, "float16", arrays, both(case, arrays))


def test_many_threads_at_once() -> None:
    cases = [LARGE, *CASES[:6]]
    jobs = [(case, inputs(case, dtype)) for case in cases for dtype in ("float32", "float16")]
    alone = [both(case, arrays) for case, arrays in jobs]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            for a, b in zip(pool.map(lambda job: both(*job), jobs), alone, strict=True):
                assert equal(a, b)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_after_fork_and_in_both_processes() -> None:
    arrays = inputs(LARGE, "float32")
    before = both(LARGE, arrays)
    busy = threading.Event()
    worker = threading.Thread(target=lambda: [both(LARGE, arrays) for _ in iter(busy.is_set, True)])
    worker.start()
    try:
        for _ in range(3):
            child = os.fork()
            if child == 0:
                os._exit(0 if equal(both(LARGE, arrays), before) else 1)
            assert os.waitpid(child, 0)[1] == 0
            assert equal(both(LARGE, arrays), before)
    finally:
        busy.set()
        worker.join()


def test_a_key_reaches_exactly_the_queries_that_see_it() -> None:
    case = Case("locality", (12, 14), (3, 5), dilation=(2, 1), heads=2, heads_kv=2)
    arrays = inputs(case, "float32")
    plain = both(case, arrays)
    changed = {name: a.copy() for name, a in arrays.items()}
    changed["v"][0, 4, 6, 1] += 1
    seen = expected(case, changed)["out"] != expected(case, arrays)["out"]
    assert ((both(case, changed)["out"] != plain["out"]) == seen).all()
    assert 0 < seen.sum() < seen.size


def test_a_query_that_is_nan_gives_nan_to_itself_alone() -> None:
    arrays = inputs(LARGE, "float32")
    arrays["q"][0, 3, 5, 1, 2] = np.nan
    results = both(LARGE, arrays)
    for name in ("out", "dq"):
        nan = np.asarray(np.isnan(results[name]).any(axis=-1))
        assert nan.sum() == 1, name
        assert nan[0, 3, 5, 1], name


@pytest.fixture
def far_memory() -> Iterator[mmap.mmap]:
    """5 GiB of addresses, of which only what is touched is real."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    try:
        memory = mmap.mmap(-1, 5 << 30, flags=flags)
    except OSError as error:
        pytest.skip(f"no 5 GiB of addresses: {error}")
    yield memory


def test_offsets_beyond_32_bits(far_memory: mmap.mmap) -> None:
    case = Case("far", (2, 6), (1, 3))
    far = (1 << 31) + 64  # elements between the two rows of the map
    arrays = inputs(case, "float16")
    for i, name in enumerate(("q", "k", "v", "d_out")):
        place = np.ndarray(arrays[name].shape, "float16", far_memory, i << 12, (2, far * 2, 16, 16, 2))
        place[...] = arrays[name]
        arrays[name] = place
    check(case, "float16", arrays, both(case, arrays))


def test_memory_is_linear_in_the_input() -> None:
    peaks = []
    for size in (48, 96):
        case = Case("square", (size, size), 7, head_dim=32, head_dim_v=32)
        arrays = inputs(case, "float16")
        results = poisoned(case, arrays, "forward") | poisoned(case, arrays, "backward")
        tracemalloc.start()
        for direction in ("forward", "backward"):
            run(direction, case, arrays | results)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert peaks[-1] < 8e6 + 4 * arrays["q"].nbytes
    assert peaks[1] < 4.5 * peaks[0]


def test_kernels_compile_without_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    real, asked = compiled.njit, []

    def njit(**options: Any) -> Any:
        asked.append(options.get("cache", False))
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return real(**options)

    monkeypatch.setattr(compiled, "njit", njit)
    assert compiled.kernel.__wrapped__("store_all", "float32").signatures
    assert asked == [True, False]


def test_a_processor_without_float16_conversions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(compiled, "get_host_cpu_features", lambda: {"avx": True, "f16c": False})
    with pytest.raises(NotImplementedError, match="x86-64-v3"):
        compiled.kernel.__wrapped__("store_all", "float32")


def test_a_config_is_refused() -> None:
    arrays = inputs(LARGE, "float32")
    problem, _ = problem_for(LARGE, arrays)
    call = call_of("forward", problem, {n: view(a) for n, a in arrays.items()})
    with pytest.raises(NotImplementedError, match="tiled"):
        prepare(call, CPU, Config("tiled"))
