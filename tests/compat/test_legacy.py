"""Interfaces that NATTEN removed, called as their users called them, against the float64 reference."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from natcore import reference, reference_unfused
from natcore.problem import Window
from torch_nat.compat.natten import _arguments, v0_14, v0_15, v0_17, v0_17_5
from torch_nat.compat.natten.v0_17 import experimental

f14, f15, f17, f175 = v0_14.functional, v0_15.functional, v0_17.functional, v0_17_5.functional
SCALE = 8**-0.5
MAPS = {1: (11,), 2: (7, 9), 3: (5, 6, 7)}

# Each way to attend, from a scaled query to an output, heads first: q, k, v, rpb, k_add, v_add -> out.
# The window is 3 with dilation 2 (in 3-D: 3 x 3 x 3, dilation 1 along the depth).
UNFUSED: dict[str, tuple[int, dict, Callable]] = {}


def unfused(name: str, rank: int, **window):
    """Register how a user of ``name`` wrote it."""

    def register(function: Callable) -> Callable:
        UNFUSED[f"{name}-{rank}d"] = (rank, window, function)
        return function

    return register


for _library in (f14, f15, f17):
    _name = _library.__name__.split(".")[-2]

    @unfused(_name + "-dqkrpb", 1, dilation=2, bias=True)
    def _(q, k, v, rpb, k_add, v_add, f=_library):
        attn = f.natten1dqkrpb(q, k, rpb, 3, 2)
        return f.natten1dav(attn.softmax(dim=-1), v, 3, 2)

    @unfused(_name + "-dqkrpb", 2, dilation=2, bias=True)
    def _(q, k, v, rpb, k_add, v_add, f=_library):
        attn = f.natten2dqkrpb(query=q, key=k, rpb=rpb, kernel_size=3, dilation=2)
        return f.natten2dav(attn.softmax(dim=-1), v, 3, 2)

    @unfused(_name + "-dqk", 1, dilation=2)
    def _(q, k, v, rpb, k_add, v_add, f=_library):
        return f.natten1dav(f.natten1dqk(q, k, 3, 2).softmax(dim=-1), v, 3, 2)

    @unfused(_name + "-dqk", 2, dilation=2)
    def _(q, k, v, rpb, k_add, v_add, f=_library):
        return f.natten2dav(f.natten2dqk(q, k, 3, 2).softmax(dim=-1), v, 3, 2)


for _library in (f15, f17):
    _name = _library.__name__.split(".")[-2]

    @unfused(_name + "-dqkrpb", 3, dilation=(1, 2, 2), bias=True)
    def _(q, k, v, rpb, k_add, v_add, f=_library):
        attn = f.natten3dqkrpb(q, k, rpb, 3, 3, 1, 2)
        return f.natten3dav(attn.softmax(dim=-1), v, 3, 3, 1, 2)

    @unfused(_name + "-dqk", 3, dilation=(1, 2, 2))
    def _(q, k, v, rpb, k_add, v_add, f=_library):
        return f.natten3dav(f.natten3dqk(q, k, 3, 3, 1, 2).softmax(dim=-1), v, 3, 3, 1, 2)


@unfused("v0_15-qk", 1, dilation=2, extra=True)
def _(q, k, v, rpb, k_add, v_add):
    attn = f15.na1d_qk(q, k, 3, 2, additional_keys=k_add)
    return f15.na1d_av(attn.softmax(dim=-1), v, 3, 2, additional_values=v_add)


@unfused("v0_15-qk_with_bias", 1, dilation=2, bias=True)
def _(q, k, v, rpb, k_add, v_add):
    return f15.na1d_av(f15.na1d_qk_with_bias(q, k, rpb, 3, 2).softmax(dim=-1), v, 3, 2)


@unfused("v0_15-qk_with_bias", 2, dilation=2, bias=True, extra=True)
def _(q, k, v, rpb, k_add, v_add):
    attn = f15.na2d_qk_with_bias(q, k, rpb, 3, 2, k_add)
    return f15.na2d_av(attn.softmax(dim=-1), v, 3, 2, v_add)


@unfused("v0_15-qk", 2, dilation=2)
def _(q, k, v, rpb, k_add, v_add):
    return f15.na2d_av(f15.na2d_qk(q, k, 3, 2).softmax(dim=-1), v, 3, 2)


@unfused("v0_15-qk", 3, dilation=(1, 2, 2), extra=True)
def _(q, k, v, rpb, k_add, v_add):
    attn = f15.na3d_qk(q, k, 3, 3, 1, 2, k_add)
    return f15.na3d_av(attn.softmax(dim=-1), v, 3, 3, 1, 2, v_add)


@unfused("v0_15-qk_with_bias", 3, dilation=(1, 2, 2), bias=True)
def _(q, k, v, rpb, k_add, v_add):
    attn = f15.na3d_qk_with_bias(q, k, rpb, 3, 3, 1, 2)
    return f15.na3d_av(attn.softmax(dim=-1), v, 3, 3, 1, 2)


for _library in (f17, f175):
    _name = _library.__name__.split(".")[-2]

    @unfused(_name + "-qk-bias", 1, dilation=2, bias=True)
    def _(q, k, v, rpb, k_add, v_add, f=_library):
        attn = f.na1d_qk(q, k, kernel_size=3, dilation=2, rpb=rpb)
        return f.na1d_av(attn.softmax(dim=-1), v, kernel_size=3, dilation=2)

    @unfused(_name + "-qk-causal", 1, dilation=2, is_causal=True, extra=True)
    def _(q, k, v, rpb, k_add, v_add, f=_library):
        attn = f.na1d_qk(q, k, 3, 2, k_add, True)
        return f.na1d_av(attn.softmax(dim=-1), v, 3, 2, v_add, True)

    @unfused(_name + "-qk-causal", 2, dilation=(2, 1), is_causal=(True, False))
    def _(q, k, v, rpb, k_add, v_add, f=_library):
        attn = f.na2d_qk(q, k, (3, 3), (2, 1), is_causal=(True, False))
        return f.na2d_av(attn.softmax(dim=-1), v, (3, 3), (2, 1), is_causal=(True, False))

    @unfused(_name + "-qk-bias", 2, bias=True, extra=True)
    def _(q, k, v, rpb, k_add, v_add, f=_library):
        attn = f.na2d_qk(q, k, [3, 3], additional_keys=k_add, rpb=rpb)
        return f.na2d_av(attn.softmax(dim=-1), v, [3, 3], additional_values=v_add)

    @unfused(_name + "-qk-bias", 3, bias=True)
    def _(q, k, v, rpb, k_add, v_add, f=_library):
        attn = f.na3d_qk(q, k, 3, 1, None, None, rpb)
        return f.na3d_av(attn.softmax(dim=-1), v, 3, 1)

    @unfused(_name + "-qk-causal", 3, dilation=(1, 2, 1), is_causal=(True, False, True), extra=True)
    def _(q, k, v, rpb, k_add, v_add, f=_library):
        window = dict(kernel_size=3, dilation=(1, 2, 1), is_causal=(True, False, True))
        attn = f.na3d_qk(q, k, additional_keys=k_add, **window)
        return f.na3d_av(attn.softmax(dim=-1), v, additional_values=v_add, **window)


def operands(rank: int, bias: bool, extra: bool) -> dict[str, np.ndarray]:
    """float64, heads last: q, k, v, d_out and what else the call takes."""
    rng = np.random.default_rng(rank)
    arrays = {name: rng.standard_normal((2, *MAPS[rank], 2, 8)) for name in ("q", "k", "v", "d_out")}
    if bias:
        arrays["rpb"] = rng.standard_normal((2, *(5,) * rank))
    if extra:
        arrays |= {name: rng.standard_normal((2, 4, 2, 8)) for name in ("additional_keys", "additional_values")}
    return arrays


def heads_first(x: np.ndarray) -> Tensor:
    """As old code had it: contiguous ``[batch, heads, *spatial, dim]``."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -2, 1)))


def heads_last(x: Tensor) -> np.ndarray:
    return np.moveaxis(x.detach().numpy(), 1, -2)


@pytest.mark.parametrize("name", UNFUSED)
def test_unfused_attention(name: str):
    rank, options, attend = UNFUSED[name]
    arrays = operands(rank, options.get("bias", False), options.get("extra", False))
    window = Window.of(rank, 3, 1, options.get("dilation", 1), options.get("is_causal", False))
    given = {n: torch.from_numpy(x) if n == "rpb" else heads_first(x) for n, x in arrays.items() if n != "d_out"}
    given = {n: t.requires_grad_() for n, t in given.items()}
    names = ("k", "v", "rpb", "additional_keys", "additional_values")
    out = attend(given["q"] * SCALE, *(given.get(n) for n in names))
    gradients = torch.autograd.grad(out, tuple(given.values()), heads_first(arrays["d_out"]))
    extras = {n: arrays.get(n) for n in names[2:]}
    q, k, v = (arrays[n] for n in "qkv")
    expected, _ = reference.forward(q, k, v, window, scale=SCALE, **extras)
    np.testing.assert_allclose(heads_last(out), expected, rtol=0, atol=1e-12)
    wanted = reference.backward(arrays["d_out"], q, k, v, window, scale=SCALE, **extras)._asdict()
    for n, gradient in zip(given, gradients, strict=True):
        reference_gradient = wanted["d_" + n if n.startswith("add") else "d" + n]
        actual = gradient.numpy() if n == "rpb" else heads_last(gradient)
        np.testing.assert_allclose(actual, reference_gradient, rtol=0, atol=1e-11, err_msg=f"gradient of {n}")


def test_raw_scores_are_the_weights_of_the_window_in_order():
    """Unscaled, with the bias, row-major over the window; -inf where a causal query sees nothing."""
    arrays = operands(2, True, True)
    q, k, k_add = (heads_first(arrays[n]) for n in ("q", "k", "additional_keys"))
    rpb = torch.from_numpy(arrays["rpb"])
    for causal in (False, True):
        scores = f17.na2d_qk(q, k, 3, 2, k_add, causal, rpb)
        assert scores.shape == (2, 2, 7, 9, 13)
        window = Window.of(2, 3, 1, 2, causal)
        expected = reference_unfused.qk(
            arrays["q"], arrays["k"], window, scale=1.0, rpb=arrays["rpb"], additional_keys=arrays["additional_keys"]
        )
        np.testing.assert_allclose(heads_last(scores), expected, rtol=0, atol=1e-12)
        assert torch.isneginf(scores).any() == causal


def test_half_precision_bias_is_cast_and_misfits_are_refused():
    q, rpb = torch.randn(1, 1, 6, 6, 8), torch.randn(1, 5, 5).half()
    torch.testing.assert_close(f17.natten2dqkrpb(q, q, rpb, 3, 1), f17.natten2dqkrpb(q, q, rpb.float(), 3, 1))
    with pytest.raises(ValueError, match="batch, heads"):
        f17.na1d_qk(q, q, 3, 1)
    with pytest.raises(ValueError):
        f17.natten2dqkrpb(q, q, torch.zeros(1, 7, 7), 3, 1)
    with pytest.raises(ValueError):
        f17.natten2dqk(q, q, 7, 1)


@pytest.mark.parametrize("library", [f17, f175, experimental], ids=["0.17.4", "0.17.5", "experimental"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_fused_attention_of_0_17(rank: int, library):
    """dilation is the fifth argument: in 0.20 stride took its place."""
    arrays = operands(rank, True, True)
    q, k, v = (torch.from_numpy(arrays[n]).requires_grad_() for n in "qkv")
    rpb, k_add, v_add = (torch.from_numpy(arrays[n]).requires_grad_() for n in ("rpb", *list(arrays)[-2:]))
    function = getattr(library, f"na{rank}d")
    out = function(q, k, v, 3, 2 if rank < 3 else (1, 2, 1), False, rpb, 0.3, k_add, v_add)
    window = Window.of(rank, 3, 1, 2 if rank < 3 else (1, 2, 1))
    extras = {n: arrays[n] for n in ("rpb", "additional_keys", "additional_values")}
    expected, _ = reference.forward(*(arrays[n] for n in "qkv"), window, scale=0.3, **extras)
    np.testing.assert_allclose(out.detach().numpy(), expected, rtol=0, atol=1e-12)
    gradients = torch.autograd.grad(out, (q, k, v, rpb, k_add, v_add), torch.from_numpy(arrays["d_out"]))
    wanted = reference.backward(arrays["d_out"], *(arrays[n] for n in "qkv"), window, scale=0.3, **extras)
    for actual, gradient in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(actual.numpy(), gradient, rtol=0, atol=1e-11)
    causal = function(q, k, v, kernel_size=3, is_causal=True)
    expected, _ = reference.forward(*(arrays[n] for n in "qkv"), Window.of(rank, 3, is_causal=True))
    np.testing.assert_allclose(causal.detach().numpy(), expected, rtol=0, atol=1e-12)


def test_xformers_arguments_warn_or_raise():
    _arguments._warn_once.cache_clear()
    q = torch.randn(1, 6, 1, 8)
    with pytest.warns(UserWarning, match="xformers_kwargs accepted and ignored"):
        f17.na1d(q, q, q, 3, xformers_kwargs={"op": None})
    with pytest.raises(NotImplementedError, match="attn_bias"):
        f17.na1d(q, q, q, 3, xformers_kwargs={"attn_bias": None})
