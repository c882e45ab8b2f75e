"""The modules: what they compute, their parameters, drop path."""

import numpy as np
import pytest
import torch

import torch_nat
from natcore import reference
from natcore.problem import Window
from torch_nat.layers import DropPath, drop_path_factors

LAYERS = {
    1: torch_nat.NeighborhoodAttention1D,
    2: torch_nat.NeighborhoodAttention2D,
    3: torch_nat.NeighborhoodAttention3D,
}


def by_hand(layer, x: torch.Tensor, window: Window, scale: float | None) -> np.ndarray:
    """The same layer through NumPy and the definition."""
    weights = {name: p.detach().numpy() for name, p in layer.named_parameters()}
    qkv = x.numpy() @ weights["qkv.weight"].T + weights.get("qkv.bias", 0)
    qkv = qkv.reshape(*x.shape[:-1], 3, layer.num_heads, -1)
    q, k, v = (qkv[..., i, :, :] for i in range(3))
    out, _ = reference.forward(q, k, v, window, scale=scale, rpb=weights.get("rpb"))
    return out.reshape(x.shape) @ weights["proj.weight"].T + weights["proj.bias"]


@pytest.mark.parametrize(
    ("rank", "shape", "options"),
    [
        (1, (2, 11, 12), {"kernel_size": 5, "dilation": 2, "rel_pos_bias": True}),
        (2, (2, 7, 8, 12), {"kernel_size": 3, "rel_pos_bias": True}),
        (2, (2, 7, 8, 12), {"kernel_size": (3, 4), "stride": (1, 2), "is_causal": (True, False), "qkv_bias": False}),
        (2, (1, 7, 8, 12), {"kernel_size": 3, "qk_scale": 0.0, "rel_pos_bias": True}),
        (3, (1, 4, 5, 6, 12), {"kernel_size": (2, 3, 5), "rel_pos_bias": True, "qk_scale": 0.25}),
    ],
)
def test_layer(rank: int, shape: tuple, options: dict):
    torch.manual_seed(0)
    layer = LAYERS[rank](12, 3, **options).double()
    x = torch.randn(shape, dtype=torch.float64)
    names = {n: options[n] for n in ("kernel_size", "stride", "dilation", "is_causal") if n in options}
    expected = by_hand(layer, x, Window.of(rank, **names), options.get("qk_scale"))
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, atol=1e-10)


def test_parameters_and_initialisation():
    torch.manual_seed(0)
    layer = torch_nat.NeighborhoodAttention2D(64, 16, 7, rel_pos_bias=True)
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert shapes == {
        "rpb": (16, 13, 13), "qkv.weight": (192, 64), "qkv.bias": (192,), "proj.weight": (64, 64), "proj.bias": (64,),
    }  # fmt: skip
    assert 0.018 < layer.rpb.std().item() < 0.022
    plain = torch_nat.NeighborhoodAttention1D(64, 2, 7, qkv_bias=False)
    assert {name for name, _ in plain.named_parameters()} == {"qkv.weight", "proj.weight", "proj.bias"}


def test_every_parameter_gets_a_gradient_and_it_trains():
    torch.manual_seed(0)
    layer = torch_nat.NeighborhoodAttention2D(8, 2, 3, rel_pos_bias=True)
    x, target = torch.randn(2, 5, 5, 8), torch.randn(2, 5, 5, 8)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_projection_dropout_is_active_in_training_only():
    torch.manual_seed(0)
    layer, x = torch_nat.NeighborhoodAttention1D(8, 2, 3, proj_drop=0.5), torch.randn(2, 9, 8)
    assert (layer(x) == 0).float().mean() > 0.25
    assert torch.equal(layer.eval()(x), layer(x)) and not (layer(x) == 0).any()


def test_attention_dropout_is_active_in_training_only():
    layer, x = torch_nat.NeighborhoodAttention1D(8, 2, 5, attn_drop=0.5), torch.randn(2, 9, 8)

    def run(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return layer(x)

    assert torch.equal(run(0), run(0)) and not torch.equal(run(0), run(1))
    layer.eval()
    plain = torch_nat.NeighborhoodAttention1D(8, 2, 5)
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(run(0), run(1)) and torch.equal(run(0), plain(x))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: torch_nat.NeighborhoodAttention2D(8, 2, 3, attn_drop=1.0), r"attn_drop 1.0 must be in"),
        (lambda: torch_nat.NeighborhoodAttention2D(10, 3, 3), "embed_dim 10 is not divisible by num_heads 3"),
        (lambda: torch_nat.NeighborhoodAttention2D(8, 2, 3, stride=5), "stride 5 > kernel_size 3"),
        (lambda: torch_nat.NeighborhoodAttention2D(8, 2, 7)(torch.zeros(1, 6, 9, 8)), "extent 6 on axis 0"),
        (lambda: torch_nat.NeighborhoodAttention2D(8, 2, 3)(torch.zeros(1, 6, 9)), "input has shape"),
        (lambda: torch_nat.NeighborhoodAttention2D(8, 2, 3)(torch.zeros(1, 6, 9, 4)), "input has shape"),
        (lambda: DropPath(1.0), "drop path rate 1.0"),
    ],
)
def test_refusals(call, text: str):
    with pytest.raises(ValueError, match=text):
        call()


def test_drop_path():
    torch.manual_seed(0)
    layer, x = DropPath(0.25), torch.ones(4000, 2, 3)
    y = layer(x)
    per_sample = y.reshape(4000, -1)
    assert (per_sample == per_sample[:, :1]).all(), "a sample is kept or dropped as a whole"
    kept = per_sample[:, 0] != 0
    assert abs(kept.float().mean().item() - 0.75) < 0.03
    torch.testing.assert_close(per_sample[kept], torch.full_like(per_sample[kept], 1 / 0.75))
    numbers = torch.tensor([[0.0, 0.7499, 0.7501, 0.9999], [0.0, 0.4999, 0.5001, 0.9999]])
    factors, others = drop_path_factors([0.25, 0.5], torch.float64, numbers)
    assert (factors.tolist(), others.tolist()) == ([1 / 0.75, 1 / 0.75, 0, 0], [2, 2, 0, 0])
    assert torch.equal(layer(x[:4], factors), x[:4] * factors[:, None, None])
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert layer.eval()(x) is x
    assert DropPath(0.0)(x) is x


def test_half_precision_modules():
    torch.manual_seed(0)
    layer, x = torch_nat.NeighborhoodAttention2D(16, 2, 3, rel_pos_bias=True), torch.randn(1, 6, 6, 16)
    expected = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = layer(x)
    whole = layer.bfloat16()(x.bfloat16())
    assert mixed.dtype == whole.dtype == torch.bfloat16
    for actual in (mixed, whole):
        torch.testing.assert_close(actual.float(), expected, atol=0.05, rtol=0.05)
