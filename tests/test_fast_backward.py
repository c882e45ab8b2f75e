"""The tensor core backward as the planner chooses it, against the reference: ugly cases and random problems.

tests/test_marching_backward.py, test_tiled_backward.py and test_whole_maps.py have the kernels one by one, on the cases
and by the means of this file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from natcore.backends import prepare
from natcore.planning import Config, candidates, facts_for_arch, operands, passes, plan_for
from natcore.planning.listed import contiguous_call
from natcore.problem import OPERANDS, RESULTS, Call, call_of, problem_of
from tests.cases import CASES, WIDE, Case, check, expected, fitting, inputs, problem_for, random_case
from tests.scattered import CUDA, view_of
from tests.test_fast_forward import to_gpu

FACTS = facts_for_arch("sm_90a")
DTYPES = ("float16", "bfloat16")


def call_for(case: Case, dtype: str = "float16") -> Call:
    """The contiguous backward call of a case."""
    return contiguous_call("backward", problem_for(case, dtype))


def able(case: Case) -> bool:
    grouped, wide = case.heads != case.heads_kv, max(case.head_dim, case.head_dim_v) > operands.MAX_HEAD_DIM
    return not (case.extra or grouped or case.batch == 0 or wide)


def of_passes(kernel: str, options: dict[str, int], fit: Callable[[Literal["queries", "keys"]], bool]) -> Config:
    """The options for each of a kernel's two passes that they fit."""
    found = options if fit("queries") else {}
    found = found | ({passes.KEYS + name: value for name, value in options.items()} if fit("keys") else {})
    return Config(kernel, tuple(found.items()))


ABLE = [fitting(case) for case in CASES if able(case)]
MORE = [
    Case("several_regions", (37, 41), 7, heads=2, heads_kv=2, packed=True, batch=2, **WIDE),
    Case("third_stage", (14, 14), 7, heads=8, heads_kv=8, batch=16, **WIDE),
    Case("last_stage", (7, 7), 7, heads=4, heads_kv=4, batch=5, **WIDE),
    Case("kernel_3", (20, 19), 3, heads=2, heads_kv=2, head_dim=64, head_dim_v=64, rpb="same"),
    Case("kernel_5", (20, 19), 5, heads=2, heads_kv=2, head_dim=48, head_dim_v=16, rpb="float32"),
    Case("kernel_9", (20, 29), 9, heads=2, heads_kv=2, head_dim=24, head_dim_v=80, rpb="float32"),
    Case("kernel_11", (20, 29), 11, **WIDE),
    Case("kernel_13", (20, 29), 13, **WIDE),
    Case("kernel_15", (30, 29), 15, head_dim=16, head_dim_v=16, rpb="float32"),
    Case("dilated", (30, 29), 7, dilation=2, **WIDE),
    Case("causal_strides", (20, 20), (7, 5), stride=(2, 3), is_causal=True, heads=2, heads_kv=2, **WIDE),
    Case("video_5", (7, 14, 13), (3, 5, 5), head_dim=64, head_dim_v=64, rpb="float32"),
    Case("one_axis", (400,), 127, heads=2, heads_kv=2, **WIDE),
    Case("wide", (20, 20), 7, heads=2, heads_kv=2, head_dim=128, head_dim_v=128, rpb="float32"),
]


def test_planner_prefers_tensor_cores() -> None:
    """Whatever they take, one of the tensor core kernels does; the general ones take the rest."""
    taken = set()
    for case in ABLE + MORE:
        call = call_for(case)
        preferred = candidates(call, FACTS)[0]
        taken.add(preferred.name)
        assert plan_for(call, FACTS) == preferred.plan(call, FACTS, {}), case.name
    assert taken == {"whole", "resident", "marching", "tiled_backward"}
    other = replace(call, problem=replace(call.problem, dtype="float64"))
    assert plan_for(other, FACTS).launches[0].kernel.name.startswith("general")
    for name in taken:
        with pytest.raises(NotImplementedError, match="float16 and bfloat16"):
            plan_for(other, FACTS, Config(name))


@pytest.mark.parametrize(("spatial", "heads"), [((56, 56), 2), ((28, 28), 4), ((14, 14), 8), ((7, 7), 16)])
def test_workspace_is_small(spatial: tuple[int, int], heads: int) -> None:
    """At most as much as q, and 16 MiB for partial sums."""
    case = Case("stage", spatial, 7, heads=heads, heads_kv=heads, batch=128, **WIDE)
    call = call_for(case)
    q = 2 * 128 * heads * 32 * spatial[0] * spatial[1]
    for candidate in candidates(call, FACTS):
        if candidate.name != "general":
            assert 0 < candidate.plan(call, FACTS, {}).workspace_bytes <= q + (16 << 20), candidate.name


# ---- on a GPU ----


class Run:
    """A backward on the GPU; the forward's results come from the reference."""

    def __init__(self, case: Case, dtype: str, config: Config | None, with_d_lse: bool = True) -> None:
        import torch

        self.case, self.dtype = case, dtype
        self.arrays = inputs(case, dtype)
        if not with_d_lse:
            self.arrays["d_lse"][:] = 0
        forward = expected(case, self.arrays)
        kind = getattr(torch, dtype)
        tensors = {n: to_gpu(a) for n, a in self.arrays.items() if n != "d_lse" or with_d_lse}
        tensors["out"] = torch.from_numpy(forward["out"]).cuda().to(kind)
        tensors["lse"] = torch.from_numpy(forward["lse"]).cuda().float()
        if case.packed:
            tensors |= dict(zip("qkv", torch.stack([tensors[n] for n in "qkv"], -3).unbind(-3), strict=True))
        problem = problem_of(case.window, {n: view_of(tensors[n]) for n in ("q", "k", "v", "rpb") if n in tensors})
        shapes = {n: problem.shapes[n] for n in RESULTS["backward"] if problem.has(n)}
        self.results = {
            n: torch.full(s, float("nan"), device="cuda", dtype=getattr(torch, problem.dtype_of(n)))
            for n, s in shapes.items()
        }
        if case.packed:
            lead, tail = shapes["dq"][:-2], shapes["dq"][-2:]
            packed = torch.full((*lead, 3, *tail), float("nan"), device="cuda", dtype=kind)
            self.results |= dict(zip(("dq", "dk", "dv"), packed.unbind(-3), strict=True))
        tensors |= self.results
        call = call_of("backward", problem, {n: view_of(t) for n, t in tensors.items()})
        self.executable = prepare(call, CUDA, config)
        self.tensors = tensors
        self.pointers = [tensors[n].data_ptr() if n in tensors else 0 for n in OPERANDS["backward"]]
        self.scale = problem.default_scale if case.scale is None else case.scale
        size = max(self.executable.workspace_bytes, 1)
        self.workspace = torch.full((size,), 255, dtype=torch.uint8, device="cuda")

    def __call__(self) -> None:
        import torch

        stream = torch.cuda.current_stream().cuda_stream
        self.executable(self.pointers, self.scale, stream, self.workspace.data_ptr())

    def check(self, saved_out: bool = False) -> None:
        actual = {n: t.float().cpu().numpy() for n, t in self.results.items()}
        check(self.case, self.dtype, self.arrays, actual, saved_out)

    def repeat(self, times: int, again: Callable[[], None] | None = None) -> None:
        """Equal results to the bit, run after run (or what does the same ``again``), each over NaN in all that it
        leaves: results, and what passes leave for later ones."""
        import torch

        self()
        first = {n: t.clone() for n, t in self.results.items()}
        for _ in range(times):
            for t in (self.workspace, *self.results.values()):
                t.fill_(255 if t is self.workspace else float("nan"))
            (again or self)()
            assert all(torch.equal(t, first[n]) for n, t in self.results.items())


def backward(case: Case, dtype: str, config: Config | None, with_d_lse: bool = True, saved_out: bool = False) -> None:
    """Runs a case under a config, the planner's own if None, and checks it."""
    run = Run(case, dtype, config, with_d_lse)
    run()
    run.check(saved_out)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ABLE + MORE, ids=lambda case: case.name)
def test_cases(case: Case, dtype: str) -> None:
    backward(case, dtype, None)


@pytest.mark.gpu
@seed(20)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(case=random_case().map(fitting).filter(able), dtype=st.sampled_from(DTYPES))
def test_random_problems(case: Case, dtype: str) -> None:
    backward(case, dtype, None)
