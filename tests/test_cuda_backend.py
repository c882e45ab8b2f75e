"""The CUDA backend at the pointer level: every case and dtype, ugly memory, streams, threads, repeats.

All memory lies between guards: results and workspace start as NaN, and what is not written stays NaN.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from natcore.backends import prepare
from natcore.backends.cuda import facts, load_plan
from natcore.compiling import compile_kernels
from natcore.device import check as check_driver
from natcore.device import current, driver, prepare_launch
from natcore.errors import CudaError
from natcore.planning import Config, KernelSpec, plan_for
from natcore.problem import OPERANDS, RESULTS, Call, Direction, call_of, problem_of
from natcore.views import View, contiguous_strides
from tests.cases import CASES, Case, check, inputs, numpy_dtype, random_case
from tests.scattered import CUDA, GUARD, Array, placed, view_of

pytestmark = pytest.mark.gpu
torch = pytest.importorskip("torch")

DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")
GENERAL = Config("general")
MORE = [
    Case("wide_table", (45,), 20, rpb="float32", head_dim=16, head_dim_v=16),
    Case(
        "wide_tables", (20, 41), (3, 18), dilation=(2, 2), heads=2, heads_kv=1, head_dim=32, head_dim_v=32, rpb="same"
    ),
]
DTYPES = ("float64", "float32", "float16", "bfloat16")
BY_NAME = {case.name: case for case in CASES}
#: Of random problems: dtype, head_dim, head_dim_v. With the windows' strips and rpb, about 60 kernels.
RANDOM_BUILDS = (("float16", 32, 32), ("float32", 24, 8), ("bfloat16", 5, 3))


def array(shape, dtype: str, values: np.ndarray | None = None, layout: str = "contiguous") -> Array:
    """An array of NaN, or with ``values``. Layouts: contiguous, misaligned (by one element), gaps (on every
    axis but the last, negative stride on the second)."""
    size = numpy_dtype(dtype).itemsize
    strides = list(contiguous_strides(shape))
    start = GUARD + (size if layout == "misaligned" else 0)
    if layout == "gaps":
        wide = (*(2 * n for n in shape[:-1]), -(-shape[-1] // 8) * 8)
        strides = [2 * s for s in contiguous_strides(wide)[:-1]] + [1]
        start += (shape[1] - 1) * strides[1] * size
        strides[1] = -strides[1]
    return placed(shape, strides, dtype, values, start)


def run(direction: Direction, case: Case, arrays: dict[str, Array], config: Config | None, stream: int = 0) -> None:
    """Prepares and runs one direction on these arrays; operands without an array are absent."""
    views = {n: a.view for n, a in arrays.items() if n in OPERANDS[direction]}
    executable = prepare(call_of(direction, problem_of(case.window, views), views), CUDA, config)
    workspace = torch.full((executable.workspace_bytes + 2 * GUARD,), 0xFF, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    pointers = [views[n].ptr if n in views else 0 for n in OPERANDS[direction]]
    scale = case.its_scale
    executable(pointers, scale, stream, workspace.data_ptr() + GUARD)
    torch.cuda.synchronize()
    guards = torch.cat([workspace[:GUARD], workspace[-GUARD:]])
    assert bool((guards == 0xFF).all()), "memory around the workspace was written"


def upload(case: Case, dtype: str, layout: str = "contiguous", seed: int = 0) -> tuple[dict, dict[str, Array]]:
    """Host inputs, and device arrays of inputs and (poisoned) results."""
    host = inputs(case, dtype, seed)
    kinds = {n: x.dtype.name for n, x in host.items()}
    device = {n: array(x.shape, kinds[n], x, layout) for n, x in host.items()}
    problem = problem_of(case.window, {n: a.view for n, a in device.items() if not n.startswith("d_")})
    names = [n for direction in DIRECTIONS for n in RESULTS[direction] if problem.has(n)]
    device |= {n: array(problem.shapes[n], problem.dtype_of(n), None, layout) for n in names}
    return host, device


def everything(case: Case, dtype: str, config: Config | None, layout: str = "contiguous", seed: int = 0) -> dict:
    """Forward and backward, checked against the reference; returns the results."""
    host, device = upload(case, dtype, layout, seed)
    run("forward", case, device, config)
    run("backward", case, device, config)
    results = {n: device[n].get() for n in device if n not in host}
    check(case, dtype, host, results)
    return results


def specs_of(case: Case, dtype: str) -> set[KernelSpec]:
    """All kernels of a case."""
    kinds = {n: (x.shape, x.dtype.name) for n, x in inputs(case, dtype).items()}
    views = {n: View(0, shape, contiguous_strides(shape), kind, CUDA) for n, (shape, kind) in kinds.items()}
    problem = problem_of(case.window, {n: v for n, v in views.items() if not n.startswith("d_")})
    specs = set()
    for direction in DIRECTIONS:
        strides = (contiguous_strides(problem.shapes[n]) if problem.has(n) else None for n in OPERANDS[direction])
        plan = plan_for(Call(direction, problem, tuple(strides)), facts(0), GENERAL)
        specs |= {launch.kernel for launch in plan.launches}
    return specs


@pytest.fixture(scope="module")
def compiled() -> None:
    """The kernels of all cases, compiled at once."""
    compile_kernels(set().union(*(specs_of(case, dtype) for case, dtype in product(CASES + MORE, DTYPES))))


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES + MORE, ids=lambda c: c.name)
def test_cases(case: Case, dtype: str):
    everything(case, dtype, GENERAL)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["nat_block", "gqa", "additional_keys", "video", "odd_head_dim", "causal_mix"])
def test_gaps_and_negative_strides(name: str, dtype: str):
    everything(BY_NAME[name], dtype, GENERAL, "gaps")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["nat_block", "gqa", "additional_keys"])
def test_misaligned_pointers(name: str, dtype: str):
    """Without a config they are served; an explicit one that cannot serve them says so."""
    everything(BY_NAME[name], dtype, None, "misaligned")
    with pytest.raises(ValueError, match="not a multiple of the 16 bytes"):
        everything(BY_NAME[name], dtype, GENERAL, "misaligned")


@pytest.fixture(scope="module")
def compiled_for_random() -> None:
    def cases():
        for dtype, d, dv in RANDOM_BUILDS:
            for kernel, rpb in product(range(1, 10), (None, "float32")):
                yield Case("", (kernel,), kernel, head_dim=d, head_dim_v=dv, rpb=rpb, extra=1), dtype

    specs = set().union(*(specs_of(case, dtype) for case, dtype in cases()))
    assert len(specs) <= 75
    compile_kernels(specs)


@pytest.mark.usefixtures("compiled_for_random")
@pytest.mark.parametrize("build", RANDOM_BUILDS, ids=lambda b: b[0])
def test_random_problems(build: tuple[str, int, int]):
    dtype, head_dim, head_dim_v = build

    @settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    @given(case=random_case())
    def judge(case: Case) -> None:
        rpb = "float32" if case.rpb else None
        everything(replace(case, head_dim=head_dim, head_dim_v=head_dim_v, rpb=rpb), dtype, GENERAL)

    judge()


@pytest.mark.parametrize("lanes", [1, 2, 8, 16, 32])
def test_any_number_of_lanes(lanes: int):
    """Rows over more lanes than they have chunks, and over fewer."""
    everything(BY_NAME["head_dim_80_v_48"], "float32", Config("general", (("lanes", lanes),)))
    everything(BY_NAME["mqa"], "float16", Config("general", (("lanes", lanes), ("vector", 2))))


def test_absent_results():
    """Each gradient alone equals the one computed with all others."""
    case = BY_NAME["additional_keys"]
    _, device = upload(case, "float32")
    run("forward", case, device, GENERAL)
    run("backward", case, device, GENERAL)
    for name in RESULTS["backward"]:
        alone = array(device[name].view.shape, device[name].view.dtype)
        others = {n: a for n, a in device.items() if n not in RESULTS["backward"]}
        run("backward", case, {**others, name: alone}, GENERAL)
        np.testing.assert_array_equal(alone.get(), device[name].get())


def test_repeats_are_bitwise_equal():
    """200 runs, with edges, ragged groups, GQA, bias and additional keys: no order may vary."""
    case = Case(
        "repeats", (33, 47), (5, 7), dilation=(3, 2), heads=4, heads_kv=2, head_dim=32, head_dim_v=32, rpb="float32",
        extra=3, batch=2,
    )  # fmt: skip
    everything(case, "float16", GENERAL)
    host, device = upload(case, "float16")
    views = {n: a.view for n, a in device.items()}
    problem = problem_of(case.window, {n: v for n, v in views.items() if not n.startswith("d_")})
    runs = {d: prepare(call_of(d, problem, {n: views.get(n) for n in OPERANDS[d]}), CUDA, GENERAL) for d in DIRECTIONS}
    workspace = torch.empty(runs["backward"].workspace_bytes, dtype=torch.uint8, device="cuda")
    stream = torch.cuda.current_stream().cuda_stream
    results = {n: device[n].memory for n in device if n not in host}
    first: dict[str, Any] = {}
    for _ in range(200):
        for tensor in (*results.values(), workspace):
            tensor.fill_(0xFF)
        for direction, executable in runs.items():
            pointers = [views[n].ptr if n in views else 0 for n in OPERANDS[direction]]
            executable(pointers, 0.2, stream, workspace.data_ptr())
        first = first or {n: tensor.clone() for n, tensor in results.items()}
        assert all(torch.equal(tensor, first[n]) for n, tensor in results.items())


def test_work_is_ordered_by_the_given_stream():
    """Inputs that arrive late on the stream are waited for."""
    case = BY_NAME["nat_block"]
    host, device = upload(case, "float32")
    late = {n: device[n].memory.clone() for n in "qkv"}
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    views = {n: device[n].view for n in OPERANDS["forward"] if n in device}
    executable = prepare(call_of("forward", problem_of(case.window, views), views), CUDA, GENERAL)
    with torch.cuda.stream(stream):
        for n in "qkv":
            device[n].memory.fill_(0xFF)
        torch.cuda._sleep(50_000_000)
        for n in "qkv":
            device[n].memory.copy_(late[n])
        pointers = [views[n].ptr if n in views else 0 for n in OPERANDS["forward"]]
        executable(pointers, case.head_dim**-0.5, stream.cuda_stream, 0)
    stream.synchronize()
    check(case, "float32", host, {n: device[n].get() for n in ("out", "lse")})


def test_threads_share_an_executable():
    """Eight fresh threads, without a current context, on the default stream and on their own."""
    case = BY_NAME["nat_block"]
    sets = [upload(case, "float16", seed=seed) for seed in range(8)]
    streams = [0 if i % 2 else torch.cuda.Stream().cuda_stream for i in range(8)]
    views = {n: a.view for n, a in sets[0][1].items()}
    executables = {
        d: prepare(call_of(d, problem_of(case.window, views), {n: views.get(n) for n in OPERANDS[d]}), CUDA, GENERAL)
        for d in DIRECTIONS
    }
    sizes = executables["backward"].workspace_bytes
    workspaces = [torch.full((sizes,), 0xFF, dtype=torch.uint8, device="cuda") for _ in sets]
    torch.cuda.synchronize()

    def work(i: int) -> None:
        for _ in range(50):
            for direction, executable in executables.items():
                arrays = sets[i][1]
                pointers = [arrays[n].view.ptr if n in arrays else 0 for n in OPERANDS[direction]]
                executable(pointers, case.head_dim**-0.5, streams[i], workspaces[i].data_ptr())

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    torch.cuda.synchronize()
    for host, device in sets:
        check(case, "float16", host, {n: device[n].get() for n in device if n not in host})


def test_capture_in_a_graph():
    """A first launch may be captured, and a replay reads what the inputs hold by then."""
    case = replace(BY_NAME["nat_block"], heads=3, heads_kv=3)
    host, device = upload(case, "bfloat16")
    fresh = {n: device[n].memory.clone() for n in "qkv"}
    views = {n: device[n].view for n in OPERANDS["forward"] if n in device}
    executable = prepare(call_of("forward", problem_of(case.window, views), views), CUDA, GENERAL)
    pointers = [views[n].ptr if n in views else 0 for n in OPERANDS["forward"]]
    for n in "qkv":
        device[n].memory.fill_(0xFF)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        executable(pointers, case.head_dim**-0.5, torch.cuda.current_stream().cuda_stream, 0)
    for n in "qkv":
        device[n].memory.copy_(fresh[n])
    graph.replay()
    torch.cuda.synchronize()
    check(case, "bfloat16", host, {n: device[n].get() for n in ("out", "lse")})


@pytest.mark.parametrize(("heads", "head_dim"), [(64, 32), (2048, 1)])
def test_more_than_2_31_elements(heads: int, head_dim: int):
    """The last tokens agree with the same tokens alone; 2^31 queries too (64-bit item numbers)."""
    tokens = (1 << 31) // (heads * head_dim) + 64
    if torch.cuda.mem_get_info()[0] < 60 * 1024**3:
        pytest.skip("needs 60 GiB of free GPU memory")
    case = Case("huge", (tokens,), 5, heads=heads, heads_kv=heads, head_dim=head_dim, head_dim_v=head_dim)
    shape = (1, tokens, heads, head_dim)
    tensors = {n: torch.randn(shape, dtype=torch.float16, device="cuda") for n in ("q", "k", "v", "d_out")}
    names = ("out", "dq", "dk", "dv")
    tensors |= {n: torch.full(shape, float("nan"), dtype=torch.float16, device="cuda") for n in names}
    tensors["lse"] = torch.full(shape[:3], float("nan"), device="cuda")

    def compute(tensors: dict) -> None:
        views = {n: view_of(t) for n, t in tensors.items()}
        problem = problem_of(replace(case, spatial=tensors["q"].shape[1:2]).window, {n: views[n] for n in "qkv"})
        for direction in DIRECTIONS:
            executable = prepare(
                call_of(direction, problem, {n: views.get(n) for n in OPERANDS[direction]}), CUDA, GENERAL
            )
            workspace = torch.empty(executable.workspace_bytes, dtype=torch.uint8, device="cuda")
            pointers = [views[n].ptr if n in views else 0 for n in OPERANDS[direction]]
            torch.cuda.synchronize()
            executable(pointers, 1.0, 0, workspace.data_ptr())
            torch.cuda.synchronize()

    compute(tensors)
    tail = {n: t[:, -64:].clone() for n, t in tensors.items()}
    alone = {
        n: t.clone() if n in ("q", "k", "v", "d_out") else torch.full_like(t, float("nan")) for n, t in tail.items()
    }
    compute(alone)
    for name in (*names, "lse"):
        assert torch.equal(tail[name][:, 16:], alone[name][:, 16:]), name
        assert bool(tensors[name][:, :: tokens // 1000].isfinite().all()), name


def test_launch_limits_are_checked_when_loading():
    case = BY_NAME["nat_block"]
    _, device = upload(case, "float16")
    views = {n: device[n].view for n in OPERANDS["forward"] if n in device}
    call = call_of("forward", problem_of(case.window, views), views)
    (launch,) = load_plan(call, 0, GENERAL).plan.launches
    for fields, message in (
        ({"grid": (1, 70000, 1)}, "grid of"),
        ({"block": (2048, 1, 1)}, "2048 threads a block"),
        ({"shared_bytes": 1 << 20}, "1048576 bytes of shared memory"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            prepare_launch(replace(launch, **fields), 0)


def test_kernels_are_loaded_before_their_first_launch():
    """A launch that has to load code allocates memory, which a graph that is being captured does not survive."""
    case = replace(BY_NAME["nat_block"], heads=5, heads_kv=5)
    _, device = upload(case, "bfloat16")
    views = {n: device[n].view for n in OPERANDS["forward"] if n in device}
    loaded = load_plan(call_of("forward", problem_of(case.window, views), views), 0, GENERAL)
    with current(0):
        for kernel in loaded.kernels:
            function = check_driver(driver().cuKernelGetFunction(kernel), "cuKernelGetFunction")
            state = check_driver(driver().cuFuncIsLoaded(function), "cuFuncIsLoaded")
            assert state == driver().CUfunctionLoadingState.CU_FUNCTION_LOADING_STATE_LOADED


def test_facts_and_errors():
    assert facts(0).arch.startswith("sm_") and facts(0).multiprocessors > 0
    with pytest.raises(CudaError, match="there is no GPU 99"):
        facts(99)
