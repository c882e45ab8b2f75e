"""2,000 random problems of the tensor core kernels on a GPU, forward and backward, from at most 90 compiled kernels.

A `Build` fixes what is compiled in: the window, the head dimensions, the dtypes and how the map is cut. Within
one, all else varies from problem to problem: the map, batch, heads and grouped heads, the scale, outliers, and
the memory of every operand (order of axes, gaps, directions, offsets, broadcasting, packing). All memory that
nobody wrote is NaN. The last tests repeat one call a thousand times.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import pytest

from benchmarks.configs import chosen_cut, spelled_out
from natcore.backends import prepare
from natcore.compiling import compile_kernels
from natcore.device import device_count, facts
from natcore.planning import CANDIDATES, Candidate, Config, KernelSpec, candidates, facts_for_arch, plan_for
from natcore.planning.listed import contiguous_call
from natcore.problem import OPERANDS, RESULTS, Call, Direction, Problem, call_of
from tests.cases import Case, check, inputs, problem_for
from tests.scattered import CUDA, Array, broadcast, packed, scattered
from tests.test_cuda_backend import run

PROBLEMS = 2000
KERNELS = 95
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")
ROWS = ("q", "k", "v", "out", "d_out", "dq", "dk", "dv")  # of head_dim elements: 16-byte aligned for fast kernels
PAIRS = 1_000_000  # of queries and keys, over batch and heads: what the reference does in 0.1 s
TYPICAL, MAPS = 8, 200  # maps of a build to plan for, and to draw from


@dataclass(frozen=True)
class Build:
    """What is compiled in. ``spatial`` gives the least and greatest extent of each axis."""

    name: str
    dtype: str
    spatial: tuple[tuple[int, int], ...]
    kernel_size: int | tuple[int, ...]
    head_dim: int
    head_dim_v: int
    rpb: str | None = "float32"
    stride: int | tuple[int, ...] = 1
    dilation: int | tuple[int, ...] = 1
    is_causal: bool | tuple[bool, ...] = False
    planned_for: tuple[int, int] = (16, 4)  # batch and heads for which the planner cuts the map

    @property
    def seed(self) -> int:
        return 1000 + BUILDS.index(self)

    def case(self, spatial: tuple[int, ...], **more: Any) -> Case:
        names = ("kernel_size", "head_dim", "head_dim_v", "rpb", "stride", "dilation", "is_causal")
        return Case(self.name, spatial, **{n: getattr(self, n) for n in names}, **more)


F, B = "float16", "bfloat16"
BUILDS = [
    Build("nat", F, ((13, 18), (13, 18)), 7, 32, 32, planned_for=(128, 8)),
    Build("nat_same", B, ((13, 22), (13, 22)), 7, 32, 32, "same"),
    Build("last_stage", F, ((7, 7), (7, 7)), 7, 32, 32, planned_for=(128, 16)),
    Build("nat_plain", F, ((13, 20), (13, 26)), 7, 32, 32, None),
    Build("last_stage_wide", B, ((7, 7), (7, 9)), 7, 64, 64, "same", planned_for=(128, 16)),
    Build("kernel_1", B, ((5, 17), (5, 17)), 1, 16, 16),
    Build("kernel_2", F, ((6, 20), (6, 20)), 2, 24, 8, "same"),
    Build("kernel_3", B, ((9, 20), (9, 20)), 3, 32, 32),
    Build("kernel_3_wide", F, ((9, 20), (9, 20)), 3, 128, 128),
    Build("kernel_4", F, ((9, 22), (9, 22)), 4, 40, 48),
    Build("kernel_5", B, ((11, 20), (11, 20)), 5, 48, 48, "same"),
    Build("kernel_6x8", F, ((13, 24), (17, 26)), (6, 8), 16, 32),
    Build("kernel_9", B, ((17, 23), (17, 23)), 9, 64, 64),
    Build("kernel_11", F, ((19, 24), (19, 24)), 11, 24, 24, None),
    Build("kernel_13", B, ((20, 27), (20, 27)), 13, 32, 32),
    Build("kernel_15", F, ((21, 28), (21, 28)), 15, 16, 16, "same"),
    Build("rectangular", F, ((8, 16), (19, 30)), (3, 11), 80, 80),
    Build("axial", B, ((5, 12), (20, 40)), (1, 9), 96, 32),
    Build("dilated", F, ((24, 29), (24, 29)), 7, 32, 32, dilation=2),
    Build("dilated_ragged", B, ((22, 28), (18, 25)), (5, 3), 32, 16, "same", dilation=(3, 4)),
    Build("strided", F, ((13, 22), (13, 22)), 6, 32, 32, stride=(2, 3)),
    Build("blocked", B, ((10, 21), (10, 21)), 4, 32, 32, None, stride=4),
    Build("causal", F, ((13, 22), (13, 22)), 7, 32, 32, is_causal=True),
    Build("causal_mixed", B, ((13, 22), (14, 22)), (5, 7), 64, 24, stride=(2, 1), is_causal=(True, False)),
    Build("line", F, ((140, 260),), 31, 64, 64),
    Build("long_line", B, ((270, 380),), 127, 32, 32, dilation=2),
    Build("causal_line", F, ((100, 300),), 20, 128, 64, "same", is_causal=True),
    Build("video", B, ((4, 7), (8, 12), (8, 12)), (3, 5, 5), 32, 32),
    Build("small", F, ((6, 7), (6, 7)), 5, 16, 32, planned_for=(128, 16)),
    Build("third_stage", F, ((13, 14), (13, 14)), 7, 32, 32, planned_for=(128, 8)),
    Build("last_stage_same", B, ((7, 7), (7, 7)), 7, 32, 32, "same", planned_for=(128, 16)),
]


def device_facts() -> Any:
    return facts(0) if device_count() else facts_for_arch("sm_90a")


@dataclass(frozen=True)
class Specialised:
    """A build with its configs, its kernels and the maps that they serve."""

    configs: dict[Direction, Config]
    kernels: dict[Direction, frozenset[KernelSpec]]
    maps: tuple[tuple[int, ...], ...]

    def serve(self, call: Call) -> bool:
        return _kernels(call, self.configs[call.direction]) == self.kernels[call.direction]


def specialise(build: Build) -> Specialised:
    """How the planner cuts some map of the build, such that most of the drawn maps need the same kernels."""
    rng = np.random.default_rng(build.seed)
    drawn = [tuple(int(rng.integers(low, high + 1)) for low, high in build.spatial) for _ in range(MAPS)]
    found = (_specialised(build, typical, drawn) for typical in drawn[:TYPICAL])
    best = max(found, key=lambda special: len(special.maps) if special else 0)
    assert best is not None, f"{build}: no config serves any map"
    return best


def _specialised(build: Build, common: tuple[int, ...], drawn: list[tuple[int, ...]]) -> Specialised | None:
    heads = build.planned_for[1]
    typical = problem_for(build.case(common, batch=build.planned_for[0], heads=heads, heads_kv=heads), build.dtype)
    calls = {d: contiguous_call(d, typical) for d in DIRECTIONS}
    takers = {d: _taker(build, call) for d, call in calls.items()}
    geometries = [g for d, call in calls.items() for g in chosen_cut(call, device_facts(), takers[d])]
    groups: dict[tuple, list[tuple[int, ...]]] = {}
    for spatial in dict.fromkeys(drawn):
        problem = replace(typical, spatial=spatial)
        groups.setdefault(tuple(replace(g, problem=problem).defines for g in geometries), []).append(spatial)
    maps = max(groups.values(), key=len)
    configs = {d: spelled_out(call, device_facts(), takers[d]) for d, call in calls.items()}
    calls = {d: contiguous_call(d, replace(typical, spatial=maps[0])) for d in DIRECTIONS}
    kernels = {d: found for d, call in calls.items() if (found := _kernels(call, configs[d])) is not None}
    return Specialised(configs, kernels, tuple(maps)) if len(kernels) == len(DIRECTIONS) else None


def _taker(build: Build, call: Call) -> Candidate:
    """One of the tensor core kernels that can take the call: builds take turns."""
    able = [candidate for candidate in candidates(call, device_facts()) if candidate.name != "general"]
    return able[BUILDS.index(build) % len(able)]


def _kernels(call: Call, config: Config) -> frozenset[KernelSpec] | None:
    """The kernels of a call under a config; None where it does not fit."""
    try:
        launches = plan_for(call, device_facts(), config).launches
    except (ValueError, NotImplementedError):
        return None
    return frozenset(launch.kernel for launch in launches)


# ---- problems ----


def draw_case(build: Build, maps: tuple[tuple[int, ...], ...], rng: np.random.Generator) -> Case:
    """The reference forms all pairs, so many tokens leave few heads and batch entries."""
    spatial = maps[rng.integers(len(maps))]
    most = max(2, PAIRS // prod(spatial) ** 2)
    heads = int(rng.integers(1, min(most, 6) + 1))
    heads_kv = int(rng.choice([n for n in range(1, heads + 1) if heads % n == 0])) if rng.random() < 0.2 else heads
    return build.case(
        spatial,
        batch=int(rng.integers(1, min(most // heads, 9) + 1)),
        heads=heads,
        heads_kv=heads_kv,
        scale=[None, None, None, 0.0, -0.5, 1e-6, 1.5][rng.integers(7)],
        packed=bool(heads == heads_kv and build.head_dim == build.head_dim_v and rng.random() < 0.3),
        outliers=bool(rng.random() < 0.3),
    )


def arrays_of(build: Build, case: Case, host: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, Array]:
    """Inputs and NaN results on the GPU."""
    units = {n: 8 if n in ROWS else 1 for n in (*host, *RESULTS["forward"], *RESULTS["backward"])}
    device = {n: scattered(rng, x.shape, x.dtype.name, x, units[n]) for n, x in host.items()}
    if case.packed:
        device |= packed({n: host[n] for n in "qkv"}, rng)
    problem = problem_for(case, build.dtype)
    for name in (*RESULTS["forward"], *RESULTS["backward"]):
        if problem.has(name):
            device[name] = scattered(rng, problem.shapes[name], problem.dtype_of(name), None, units[name])
    return device


def judge(build: Build, special: Specialised, rng: np.random.Generator, number: int) -> bool:
    """One random problem; False where it is not for these kernels (not all of them take grouped heads)."""
    case = draw_case(build, special.maps, rng)
    served = [d for d in DIRECTIONS if special.serve(contiguous_call(d, problem_for(case, build.dtype)))]
    if "forward" not in served or (case.heads == case.heads_kv and "backward" not in served):
        return False
    host = inputs(case, build.dtype, seed=number)
    arrays = arrays_of(build, case, host, rng)
    if not case.packed and case.batch > 1 and rng.random() < 0.2:
        broadcast(host, arrays, rng)
    # Where a query sees one key, dq is exactly 0 without d_lse, and no rounding error is small beside it.
    if rng.random() < 0.3 and prod(case.window.kernel_size) > 1:
        host["d_lse"] = np.zeros_like(host["d_lse"])
        del arrays["d_lse"]
    try:
        for direction in served:
            run(direction, case, arrays, _config_for(direction, build, case, arrays, special.configs[direction]))
        results = {n: arrays[n].get() for d in served for n in RESULTS[d] if n in arrays}
        check(case, build.dtype, host, results, saved_out=case.outliers)
    except AssertionError as error:
        strides = {n: a.view.strides for n, a in arrays.items()}
        raise AssertionError(f"problem {number}: {str(error).splitlines()[0]}; {case}; strides {strides}") from error
    return True


def _config_for(direction: Direction, build: Build, case: Case, arrays: dict[str, Array], config: Config) -> Config:
    """The config, which is made for contiguous arrays, without what it says of heads where these lie apart and the
    kernel takes one at a time."""
    views = {n: a.view for n, a in arrays.items() if n in OPERANDS[direction]}
    if _kernels(call_of(direction, problem_for(case, build.dtype), views), config) is not None:
        return config
    return Config(config.kernel, tuple(option for option in config.options if option[0] != "heads"))


def test_few_kernels_serve_many_maps() -> None:
    """Needs no GPU: a build has the kernels of one fast candidate a direction, and several maps."""
    for build in BUILDS[::9]:
        special = specialise(build)
        names = sorted(spec.name for specs in special.kernels.values() for spec in specs)
        assert not any(name.startswith("general") for name in names) and len(names) <= 4, (build.name, names)
        of_one_map = any(name.startswith(("resident", "whole")) for name in names)  # the extents are compiled in
        assert of_one_map or len(special.maps) >= 4, (build.name, special.maps)


def test_the_builds_need_every_fast_kernel() -> None:
    """Needs no GPU, and counts: the kernels of all builds, each at its largest map."""
    every: set[KernelSpec] = set()
    for build in BUILDS:
        problem = problem_for(build.case(tuple(high for _, high in build.spatial), batch=2), build.dtype)
        for call in (contiguous_call(direction, problem) for direction in DIRECTIONS):
            every |= _kernels(call, Config(_taker(build, call).name)) or set()
    assert len(every) <= KERNELS and len({build.name for build in BUILDS}) == len(BUILDS)
    fast = {info.name for candidate in CANDIDATES if candidate.name != "general" for info in candidate.kernels}
    assert {spec.name for spec in every} == fast


@pytest.mark.gpu
@pytest.mark.parametrize("build", BUILDS, ids=lambda build: build.name)
def test_random_problems(build: Build) -> None:
    special = specialise(build)
    compile_kernels(special.kernels["forward"] | special.kernels["backward"])
    rng, served, drawn = np.random.default_rng(build.seed), 0, 0
    wanted, failures = -(-PROBLEMS // len(BUILDS)), []
    while served < wanted and drawn < 10 * wanted:
        try:
            served += judge(build, special, rng, drawn)
        except AssertionError as error:
            failures.append(str(error))
            served += 1
        drawn += 1
    assert served == wanted, f"{build.name}: of {drawn} problems only {served} were for {special.configs}"
    assert not failures, f"{len(failures)} of {served} with {special.configs}:\n" + "\n".join(failures[:5])


REPEATED = [
    (Build("stage_1", F, ((56, 56), (56, 56)), 7, 32, 32), 2, 4),
    (Build("stage_4", B, ((7, 7), (7, 7)), 7, 32, 32), 16, 16),
    (Build("ragged", F, ((37, 37), (41, 41)), (5, 9), 64, 48, "same", dilation=(2, 1)), 3, 2),
    (Build("causal", B, ((33, 33), (29, 29)), 6, 32, 32, stride=(2, 1), is_causal=(True, False)), 2, 2),
    (Build("line", F, ((1000, 1000),), 63, 32, 32, None), 2, 2),
    (Build("video", B, ((5, 5), (14, 14), (14, 14)), (3, 5, 5), 32, 32), 2, 1),
]


@pytest.mark.gpu
@pytest.mark.parametrize("build, heads, batch", REPEATED, ids=lambda value: getattr(value, "name", ""))
def test_1000_repeats_are_bitwise_equal(build: Build, heads: int, batch: int) -> None:
    """Forward and backward, every result, drpb too; NaN lies in results and workspace before each run."""
    import torch

    case = build.case(tuple(low for low, _ in build.spatial), heads=heads, heads_kv=heads, batch=batch)
    problem = problem_for(case, build.dtype)
    names = list(dict.fromkeys((*OPERANDS["forward"], *OPERANDS["backward"])))
    kinds = {n: getattr(torch, problem.dtype_of(n)) for n in names if problem.has(n)}
    torch.manual_seed(0)
    arrays = {n: torch.randn(problem.shapes[n], device="cuda").to(kind) for n, kind in kinds.items()}
    results = {n: arrays[n] for d in DIRECTIONS for n in RESULTS[d] if n in arrays}
    runs = []
    for direction in DIRECTIONS:
        executable = prepare(contiguous_call(direction, problem), CUDA, spelled_out_for(direction, problem))
        workspace = torch.empty(executable.workspace_bytes + 1, dtype=torch.uint8, device="cuda")
        runs.append((executable, [arrays[n].data_ptr() if n in arrays else 0 for n in OPERANDS[direction]], workspace))
    stream, first = torch.cuda.current_stream().cuda_stream, {}
    differences = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1001):
        for result in results.values():
            result.fill_(float("nan"))
        for executable, pointers, workspace in runs:
            workspace.fill_(0xFF)
            executable(pointers, problem.default_scale, stream, workspace.data_ptr())
        first = first or {n: result.clone() for n, result in results.items()}
        for name, result in results.items():
            differences += (bits(result) != bits(first[name])).sum()
    assert all(bool(result.isfinite().all()) for result in first.values())
    assert int(differences) == 0


def bits(tensor: Any) -> Any:
    import torch

    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def spelled_out_for(direction: Direction, problem: Problem) -> Config:
    return spelled_out(contiguous_call(direction, problem), device_facts())
