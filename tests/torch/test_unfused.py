"""na*d_qk, na*d_av and merge_attentions; attention dropout."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import torch_nat
from tests.cases import CASES, DROPOUT_CASES, SOME, Case, check, inputs
from tests.torch.common import FUNCTIONS, OPTIONAL, PACKED, Looking, tensors_of, to_numpy, to_torch
from tests.unfused import unfused_check, unfused_inputs
from torch_nat import ops

QK = {1: torch_nat.na1d_qk, 2: torch_nat.na2d_qk, 3: torch_nat.na3d_qk}
AV = {1: torch_nat.na1d_av, 2: torch_nat.na2d_av, 3: torch_nat.na3d_av}
BY_NAME = {case.name: case for case in (*CASES, *DROPOUT_CASES)}
WINDOW = {"stride": (2, 1), "is_causal": (False, True)}


def window_of(case: Case) -> dict:
    return {name: getattr(case, name) for name in ("kernel_size", "stride", "dilation", "is_causal")}


def unfused(case: Case, arrays: dict, device: str = "cpu") -> dict[str, np.ndarray]:
    """Every result, by the names of natcore.problem.RESULTS."""
    x = {name: to_torch(a, device) for name, a in arrays.items()}
    leaves = {n: t.requires_grad_() for n, t in x.items() if not n.startswith("d_")}
    scale = 1.0 if case.scale is None else case.scale
    extra = {name: x.get(name) for name in ("rpb", "additional_keys")}
    scores = QK[case.rank](x["q"], x["k"], **window_of(case), scale=scale, **extra)
    out = AV[case.rank](x["weights"], x["v"], **window_of(case), additional_values=x.get("additional_values"))
    of_scores = [n for n in ("q", "k", "rpb", "additional_keys") if n in leaves]
    of_out = [n for n in ("weights", "v", "additional_values") if n in leaves]
    gradients = torch.autograd.grad(scores, [leaves[n] for n in of_scores], x["d_scores"])
    gradients += torch.autograd.grad(out, [leaves[n] for n in of_out], x["d_out"])
    names = ["d_" + n if n[0] in "aw" else "d" + n for n in (*of_scores, *of_out)]
    return {n: to_numpy(t) for n, t in [("scores", scores), ("out", out), *zip(names, gradients, strict=True)]}


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_every_case(case: Case):
    arrays = unfused_inputs(case, "float32")
    unfused_check(case, "float32", arrays, unfused(case, arrays))


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
@pytest.mark.parametrize("case", SOME, ids=lambda c: c.name)
def test_every_dtype(case: Case, dtype: str):
    arrays = unfused_inputs(case, dtype)
    unfused_check(case, dtype, arrays, unfused(case, arrays))


@pytest.mark.parametrize("case", SOME, ids=lambda c: c.name)
def test_two_steps_are_attention(case: Case):
    arrays = inputs(case, "float32")
    x = tensors_of(arrays)
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    extra = {name: x.get(name) for name in ("rpb", "additional_keys")}
    scores = QK[case.rank](x["q"], x["k"], **window_of(case), scale=scale, **extra)
    values = x.get("additional_values")
    out = AV[case.rank](scores.softmax(-1), x["v"], **window_of(case), additional_values=values)
    leaves = {name: x[name] for name in ("q", "k", "v", *OPTIONAL) if name in x}
    gradients = torch.autograd.grad((out, scores.logsumexp(-1)), tuple(leaves.values()), (x["d_out"], x["d_lse"]))
    names = ["d_" + n if n[0] == "a" else "d" + n for n in leaves]
    named = [("out", out), ("lse", scores.logsumexp(-1)), *zip(names, gradients, strict=True)]
    check(case, "float32", arrays, {name: to_numpy(t) for name, t in named})


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape)))


def leaves(*shapes: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(draw(*shape).requires_grad_() for shape in shapes)


def finite_scores(q, k, rpb, keys):
    scores = torch_nat.na2d_qk(q, k, 3, scale=0.3, rpb=rpb, additional_keys=keys, **WINDOW)
    return scores.masked_fill(scores.detach() == -torch.inf, 0)


def sums(weights, v, values):
    return torch_nat.na2d_av(weights, v, 3, additional_values=values, **WINDOW)


FOR_QK = ((1, 5, 4, 2, 3), (1, 5, 4, 1, 3), (2, 5, 5), (1, 2, 1, 3))
FOR_AV = ((1, 5, 4, 2, 11), (1, 5, 4, 1, 2), (1, 2, 1, 2))


@pytest.mark.parametrize(("function", "shapes"), [(finite_scores, FOR_QK), (sums, FOR_AV)], ids=["qk", "av"])
def test_first_second_and_third_derivatives(function, shapes):
    given = leaves(*shapes)
    assert torch.autograd.gradcheck(function, given)
    assert torch.autograd.gradgradcheck(function, given)

    def gradients(*inputs):
        return torch.autograd.grad(function(*inputs).square().sum(), inputs, create_graph=True)

    assert torch.autograd.gradgradcheck(gradients, given, fast_mode=True)


def operands(case: Case) -> dict[str, tuple]:
    """The arguments of each operation."""
    arrays = unfused_inputs(case, "float32")
    arrays |= {n: np.nan_to_num(arrays[n]) for n in ("weights", "d_scores")}  # opcheck compares
    x = {name: to_torch(a) for name, a in arrays.items()}
    window = ops.encoded(case.window)
    qk = (x["q"].requires_grad_(), x["k"].requires_grad_(), x.get("rpb"), x.get("additional_keys"), window, 0.5, None)
    av = (x["weights"].requires_grad_(), x["v"].requires_grad_(), x.get("additional_values"), window, None)
    return {"qk": qk, "qk_backward": (x["d_scores"], *qk), "av": av, "av_backward": (x["d_out"], *av)}


@pytest.mark.parametrize("direction", ["qk", "qk_backward", "av", "av_backward"])
@pytest.mark.parametrize("name", ["nat_packed", "additional_keys"])
def test_opcheck(name: str, direction: str):
    torch.library.opcheck(getattr(torch.ops.natcore, direction), operands(BY_NAME[name])[direction])


def two_steps(q, k, v, rpb=None):
    scores = torch_nat.na1d_qk(q, k, 3, rpb=rpb)
    return torch_nat.na1d_av(scores.softmax(-1), v, 3)


@pytest.mark.parametrize("mapped", [(0, 0, 0, None), (1, None, 0, None), (0, None, None, 0), (None, None, 2, 1)])
def test_vmap_and_func(mapped: tuple):
    torch.manual_seed(0)
    shapes = [(2, 7, 2, 4), (2, 7, 1, 4), (2, 7, 1, 3), (2, 5)]
    given = [
        torch.randn(s) if d is None else torch.randn(*s[:d], 3, *s[d:]) for s, d in zip(shapes, mapped, strict=True)
    ]
    grad = torch.func.grad(lambda *x: two_steps(*x).square().sum(), argnums=(0, 1, 2, 3))
    actual = torch.vmap(grad, mapped)(*given)
    for i in range(3):
        one = [x if d is None else x.select(d, i) for x, d in zip(given, mapped, strict=True)]
        leaves = [x.clone().requires_grad_() for x in one]
        expected = torch.autograd.grad(two_steps(*leaves).square().sum(), leaves)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a[i], e)


def test_compile_and_autocast():
    torch._dynamo.reset()
    torch.manual_seed(0)
    q = torch.randn(2, 7, 2, 8, requires_grad=True)
    expected = torch.autograd.grad(two_steps(q, q, q).square().sum(), q)[0]
    compiled = torch.compile(two_steps, fullgraph=True)
    actual = torch.autograd.grad(compiled(q, q, q).square().sum(), q)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        scores = torch_nat.na1d_qk(q, q, 3, rpb=torch.zeros(2, 5))
        assert scores.dtype == torch.bfloat16
        assert torch_nat.na1d_av(scores.softmax(-1), q, 3).dtype == torch.bfloat16  # of float32 weights too
    torch.testing.assert_close(scores.float(), torch_nat.na1d_qk(q, q, 3), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda x: torch_nat.na1d_qk(x, x, 7), ValueError, r"7 \* dilation 1 = 7 > extent 6"),
        (lambda x: torch_nat.na2d_qk(x, x, 3), ValueError, "q has 4 axes"),
        (lambda x: torch_nat.na1d_qk(x, x.half(), 3), ValueError, "k has dtype float16, expected float32"),
        (
            lambda x: torch_nat.na1d_av(x, x, 3),
            ValueError,
            r"weights has shape \(1, 6, 2, 8\), expected \(1, 6, 2, 3\)",
        ),
        (lambda x: torch_nat.na1d_qk(x.numpy(), x, 3), TypeError, "q is ndarray"),
        (lambda x: torch_nat.na1d_av(None, x, 3), TypeError, "weights is NoneType"),
        (lambda x: torch_nat.na1d(x, x, x, 3, dropout_p=1.0), ValueError, r"dropout_p is 1.0; it must be in \[0, 1\)"),
        (lambda x: torch_nat.na1d(x, x, x, 3, dropout_p=-0.5), ValueError, "dropout_p is -0.5"),
        (lambda x: torch_nat.merge_attentions([x], []), ValueError, "1 outs and 0 lses"),
        (lambda x: torch_nat.merge_attentions([x, x], [x[..., 0], x]), ValueError, r"lses\[1\] has shape"),
    ],
)
def test_refusals(call, error, text: str):
    with pytest.raises(error, match=text):
        call(torch.zeros(1, 6, 2, 8))


# merge_attentions


def halves(q, k, v):
    """Attention with a whole window, in two disjoint parts: its keys, in two causal and non-causal ways."""
    near = torch_nat.na1d(q, k, v, 3, return_lse=True)
    scores = torch_nat.na1d_qk(q, k, q.shape[1], scale=q.shape[-1] ** -0.5)
    place = torch.arange(q.shape[1])
    start = (place - 1).clamp(0, q.shape[1] - 3)
    inside = (place[None] >= start[:, None]) & (place[None] < start[:, None] + 3)
    scores = scores.masked_fill(inside[None, :, None], -torch.inf)
    far = torch_nat.na1d_av(scores.softmax(-1), v, q.shape[1]), scores.logsumexp(-1)
    return near, far


def test_merging_disjoint_keys_is_attention_over_all():
    q, k, v = leaves((2, 9, 2, 4), (2, 9, 1, 4), (2, 9, 1, 3))
    d_out, d_lse = draw(2, 9, 2, 3), draw(2, 9, 2)
    near, far = halves(q, k, v)
    merged = torch_nat.merge_attentions([near[0], far[0]], [near[1], far[1]])
    whole = torch_nat.na1d(q, k, v, 9, return_lse=True)
    torch.testing.assert_close(merged, whole, rtol=1e-12, atol=1e-12)
    actual = torch.autograd.grad(merged, (q, k, v), (d_out, d_lse))
    expected = torch.autograd.grad(whole, (q, k, v), (d_out, d_lse))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_merging_gradients_and_inputs_that_stay():
    given = leaves(*[(2, 3, 2, 4)] * 3, *[(2, 3, 2)] * 3)
    before = [x.detach().clone() for x in given]

    def merge(*x):
        return torch_nat.merge_attentions(x[:3], x[3:])

    assert torch.autograd.gradcheck(merge, given)
    assert torch.autograd.gradgradcheck(merge, given, fast_mode=True)
    assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True))


def test_merging_nothing():
    """No keys at all on one side, on both, far apart, and in 16 bits."""
    out, lse = torch.randn(1, 4, 2, 8), torch.randn(1, 4, 2)
    lse.requires_grad_()
    nothing = torch.full_like(lse, -torch.inf).requires_grad_()
    merged = torch_nat.merge_attentions([out, torch.zeros_like(out)], [lse, nothing])
    torch.testing.assert_close(merged, (out, lse))
    gradients = torch.autograd.grad(merged[0].sum() + merged[1].sum(), (lse, nothing))
    assert all(g.isfinite().all() for g in gradients)
    both, lse_of_both = torch_nat.merge_attentions([out, out], [nothing, nothing])
    assert (both == 0).all() and (lse_of_both == -torch.inf).all()
    merged = torch_nat.merge_attentions([out.half(), 2 * out.half()], [lse + 1000, lse - 1000])
    assert merged[0].dtype == torch.float16
    torch.testing.assert_close(merged[0], out.half())


# Dropout


def with_seed(
    case: Case, arrays: dict, monkeypatch, look: bool, packed: bool = False, device: str = "cpu"
) -> dict[str, np.ndarray]:
    """A run of a case whose seed is not drawn but given."""
    seed = to_torch(arrays["dropout_seed"].view(np.int32), device)
    monkeypatch.setattr("torch_nat.functional._draw_seed", lambda like: seed)
    x = tensors_of({n: a for n, a in arrays.items() if n != "dropout_seed"}, device)
    optional = {name: x[name] for name in OPTIONAL if name in x}
    leading = [x[n] for n in "qkv"]
    if packed:
        leading = [torch.stack([t.detach() for t in leading], -3).requires_grad_()]
    function, options = (PACKED if packed else FUNCTIONS)[case.rank], {"return_lse": True, "dropout_p": case.dropout_p}
    with Looking() if look else torch.enable_grad():
        out, lse = function(*leading, **case.call_arguments, **optional, **options)
        gradients = torch.autograd.grad((out, lse), [*leading, *optional.values()], (x["d_out"], x["d_lse"]))
    of_leading = gradients[0].unbind(-3) if packed else gradients[:3]
    names = ["d_" + n if n[0] == "a" else "d" + n for n in optional]
    named = [*zip(("dq", "dk", "dv"), of_leading, strict=True), *zip(names, gradients[len(leading) :], strict=True)]
    return {name: to_numpy(t) for name, t in [("out", out), ("lse", lse), *named]}


@pytest.mark.parametrize("look", [False, True], ids=["direct", "dispatcher"])
@pytest.mark.parametrize("case", DROPOUT_CASES, ids=lambda c: c.name)
def test_dropout(case: Case, look: bool, monkeypatch):
    arrays = inputs(case, "float32")
    check(case, "float32", arrays, with_seed(case, arrays, monkeypatch, look))


@pytest.mark.parametrize("look", [False, True], ids=["direct", "dispatcher"])
def test_packed_dropout(look: bool, monkeypatch):
    case = BY_NAME["dropout"]
    arrays = inputs(case, "float32")
    check(case, "float32", arrays, with_seed(case, arrays, monkeypatch, look, packed=True))


def test_dropout_follows_the_generator():
    q = torch.randn(1, 9, 1, 8)

    def run(seed: int | None) -> torch.Tensor:
        if seed is not None:
            torch.manual_seed(seed)
        return torch_nat.na1d(q, q, q, 5, dropout_p=0.5)

    first, second, again = run(0), run(None), run(0)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    torch_nat.na1d(q, q, q, 5)
    assert torch.equal(torch.get_rng_state(), state), "no dropout draws nothing"


def test_dropout_is_checkpointed():
    """What is computed again in the backward drops the same weights."""
    torch.manual_seed(0)
    q = torch.randn(1, 9, 1, 8, requires_grad=True)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return torch_nat.na1d(x, x, x, 5, dropout_p=0.5).square().sum()

    torch.manual_seed(1)
    expected = torch.autograd.grad(loss(q), q)[0]
    torch.manual_seed(1)
    actual = torch.autograd.grad(torch.utils.checkpoint.checkpoint(loss, q, use_reentrant=False), q)[0]
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_dropout_compiles_in_one_graph():
    torch._dynamo.reset()
    q = torch.randn(1, 30, 4, 8, requires_grad=True)
    compiled = torch.compile(lambda x: torch_nat.na1d(x, x, torch.ones_like(x), 25, dropout_p=0.25), fullgraph=True)
    out = compiled(q)
    assert not torch.equal(out, compiled(q)), "each call drops other weights"
    assert 0.9 < out.mean() < 1.1 and out.std() > 0.01
    out.sum().backward()


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap_with_dropout(randomness: str):
    """Each slice is what a call on it alone would be; with its own gradient, by the same weights."""
    q = torch.randn(3, 1, 9, 1, 8)[:1].expand(3, 1, 9, 1, 8).contiguous()
    seeds = []

    def loss(x):
        out = torch_nat.na1d(x, x, x, 5, dropout_p=0.5)
        seeds.append(out)
        return out.square().sum()

    gradients, values = torch.vmap(torch.func.grad_and_value(loss), randomness=randomness)(q)
    assert torch.equal(values[0], values[1]) is (randomness == "same")
    step, direction = 1e-3, torch.randn_like(q[0])
    torch.manual_seed(5)
    gradient = torch.func.grad(loss)(q[0])

    def at(shift: float) -> torch.Tensor:
        torch.manual_seed(5)
        return loss((q[0] + shift * direction).detach())

    torch.testing.assert_close((gradient * direction).sum(), (at(step) - at(-step)) / (2 * step), rtol=2e-2, atol=2e-2)
    assert gradients.shape == q.shape


@pytest.mark.parametrize("name", ["dropout", "dropout_additional"])
def test_opcheck_with_dropout(name: str):
    case = BY_NAME[name]
    x = tensors_of({n: a for n, a in inputs(case, "float32").items() if n != "dropout_seed"})
    seed = torch.tensor([case.dropout_seed], dtype=torch.int32)
    window = ops.call_arguments(case.window, None, None, case.dropout_p)
    given = (*(x.get(n) for n in ("q", "k", "v", *OPTIONAL)), seed)
    torch.library.opcheck(torch.ops.natcore.attention, (*given, *window))
