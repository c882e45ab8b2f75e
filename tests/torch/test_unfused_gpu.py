"""Unfused attention, dropout and merging on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import natcore
import torch_nat
from tests.cases import CASES, DROPOUT_CASES, Case, check, inputs
from tests.torch.common import captured, to_numpy
from tests.torch.test_unfused import SOME, finite_scores, sums, unfused, with_seed
from tests.unfused import unfused_check, unfused_inputs

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_every_case(case: Case):
    arrays = unfused_inputs(case, "float32")
    unfused_check(case, "float32", arrays, unfused(case, arrays, "cuda"))


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
@pytest.mark.parametrize("case", SOME, ids=lambda c: c.name)
def test_every_dtype(case: Case, dtype: str):
    arrays = unfused_inputs(case, dtype)
    unfused_check(case, dtype, arrays, unfused(case, arrays, "cuda"))


def test_results_are_the_same_every_time():
    case = next(c for c in CASES if c.name == "additional_keys")
    arrays = unfused_inputs(case, "float16")
    first, second = (unfused(case, arrays, "cuda") for _ in range(2))
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)


def test_derivatives():
    generator = torch.Generator().manual_seed(0)

    def leaves(*shapes: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
        drawn = (torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in shapes)
        return tuple(x.cuda().requires_grad_() for x in drawn)

    for function, given in (
        (finite_scores, leaves((1, 5, 4, 2, 3), (1, 5, 4, 1, 3), (2, 5, 5), (1, 2, 1, 3))),
        (sums, leaves((1, 5, 4, 2, 11), (1, 5, 4, 1, 2), (1, 2, 1, 2))),
    ):
        assert torch.autograd.gradcheck(function, given)
        assert torch.autograd.gradgradcheck(function, given)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("case", DROPOUT_CASES, ids=lambda c: c.name)
def test_dropout(case: Case, dtype: str, monkeypatch):
    arrays = inputs(case, dtype)
    check(case, dtype, arrays, with_seed(case, arrays, monkeypatch, look=False, device="cuda"))


def test_dropout_waits_for_nothing_and_graphs_draw_anew():
    q = torch.randn(2, 32, 32, 2, 32, device="cuda", dtype=torch.float16, requires_grad=True)

    def step() -> torch.Tensor:
        out = torch_nat.na2d(q, q, q, 7, dropout_p=0.5)
        out.backward(out)
        return out

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    q.grad = None
    graph = torch.cuda.CUDAGraph()
    with captured(graph):
        out = step()
    graph.replay()
    first = out.clone()
    graph.replay()
    assert not torch.equal(first, out)
    torch.cuda.manual_seed(0)
    eager = [step() for _ in range(2)]
    torch.cuda.manual_seed(0)
    assert torch.equal(eager[0], step()) and not torch.equal(eager[0], eager[1])


def test_dropout_by_the_public_door():
    case = DROPOUT_CASES[0]
    arrays = inputs(case, "float32")
    q, k, v, rpb = (torch.from_numpy(arrays[n]).cuda() for n in ("q", "k", "v", "rpb"))
    options = {"rpb": rpb, "dropout_p": case.dropout_p, "dropout_seed": case.dropout_seed, "return_lse": True}
    out, lse = natcore.na2d(q, k, v, case.kernel_size, **options)
    check(case, "float32", arrays, {"out": to_numpy(out), "lse": to_numpy(lse)})


def test_merging():
    torch.manual_seed(0)
    q, k, v, keys, values = (torch.randn(2, n, 2, 8, device="cuda") for n in (9, 9, 9, 4, 4))
    whole = torch_nat.na1d(q, k, v, 3, additional_keys=keys, additional_values=values, return_lse=True)
    near = torch_nat.na1d(q, k, v, 3, return_lse=True)
    scores = torch_nat.na1d_qk(q, k, 1, scale=8**-0.5, additional_keys=keys)
    scores[..., 0] = -torch.inf
    far = torch_nat.na1d_av(scores.softmax(-1), v, 1, additional_values=values)
    merged = torch_nat.merge_attentions([near[0], far], [near[1], scores.logsumexp(-1)])
    torch.testing.assert_close(merged, whole, rtol=1e-4, atol=1e-5)
