"""What sets the releases of NATTEN apart: each one's own order of arguments, run against the float64 reference."""

from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from natcore import reference
from natcore.problem import Window
from tests.compat.test_legacy import MAPS, SCALE, heads_first, heads_last, operands
from tests.compat.test_legacy_modules import expected_module_output
from torch_nat.compat.natten import v0_14 as v0_14_6
from torch_nat.compat.natten import v0_14_4, v0_14_5, v0_20, v0_20_0, v0_21, v0_21_1

f144, f145 = v0_14_4.functional, v0_14_5.functional
FUSED = {"0.20.0": v0_20_0, "0.20.1": v0_20, "0.21.1": v0_21_1, "0.21.6": v0_21}

UNFUSED: dict[tuple[str, int], Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    ("0.14.4", 1): lambda q, k, v, rpb: f144.natten1dav(f144.natten1dqkrpb(q, k, rpb, 2).softmax(dim=-1), v, 2),
    ("0.14.4", 2): lambda q, k, v, rpb: f144.natten2dav(f144.natten2dqkrpb(q, k, rpb, 2).softmax(dim=-1), v, 2),
    ("0.14.5", 1): lambda q, k, v, rpb: f145.natten1dav(f145.natten1dqkrpb(q, k, rpb, 3, 2).softmax(dim=-1), v, 2),
    ("0.14.5", 2): lambda q, k, v, rpb: f145.natten2dav(f145.natten2dqkrpb(q, k, rpb, 3, 2).softmax(dim=-1), v, 2),
}


@pytest.mark.parametrize(("release", "rank"), UNFUSED)
def test_unfused_attention_of_early_releases(release: str, rank: int):
    """dav without a kernel_size until 0.14.5, dqkrpb without one until 0.14.4."""
    arrays = operands(rank, True, False)
    q, k, v = (heads_first(arrays[name]).requires_grad_() for name in "qkv")
    rpb = torch.from_numpy(arrays["rpb"]).requires_grad_()
    out = UNFUSED[release, rank](q * SCALE, k, v, rpb)
    window = Window.of(rank, 3, 1, 2)
    expected, _ = reference.forward(*(arrays[name] for name in "qkv"), window, scale=SCALE, rpb=arrays["rpb"])
    np.testing.assert_allclose(heads_last(out), expected, rtol=0, atol=1e-12)
    actual = torch.autograd.grad(out, (q, k, v, rpb), heads_first(arrays["d_out"]))
    named = dict(zip(("dq", "dk", "dv", "drpb"), actual, strict=True))
    wanted = reference.backward(
        arrays["d_out"], *(arrays[name] for name in "qkv"), window, scale=SCALE, rpb=arrays["rpb"]
    )._asdict()
    for name, gradient in named.items():
        found = gradient.numpy() if name == "drpb" else heads_last(gradient)
        np.testing.assert_allclose(found, wanted[name], rtol=0, atol=1e-11, err_msg=name)


def test_weights_that_are_no_square_are_refused():
    attn, v = torch.zeros(1, 1, 6, 6, 8), torch.zeros(1, 1, 6, 6, 4)
    with pytest.raises(ValueError, match="8 weights"):
        f145.natten2dav(attn, v, 1)


@pytest.mark.parametrize("rank", [1, 2])
def test_modules_of_0_14_4(rank: int):
    """kernel_size before num_heads and dilation last; a string adapts the dilation to the map."""
    torch.manual_seed(0)
    module = getattr(v0_14_4, f"NeighborhoodAttention{rank}D")
    layers = {
        2: module(12, 3, 2, True, 0.4, 0.0, 0.0, 2),
        1: module(dim=12, kernel_size=3, num_heads=2),
        None: module(12, 3, 2, dilation="auto"),
    }
    for dilation, layer in layers.items():
        layer = layer.double().eval()
        assert (layer.num_heads, layer.kernel_size, layer.head_dim, layer.dilation) == (2, 3, 6, dilation)
        torch.nn.init.normal_(layer.rpb)
        for spatial in ((10, 13)[:rank], (2, 5)[:rank]):
            x = torch.randn(2, *spatial, 12, dtype=torch.float64)
            d = max(min(spatial) // 3, 1) if dilation is None else dilation
            expected = expected_module_output(layer, x, (3,) * rank, (d,) * rank)
            np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=0, atol=1e-12)
    with pytest.warns(DeprecationWarning, match="NeighborhoodAttention2D"):
        old = v0_14_4.NeighborhoodAttention(12, 3, 2)
    assert isinstance(old, v0_14_4.NeighborhoodAttention2D)
    with pytest.raises(TypeError):
        module(12, 3, 2, bias=False)  # came in 0.14.5
    assert v0_14_5.NeighborhoodAttention2D is v0_14_6.NeighborhoodAttention2D


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("release", FUSED)
def test_fused_attention(release: str, rank: int):
    """stride comes before dilation from 0.20 on; an LSE only from 0.21.5 on."""
    library = FUSED[release]
    arrays = operands(rank, False, True)
    q, k, v = (torch.from_numpy(arrays[name]) for name in "qkv")
    extra = [torch.from_numpy(arrays[name]) for name in ("additional_keys", "additional_values")]
    causal = (True, *(False,) * (rank - 1))
    window = Window.of(rank, 2, 2, (1, *(2,) * (rank - 1)), causal)
    expected, _ = reference.forward(
        *(arrays[name] for name in "qkv"),
        window,
        scale=0.3,
        additional_keys=arrays["additional_keys"],
        additional_values=arrays["additional_values"],
    )
    calls = (getattr(library, f"na{rank}d"), library.functional.neighborhood_attention_generic)
    for call in calls:
        out = call(q, k, v, 2, 2, (1, *(2,) * (rank - 1)), causal, 0.3, *extra)
        np.testing.assert_allclose(out.numpy(), expected, rtol=0, atol=1e-12)
        if release != "0.21.6":
            with pytest.raises(TypeError):
                call(q, k, v, 2, return_lse=True)
    if release.startswith("0.20"):
        assert torch.equal(calls[0](q, k, v, 3, try_fuse_additional_kv=True), calls[0](q, k, v, 3))
    other = getattr(library, f"na{rank % 3 + 1}d")
    with pytest.raises(ValueError):
        other(q, k, v, 2)


@pytest.mark.parametrize("release", ["0.20.0", "0.20.1", "0.21.1"])
def test_attention_and_merging_until_0_21_1(release: str):
    """The fourth argument is the scale; merge_attentions returns the output alone."""
    library = FUSED[release]
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal((2, 20, 2, 8)))
    expected, expected_lse = reference.forward(*[x.numpy()] * 3, Window.of(1, 20), scale=0.3)
    out, lse = library.attention(x, x, x, 0.3, return_lse=True)
    np.testing.assert_allclose(out.numpy(), expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(lse.numpy(), expected_lse, rtol=0, atol=1e-12)
    np.testing.assert_allclose(library.attention(x, x, x, scale=0.3).numpy(), expected, rtol=0, atol=1e-12)
    parts = [library.attention(x, x[:, part], x[:, part], 0.3, return_lse=True) for part in (slice(7), slice(7, 20))]
    merged = library.merge_attentions(*(list(pair) for pair in zip(*parts, strict=True)), torch_compile=False)
    np.testing.assert_allclose(merged.numpy(), expected, rtol=0, atol=1e-12)
    with pytest.raises(TypeError):
        library.attention(x, x, x, is_causal=True)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("release", FUSED)
def test_modules_since_0_20(release: str, rank: int):
    """dim in 0.20.0, embed_dim since."""
    name, other = ("dim", "embed_dim") if release == "0.20.0" else ("embed_dim", "dim")
    module = getattr(FUSED[release], f"NeighborhoodAttention{rank}D")
    assert module is getattr(FUSED[release].modules, f"NeighborhoodAttention{rank}D")
    torch.manual_seed(0)
    layer = module(16, 2, 2, 2, 1, False, False, 0.4).double()
    torch.manual_seed(0)
    named = module(**{name: 16}, num_heads=2, kernel_size=2, stride=2, qkv_bias=False, qk_scale=0.4, proj_drop=0.0)
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), named.double().parameters(), strict=True))
    assert layer.stride == (2,) * rank and layer.qkv.bias is None
    x = torch.randn(1, *MAPS[rank], 16, dtype=torch.float64)
    qkv = (x.numpy() @ layer.qkv.weight.detach().numpy().T).reshape(1, *MAPS[rank], 3, 2, 8)
    out, _ = reference.forward(*np.moveaxis(qkv, -3, 0), Window.of(rank, 2, 2), scale=0.4)
    expected = out.reshape(x.shape) @ layer.proj.weight.detach().numpy().T + layer.proj.bias.detach().numpy()
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=0, atol=1e-12)
    with pytest.raises(TypeError):
        module(**{other: 16}, num_heads=2, kernel_size=2)


@pytest.mark.parametrize("release", FUSED)
def test_backend_queries(release: str):
    """Of one tensor in 0.20.0, of q, k and v since; whether causal or packed is asked since 0.21.5."""
    library = FUSED[release]
    q = torch.randn(1, 6, 6, 2, 8)
    x = q.flatten(1, 2)
    one = release == "0.20.0"
    na, dense = ((q,), (x,)) if one else ((q, q, q), (x, x, x))
    asked = (False, False) if release == "0.21.6" else ()
    backends: ModuleType = library.backends
    assert backends.get_compatible_backends(*na, False) == ["cutlass-fna", "flex-fna"]
    assert backends.choose_backend(*na, torch_compile=False) == "cutlass-fna"
    assert backends.get_compatible_fmha_backends(*dense, *asked, False) == ["cutlass-fmha", "flex-fmha"]
    assert backends.choose_fmha_backend(*dense, *asked, torch_compile=False) == "cutlass-fmha"
    listings = [name for name in library.__all__ if "_configs_for_" in name]
    assert len(listings) == (10 if release.startswith("0.20") else 14)
    for name in listings:
        assert getattr(library, name)(*(dense if name.endswith("fmha") else na)) == []
    if not one:
        for kind in ("cutlass", "cutlass_hopper", "cutlass_blackwell"):
            assert getattr(backends, f"can_run_{kind}_fna")(*na) == (kind == "cutlass")
            assert getattr(backends, f"can_run_{kind}_fmha")(*dense, *asked) == (kind == "cutlass")
            if kind != "cutlass":
                with pytest.raises(RuntimeError):
                    getattr(backends, f"can_run_{kind}_fmha")(*dense, *asked, raise_error=True)
        assert backends.can_run_flex_attention(*na, torch_compile=False)
