"""na1d, na2d, na3d: values and gradients against the reference, by both ways to the kernels."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings

import torch_nat
from tests.cases import CASES, SOME, Case, check, expected, inputs, random_case
from tests.torch.common import FUNCTIONS, OPTIONAL, PACKED, Looking, run, tensors_of, to_numpy, to_torch
from torch_nat import eager, launch, ops

BY_NAME = {case.name: case for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_every_case(case: Case):
    arrays = inputs(case, "float32")
    check(case, "float32", arrays, run(case, tensors_of(arrays)))


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
@pytest.mark.parametrize("case", SOME, ids=lambda c: c.name)
def test_every_dtype(case: Case, dtype: str):
    arrays = inputs(case, dtype)
    check(case, dtype, arrays, run(case, tensors_of(arrays)))


@settings(max_examples=25, deadline=None)
@given(random_case(max_tokens=100))
def test_random_problems(case: Case):
    arrays = inputs(case, "float64")
    check(case, "float64", arrays, run(case, tensors_of(arrays)))


@pytest.mark.parametrize("kernel_size", [[3, 5], (3, 5)])
@pytest.mark.parametrize("shared", [False, True])
def test_a_repeated_call_is_prepared_once(kernel_size: Sequence[int], shared: bool):
    """Lists, and one tensor for all of q, k and v, are looked up by what describes the tensors."""
    q, k, v = (torch.randn(2, 9, 5, 3, 4, requires_grad=True) for _ in "qkv")
    for prepare in (launch.prepare_forward, launch.prepare_backward):
        prepare.cache_clear()
    eager._recent.cache_clear()
    for _ in range(3):
        out = torch_nat.na2d(q, *((q, q) if shared else (k, v)), kernel_size, rpb=torch.randn(3, 5, 9))
        out.backward(torch.randn(q.shape))
    for prepare in (launch.prepare_forward, launch.prepare_backward):
        by_description = shared or (prepare is launch.prepare_forward and isinstance(kernel_size, list))
        assert (prepare.cache_info().misses, prepare.cache_info().hits) == (1, 2 * by_description)


def test_what_differs_is_told_apart():
    """A call is remembered by its arguments and by what its tensors are like: none of these is taken for another."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 6, 6, 6, 2, 8) for _ in "qkv")
    table, other = torch.randn(2, 5, 5, 5), torch.randn(1, 6, 6, 2, 6, 8).transpose(3, 4)

    def check(*tensors: torch.Tensor, **options) -> None:
        ops._recent.cache_clear()
        with Looking():
            fresh = torch_nat.na3d(*tensors, 3, **options, return_lse=True)
        for _ in range(2):
            results = torch_nat.na3d(*tensors, 3, **options, return_lse=True)
            torch.testing.assert_close(results, fresh, rtol=0, atol=0)

    check(q, k, v)
    check(q, k, v, rpb=table)
    with pytest.raises(ValueError, match="go together"):
        torch_nat.na3d(q, k, v, 3, additional_keys=table, return_lse=True)
    check(q, other, v)
    check(q, k, other)
    check(q.double(), k.double(), v.double())
    check(q, k[..., :1, :], v[..., :1, :])
    check(q, k, v, stride=2)
    check(q, k, v, is_causal=True)
    check(q, k, v, scale=0.5)
    for wrong, message in (({"stride": True}, "must be int"), ({"is_causal": 1}, "must be bool")):
        with pytest.raises(ValueError, match=message):
            torch_nat.na3d(q, k, v, 3, **wrong)
    with pytest.raises(TypeError, match="k is NoneType"):
        torch_nat.na3d(q, None, v, 3)
    assert torch_nat.na3d(q, k, v.requires_grad_(), 3).requires_grad
    with torch.no_grad():
        assert not torch_nat.na3d(q, k, v, 3).requires_grad
    assert torch_nat.na3d(q, k, v, 3).requires_grad


@pytest.mark.parametrize("case", SOME, ids=lambda c: c.name)
def test_dispatcher(case: Case):
    arrays = inputs(case, "float32")
    tensors = tensors_of(arrays)
    direct = run(case, tensors)
    with Looking():
        through = run(case, tensors)
    assert direct.keys() == through.keys()
    for name, value in direct.items():
        np.testing.assert_array_equal(value, through[name], err_msg=name)


@pytest.mark.parametrize("look", [False, True], ids=["direct", "dispatcher"])
@pytest.mark.parametrize("case", [BY_NAME[n] for n in ("nat_packed", "causal", "video")], ids=lambda c: c.name)
def test_packed(case: Case, look: bool):
    arrays = inputs(case, "float32")
    tensors = tensors_of(arrays)
    qkv = torch.stack([tensors[n].detach() for n in "qkv"], dim=-3).requires_grad_()
    optional = {name: tensors[name] for name in OPTIONAL if name in tensors}
    if look:
        with Looking():
            out, lse = PACKED[case.rank](qkv, **case.call_arguments, **optional, return_lse=True)
    else:
        out, lse = PACKED[case.rank](qkv, **case.call_arguments, **optional, return_lse=True)
    torch.autograd.backward((out, lse), (tensors["d_out"], tensors["d_lse"]))
    assert qkv.grad is not None and qkv.grad.is_contiguous()
    parts = zip(("dq", "dk", "dv"), qkv.grad.unbind(-3), strict=True)
    named = [("out", out), ("lse", lse), *parts, *((f"d{name}", t.grad) for name, t in optional.items())]
    check(case, "float32", arrays, {name: to_numpy(t) for name, t in named})


def test_packed_gradient_is_written_in_place():
    """One allocation of qkv's size in the backward, and no concatenation."""
    qkv = torch.randn(2, 7, 7, 3, 2, 8, requires_grad=True)
    out = torch_nat.na2d_qkvpacked(qkv, 3)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        out.backward(torch.randn_like(out))
    names = {event.key for event in profile.key_averages()}
    assert not names & {"aten::cat", "aten::stack", "aten::copy_", "aten::add_"}, names


def test_without_lse_and_without_gradient():
    arrays = inputs(BY_NAME["nat_block"], "float32")
    q, k, v, rpb = (to_torch(arrays[n]) for n in ("q", "k", "v", "rpb"))
    out = torch_nat.na2d(q, k, v, 7, rpb=rpb)
    assert isinstance(out, torch.Tensor) and not out.requires_grad
    np.testing.assert_array_equal(to_numpy(out), to_numpy(torch_nat.na2d(q, k, v, 7, rpb=rpb, return_lse=True)[0]))
    with torch.inference_mode():
        assert torch.equal(torch_nat.na2d(q, k, v, 7, rpb=rpb), out)


@pytest.mark.parametrize("only", ["out", "lse"])
@pytest.mark.parametrize("look", [False, True], ids=["direct", "dispatcher"])
def test_gradient_of_one_result(only: str, look: bool):
    """An unused result sends no gradient; the loss on the other alone must still be right."""
    case = BY_NAME["causal_stride"]
    arrays = inputs(case, "float64")
    arrays["d_lse" if only == "out" else "d_out"][...] = 0
    tensors, reference = tensors_of(arrays), expected(case, arrays)
    with Looking() if look else torch.enable_grad():
        q, k, v = (tensors[n] for n in "qkv")
        results = FUNCTIONS[1](q, k, v, **case.call_arguments, rpb=tensors["rpb"], return_lse=True)
        torch.autograd.backward(results[only == "lse"], tensors["d_" + only])
    for name in ("q", "k", "v", "rpb"):
        actual = tensors[name].grad
        actual = np.zeros(tensors[name].shape) if actual is None else to_numpy(actual)
        np.testing.assert_allclose(actual, reference["d" + name], atol=1e-12, err_msg=name)


@pytest.mark.parametrize("kind", ["expanded", "transposed"])
def test_any_gradient_layout(kind: str):
    """sum() sends an expanded d_out, a transpose one with a strided last axis."""
    q = torch.randn(2, 9, 4, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, 4, 9, 2, dtype=torch.float64).permute(3, 2, 1, 0)
    weight = torch.ones(()).double().expand(2, 9, 4, 8) if kind == "expanded" else weight
    out, lse = torch_nat.na1d(q, q, q, 3, return_lse=True)
    d_lse = torch.ones(()).double().expand(lse.shape)
    strided = torch.autograd.grad((out, lse), q, (weight, d_lse), retain_graph=True)[0]
    plain = torch.autograd.grad((out, lse), q, (weight.contiguous(), d_lse.contiguous()))[0]
    torch.testing.assert_close(strided, plain, rtol=0, atol=0)


def test_strided_inputs_are_read_in_place():
    arrays = inputs(BY_NAME["gqa"], "float32")
    contiguous = [to_torch(arrays[n]) for n in "qkv"]
    strided = [t.permute(0, 3, 1, 2, 4).contiguous().permute(0, 2, 3, 1, 4) for t in contiguous]
    assert not strided[0].is_contiguous()
    rpb = to_torch(arrays["rpb"])
    torch.testing.assert_close(
        torch_nat.na2d(*strided, 3, rpb=rpb), torch_nat.na2d(*contiguous, 3, rpb=rpb), rtol=0, atol=0
    )


def test_gradcheck_of_everything():
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=g, requires_grad=True)

    given = (draw(1, 5, 4, 2, 3), draw(1, 5, 4, 1, 3), draw(1, 5, 4, 1, 2), draw(2, 5, 5))
    given += (draw(1, 2, 1, 3), draw(1, 2, 1, 2))

    def function(q, k, v, rpb, keys, values):
        return torch_nat.na2d(
            *(q, k, v, 3), stride=(2, 1), is_causal=(False, True), scale=0.3, rpb=rpb,
            additional_keys=keys, additional_values=values, return_lse=True,
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, given, fast_mode=False)


@pytest.mark.parametrize("look", [False, True], ids=["direct", "dispatcher"])
def test_double_backward_is_refused(look: bool):
    q = torch.randn(1, 5, 1, 4, requires_grad=True)
    with Looking() if look else torch.enable_grad():
        gradient = torch.autograd.grad(torch_nat.na1d(q, q, q, 3).square().sum(), q, create_graph=True)[0]
        with pytest.raises(RuntimeError, match="differentiat"):
            gradient.sum().backward()


Q = torch.zeros(1, 6, 6, 2, 8)


@pytest.mark.parametrize("look", [False, True], ids=["direct", "dispatcher"])
@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: torch_nat.na2d(Q, Q, Q, 7), ValueError, r"7 \* dilation 1 = 7 > extent 6 on axis 0"),
        (lambda: torch_nat.na2d(Q, Q, Q, 3, stride=4), ValueError, "stride 4 > kernel_size 3"),
        (lambda: torch_nat.na2d(Q, Q, Q, (3, 0)), ValueError, "kernel_size on axis 1 is 0"),
        (lambda: torch_nat.na2d(Q, Q, Q, [3, 3, 3]), ValueError, "3 entries"),
        (lambda: torch_nat.na2d(Q, Q, Q, 3.0), ValueError, "must be int, not float"),
        (lambda: torch_nat.na1d(Q, Q, Q, 3), ValueError, "q has 5 axes"),
        (lambda: torch_nat.na2d(Q, Q[:, :5], Q, 3), ValueError, r"k has shape .* differ on axis 1"),
        (lambda: torch_nat.na2d(Q, Q.half(), Q, 3), ValueError, "k has dtype float16, expected float32"),
        (lambda: torch_nat.na2d(Q.int(), Q.int(), Q.int(), 3), ValueError, "q has dtype torch.int32"),
        (lambda: torch_nat.na2d(Q, Q, Q, 3, rpb=torch.zeros(2, 5, 4)), ValueError, r"rpb has shape \(2, 5, 4\)"),
        (lambda: torch_nat.na2d(Q, Q, Q, 3, additional_keys=torch.zeros(1, 2, 2, 8)), ValueError, "go together"),
        (lambda: torch_nat.na2d(Q.mT, Q.mT, Q.mT, 3), ValueError, "stride 8 on its last axis"),
        (lambda: torch_nat.na2d_qkvpacked(Q, 3), ValueError, "qkv has shape"),
        (lambda: torch_nat.na2d(Q.numpy(), Q, Q, 3), TypeError, "q is ndarray"),
        (lambda: torch_nat.na2d(Q, None, Q, 3), TypeError, "k is NoneType"),
    ],
)
def test_refusals(call, error, text: str, look: bool):
    with Looking() if look else torch.enable_grad(), pytest.raises(error, match=text):
        call()


class Subclass(torch.Tensor):
    pass


def test_what_looks_on_goes_through_the_dispatcher(monkeypatch: pytest.MonkeyPatch):
    """Each of these must see an operation; a plain call must not pay for one."""
    direct = []
    attend = eager.attend

    def recording(*args):
        results = attend(*args)
        direct.append(results is not None)
        return results

    monkeypatch.setattr(eager, "attend", recording)

    def is_direct(*tensors: torch.Tensor, **options) -> bool:
        direct.clear()
        torch_nat.na1d(*tensors, 3, **options)
        assert len(direct) == 1
        return direct[0]

    q = torch.randn(1, 5, 1, 8)
    rpb = torch.randn(1, 5)
    assert is_direct(q, q, q)
    assert is_direct(q, q, q, rpb=rpb)
    assert is_direct(torch.nn.Parameter(q), q, q)
    assert not is_direct(q, q.as_subclass(Subclass), q)
    assert not is_direct(*[q.to("meta")] * 3)
    assert not is_direct(q, torch._neg_view(q), q)
    assert not is_direct(q, q, q, rpb=rpb.as_subclass(Subclass))
    with Looking():
        assert not is_direct(q, q, q)
    with torch.autocast("cpu"):
        assert not is_direct(q, q, q)
    with Recording():
        assert not is_direct(q, q, q)
    with torch.autograd.forward_ad.dual_level():
        assert not is_direct(q, q, q)
    inside = []
    torch.vmap(lambda x: inside.append(is_direct(x, x, x)) or x)(q[None])
    torch.func.grad(lambda x: inside.append(is_direct(x, x, x)) or x.sum())(q)
    torch.jit.trace(lambda x: inside.append(is_direct(x, x, x)) or x, (q,), check_trace=False)
    assert inside and not any(inside)
    direct.clear()
    torch.compile(lambda x: torch_nat.na1d(x, x, x, 3), backend="eager")(q)
    assert not direct  # the compiled call did not come here


def test_negative_views_and_subclasses_keep_their_values():
    q = torch.randn(1, 5, 1, 8)
    plain = torch_nat.na1d(-q, q, q, 3)
    torch.testing.assert_close(torch_nat.na1d(torch._neg_view(q), q, q, 3), plain)
    out = torch_nat.na1d((-q).as_subclass(Subclass), q, q, 3)
    assert isinstance(out, Subclass)
    torch.testing.assert_close(out.as_subclass(torch.Tensor), plain)


class Recording(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_the_backward_alone_is_looked_on(packed: bool):
    """A forward that went directly, then a backward under a mode, or with a gradient that is a negative view."""
    torch.manual_seed(0)
    qkv, rpb = torch.randn(1, 6, 3, 2, 8, requires_grad=True), torch.randn(2, 5, requires_grad=True)

    def run(d_out: torch.Tensor) -> tuple:
        out = torch_nat.na1d_qkvpacked(qkv, 3, rpb=rpb) if packed else torch_nat.na1d(*qkv.unbind(-3), 3, rpb=rpb)
        return torch.autograd.grad(out, (qkv, rpb), d_out)

    d_out = torch.randn(1, 6, 2, 8)
    expected = run(d_out)
    with Recording() as mode:
        actual = run(d_out)
    assert [name for name in mode.seen if "backward" in name] == [
        f"natcore::attention_{'packed_' if packed else ''}backward"
    ]
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    torch.testing.assert_close(run(torch._neg_view(-d_out)), expected, rtol=0, atol=0)


def test_meta_tensors_give_shapes():
    q = torch.empty(2, 9, 7, 4, 16, device="meta", dtype=torch.float16)
    out, lse = torch_nat.na2d(q, q, q, 3, return_lse=True)
    assert (out.shape, out.dtype, out.device.type) == (q.shape, torch.float16, "meta")
    assert (lse.shape, lse.dtype) == (q.shape[:-1], torch.float32)
    with pytest.raises(ValueError, match="extent 7"):
        torch_nat.na2d(q, q, q, 8)
