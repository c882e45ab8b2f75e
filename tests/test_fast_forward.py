"""The tensor core forward kernel against the reference, over the ugly cases, its geometries and random problems.

The geometry tests need no GPU.
"""

from __future__ import annotations

from dataclasses import replace
from math import ceil, prod

import numpy as np
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from natcore import reference
from natcore.backends import prepare
from natcore.planning import Config, candidates, facts_for_arch, operands, plan_for, tiled, tiling
from natcore.problem import OPERANDS, Call, call_of, problem_of
from natcore.views import Device, View, contiguous_strides
from tests.cases import CASES, Case, check, check_same_bits, fitting, inputs, problem_for, random_case
from tests.scattered import CUDA, view_of

FACTS = facts_for_arch("sm_90a")
DTYPES = ("float16", "bfloat16", "float32")
CPU = Device("cpu", 0)


def call_for(case: Case, dtype: str = "float16") -> Call:
    """The forward call of a case on contiguous arrays, with no memory behind it."""
    problem = problem_for(case, dtype)
    shapes = {n: problem.shapes[n] for n in OPERANDS["forward"] if problem.has(n)}
    views = {n: View(0, s, contiguous_strides(s), problem.dtype_of(n), CPU) for n, s in shapes.items()}
    return call_of("forward", problem, views)


def able(case: Case) -> bool:
    """Whether the kernel takes the case; a head dimension is made a multiple of 8 by `fitting`."""
    return case.extra == 0 and max(case.head_dim, case.head_dim_v) <= operands.MAX_HEAD_DIM


ABLE = [fitting(case) for case in CASES if able(case)]
MORE = [
    Case("several_regions", (37, 41), 7, heads=2, heads_kv=2, head_dim=32, head_dim_v=32, rpb="float32", packed=True),
    Case("kernel_13", (29, 30), 13, head_dim=32, head_dim_v=32, rpb="float32"),
    Case("kernel_15_causal_stride", (33, 18), (15, 9), stride=(4, 2), is_causal=(True, False), rpb="same"),
    Case("one_axis", (300,), 63, dilation=3, head_dim=64, head_dim_v=64, rpb="float32"),
    Case("video_7", (4, 12, 13), (3, 7, 7), head_dim=64, head_dim_v=64),
    Case("video_5", (7, 9, 11), 5, head_dim=64, head_dim_v=64, rpb="float32"),
    Case("wide", (16, 17), 5, head_dim=128, head_dim_v=128, rpb="float32"),
    Case("unequal_heads", (21, 9), (3, 9), heads=4, heads_kv=2, head_dim=48, head_dim_v=96, rpb="same", batch=2),
]


LARGE = [
    Case("large", (128, 512), 7, heads=2, heads_kv=2, head_dim=32, head_dim_v=32),
    Case("large_stride", (301, 97), (9, 6), stride=(4, 5), dilation=(2, 3), is_causal=(True, False)),
    Case("large_1d", (4099,), 31, stride=7),
]


@pytest.mark.parametrize("case", [c for c in ABLE + MORE + LARGE if c.batch], ids=lambda case: case.name)
def test_geometry_covers_every_window(case: Case) -> None:
    """Every key of every query lies in its tile's halo, its region's span and the difference table."""
    g = tiled.configured(call_for(case, "float16"), FACTS, {})
    assert g.shared_bytes <= FACTS.shared_bytes_per_block and prod(g.tile) == tiling.TILE_QUERIES
    for axis, tile, region, span, (halo, low, high) in zip(g.axes, g.tile, g.region, g.span, g.halos, strict=True):
        for length in axis.lengths:
            owned: list[int] = []
            for number in range(ceil(length / tile)):
                first = min(number * tile, max(length - tile, 0))
                start = min(axis.keys(first, length)[0], max(length - halo, 0))
                origin = min(number // region * region * tile, max(length - tile, 0))
                base = min(axis.keys(origin, length)[0], max(length - halo, 0))
                assert start - base >= 0 and start - base + halo <= span
                for p in range(first, min(first + tile, length)):
                    begin, end = axis.keys(p, length)
                    assert start <= begin < end <= start + halo
                    assert low <= begin - p and end - 1 - p <= high
                owned += range(max(first, number * tile), min(first + tile, length))
            assert owned == list(range(length))


def test_windows_agree_with_the_reference() -> None:
    """The planner's windows are those of the definition."""
    for kernel, stride, causal in ((5, 1, False), (4, 3, False), (5, 2, True), (6, 6, False)):
        for extent in range(kernel, 20):
            axis = tiling.Axis(extent, kernel, stride, 1, causal)
            for p in range(extent):
                start, end = axis.keys(p, extent)
                assert (start, end) == reference.neighborhood(p, extent, kernel, stride, 1, causal)


def test_planner_prefers_it() -> None:
    """What it can run is a tensor core kernel's: on wide maps also the marching one can, and the cheaper one does."""
    for case in ABLE:
        if case.batch:
            call = call_for(case, "float16")
            preferred, *others = candidates(call, FACTS)
            assert preferred.name != "general", case.name
            rivals = [c.clocks(call, FACTS) for c in (preferred, *others) if c.clocks is not None]
            assert rivals == sorted(rivals), case.name
            assert plan_for(call, FACTS) == preferred.plan(call, FACTS, {})
    large = call_for(Case("nat", (56, 56), 7, batch=128, heads=2, head_dim=32, head_dim_v=32), "float16")
    assert candidates(large, FACTS)[0].name == "marching"
    assert plan_for(call_for(ABLE[0], "float32"), FACTS).launches[0].kernel.name == "tiled_forward"
    with pytest.raises(NotImplementedError, match="float32, float16 and bfloat16"):
        plan_for(call_for(ABLE[0], "float64"), FACTS, Config("tiled"))


# ---- on a GPU ----


MARGIN = 1024  # elements of NaN before and behind an array


def to_gpu(array: np.ndarray):
    """A contiguous tensor amid NaN: who reads beyond an array, computes with that."""
    import torch

    host = np.ascontiguousarray(array)
    if host.dtype.name == "bfloat16":
        host = torch.from_numpy(host.view(np.int16)).view(torch.bfloat16)
    else:
        host = torch.from_numpy(host)
    memory = torch.full((host.numel() + 2 * MARGIN,), float("nan"), dtype=host.dtype, device="cuda")
    tensor = memory[MARGIN : MARGIN + host.numel()].view(host.shape)
    return tensor.copy_(host)


def to_numpy(tensor) -> np.ndarray:
    return tensor.float().cpu().numpy()


def run(case: Case, dtype: str, arrays: dict[str, np.ndarray], config: Config | None) -> dict[str, np.ndarray]:
    """out and lse by the CUDA backend; results lie poisoned before the run."""
    import torch

    tensors = {n: to_gpu(arrays[n]) for n in ("q", "k", "v", "rpb") if n in arrays}
    if case.packed:
        q, k, v = torch.stack([tensors[n] for n in "qkv"], -3).unbind(-3)
        tensors |= {"q": q, "k": k, "v": v}
    views = {n: view_of(t) for n, t in tensors.items()}
    problem = problem_of(case.window, views)
    for n in ("out", "lse"):
        kind = getattr(torch, problem.dtype_of(n))
        tensors[n] = torch.full(problem.shapes[n], float("nan"), dtype=kind, device="cuda")
        views[n] = view_of(tensors[n])
    executable = prepare(call_of("forward", problem, views), CUDA, config)
    scale = problem.default_scale if case.scale is None else case.scale
    pointers = [views[n].ptr if n in views else 0 for n in OPERANDS["forward"]]
    executable(pointers, scale, torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()
    return {n: to_numpy(tensors[n]) for n in ("out", "lse")}


def forward(case: Case, dtype: str, config: Config | None, seed: int = 0) -> None:
    """Runs a case under a config, the planner's own if None, and checks it."""
    arrays = inputs(case, dtype, seed)
    check(case, dtype, arrays, run(case, dtype, arrays, config))


def repeat(case: Case, dtype: str, config: Config, times: int) -> None:
    """Equal results to the bit, run after run."""
    arrays = inputs(case, dtype)
    first = run(case, dtype, arrays, config)
    assert all(np.isfinite(result).all() for result in first.values())
    for _ in range(times):
        check_same_bits(first, run(case, dtype, arrays, config))


def geometry(tile: tuple[int, int, int], region: tuple[int, int, int], **more: int) -> Config:
    options = {f"tile{a}": n for a, n in enumerate(tile)} | {f"region{a}": n for a, n in enumerate(region)} | more
    return Config("tiled", tuple(options.items()))


CONFIGS = {
    "4x4": geometry((1, 4, 4), (1, 1, 2)),
    "2x8": geometry((1, 2, 8), (1, 2, 1)),
    "rounds": geometry((1, 4, 4), (1, 2, 3), warps=2, rounds=3),
    "two_stages": geometry((1, 4, 4), (1, 2, 2), warps=3, rounds=3, stages=2),
    "kept": geometry((1, 4, 4), (1, 2, 2), warps=4, rounds=3, stages=2),
    "swapped_axes": geometry((1, 8, 2), (1, 1, 3), axes=10),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ABLE + MORE, ids=lambda case: case.name)
def test_cases(case: Case, dtype: str) -> None:
    forward(case, dtype, Config("tiled"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("case", [c for c in ABLE + MORE if c.rank == 2 and c.batch], ids=lambda case: case.name)
def test_other_geometries(case: Case, name: str) -> None:
    case, config = replace(case, batch=4), CONFIGS[name]
    try:
        plan_for(call_for(case, "float16"), FACTS, config)
    except ValueError:
        pytest.skip("the case does not fit the geometry")
    forward(case, "float16", config, seed=1)


@pytest.mark.gpu
@seed(20)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(random_case(), st.sampled_from(DTYPES))
def test_random(case: Case, dtype: str) -> None:
    forward(fitting(replace(case, extra=0)), dtype, None, seed=2)


@pytest.mark.gpu
def test_repeats_are_bitwise_equal() -> None:
    repeat(MORE[0], "float16", Config("tiled"), 20)
