"""Every published variant: configs, checkpoint names, sizes; and each layout's forward, written out."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from math import prod

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torch_nat
from natcore.checkpoints import parameter_shapes
from natcore.models import MODELS, NATConfig
from tests.family import ISOTROPIC, ROWS, SWIN, VIT, published_shapes
from tests.torch.common import randomized


def test_rows():
    assert list(MODELS) == list(ROWS)
    for name, row in ROWS.items():
        config = MODELS[name]
        assert (config.depths, config.num_heads, config.embed_dim) == (row.depths, row.heads, row.width), name
        assert (config.mlp_ratio, config.drop_path_rate, config.kernel_size) == (row.ratio, row.drop_path, row.kernel)
        assert config.layer_scale == (1e-5 if row.scaled else None), name
        for stage, depth in enumerate(row.depths):
            for block in range(depth):
                assert config.dilation(stage, block) == (row.dilations[stage] if block % 2 else 1), name


@pytest.mark.parametrize("name", ROWS)
def test_published_checkpoints_load_strictly(name: str):
    shapes = published_shapes(name)
    assert parameter_shapes(MODELS[name]) == shapes
    with torch.device("meta"):
        model = torch_nat.create_model(name)
        state = {key: torch.empty(shape) for key, shape in shapes.items()}
    if name.startswith("vit_rpb"):
        index = published_index(14)
        state |= {f"layers.{j}.attn.relative_position_index": index for j in range(12)}
    model.load_state_dict(state, strict=True)
    assert sum(p.numel() for p in model.parameters()) == ROWS[name].parameters == sum(map(prod, shapes.values()))
    assert not list(model.buffers())


@pytest.mark.parametrize("name", ["dinat_small", "dinat_large_384_11x11", "dinat_s_large_384", "dinat_isotropic_small"])
def test_images_of_the_published_size_need_no_padding(name: str):
    extents: set[int] = set()
    with torch.device("meta"):
        model = torch_nat.create_model(name)
        for module in model.modules():
            if isinstance(module, torch_nat.NeighborhoodAttention2D):
                module.register_forward_pre_hook(lambda _, inputs: extents.update(inputs[0].shape[1:3]))
        model(torch.empty(1, 3, *[ROWS[name].size] * 2))
    size = ROWS[name].size
    assert extents == ({14} if "isotropic" in name else {size // 4, size // 8, size // 16, size // 32})


# The published forward of each layout, with torch's functions alone around the attention.


def published_index(side: int) -> Tensor:
    """ViT-rpb's buffer as its code builds it: query minus key, and the whole table of pairs turned by 180 degrees."""
    grid = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")).flatten(1)
    relative = grid[:, :, None] - grid[:, None, :] + side - 1
    return (relative[0] * (2 * side - 1) + relative[1]).flip(0, 1)


class ByHand:
    """Maps and logits of a model by its state dict, in the published order of operations."""

    def __init__(self, model: torch_nat.NAT):
        self.state, self.config = model.state_dict(), model.config

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"))

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"], 1e-5)

    def patches(self, x: Tensor, side: int) -> Tensor:
        x = F.pad(x, (0, -x.shape[3] % side, 0, -x.shape[2] % side))
        x = F.conv2d(x, self.state["patch_embed.proj.weight"], self.state["patch_embed.proj.bias"], stride=side)
        return self.norm("patch_embed.norm", x.permute(0, 2, 3, 1))

    def merge(self, name: str, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        parts = [x[:, row::2, column::2] for row, column in ((0, 0), (1, 0), (0, 1), (1, 1))]
        return self.linear(f"{name}.reduction", self.norm(f"{name}.norm", torch.cat(parts, -1)))

    def neighborhood(self, name: str, x: Tensor, heads: int, dilation: int) -> Tensor:
        height, width = x.shape[1:3]
        reach = self.config.kernel_size * dilation
        x = F.pad(x, (0, 0, 0, max(reach - width, 0), 0, max(reach - height, 0)))
        q, k, v = self.linear(f"{name}.qkv", x).unflatten(-1, (3, heads, -1)).unbind(-3)
        rpb = self.state[f"{name}.rpb"]
        out = torch_nat.na2d(q, k, v, self.config.kernel_size, dilation=dilation, rpb=rpb)
        return self.linear(f"{name}.proj", out.flatten(-2)[:, :height, :width])

    def dense(self, name: str, x: Tensor, heads: int) -> Tensor:
        side = x.shape[1]
        q, k, v = self.linear(f"{name}.qkv", x.flatten(1, 2)).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        bias = self.state[f"{name}.rpb"].flatten(1)[:, published_index(side)]
        weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1) + bias).softmax(-1)
        return self.linear(f"{name}.proj", (weights @ v).transpose(1, 2).flatten(2)).view_as(x)

    def block(self, name: str, x: Tensor, stage: int, j: int) -> Tensor:
        heads, normed = self.config.num_heads[stage], self.norm(f"{name}.norm1", x)
        dense = self.config.layout == "vit_rpb"
        attn, dilation = f"{name}.attn", self.config.dilation(stage, j)
        x = x + (self.dense(attn, normed, heads) if dense else self.neighborhood(attn, normed, heads, dilation))
        hidden = F.gelu(self.linear(f"{name}.mlp.fc1", self.norm(f"{name}.norm2", x)))
        return x + self.linear(f"{name}.mlp.fc2", hidden)

    def maps(self, x: Tensor) -> list[Tensor]:
        depths, maps = self.config.depths, []
        if len(depths) == 1:
            x = self.patches(x, 16)
            for j in range(depths[0]):
                x = self.block(f"layers.{j}", x, 0, j)
            return [x]
        x = self.patches(x, 4)
        for i, depth in enumerate(depths):
            for j in range(depth):
                x = self.block(f"layers.{i}.blocks.{j}", x, i, j)
            maps.append(x)
            if i < len(depths) - 1:
                x = self.merge(f"layers.{i}.downsample", x)
        return maps

    def logits(self, x: Tensor) -> Tensor:
        return self.linear("head", self.norm("norm", self.maps(x)[-1]).flatten(1, 2).mean(1))


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("config", "size"),
    [
        pytest.param(SWIN, (32, 48), id="dinat_s"),
        pytest.param(SWIN, (22, 39), id="dinat_s padded three times"),
        pytest.param(ISOTROPIC, (96, 112), id="isotropic"),
        pytest.param(ISOTROPIC, (97, 40), id="isotropic padded"),
        pytest.param(VIT, (64, 64), id="vit_rpb"),
        pytest.param(replace(VIT, layer_scale=None, kernel_size=7), (112, 112), id="vit_rpb odd"),
    ],
)
def test_forward_against_the_published_code(config: NATConfig, size: tuple[int, int]):
    model, x = randomized(config), draw(2, 3, *size)
    torch.testing.assert_close(model(x), ByHand(model).logits(x))


@pytest.mark.parametrize(("config", "size"), [(SWIN, (40, 56)), (ISOTROPIC, (96, 112))], ids=["dinat_s", "isotropic"])
def test_feature_maps_have_their_own_norms(config: NATConfig, size: tuple[int, int]):
    model, x = randomized(replace(config, features_only=True)), draw(1, 3, *size)
    hand = ByHand(model)
    for i, (actual, last) in enumerate(zip(model(x), hand.maps(x), strict=True)):
        torch.testing.assert_close(actual, hand.norm(f"norm{i}", last).permute(0, 3, 1, 2))


def test_a_vit_takes_its_own_map_only():
    with pytest.raises(ValueError, match=r"maps of 4 x 4 tokens \(images of 64 x 64\), but one axis has 5"):
        torch_nat.NAT(VIT)(torch.zeros(1, 3, 64, 80))


def test_the_published_buffer_is_dropped_and_given_back():
    model = randomized(VIT)
    published = torch_nat.published_state_dict(model)
    assert published.keys() - model.state_dict().keys() == {
        f"layers.{j}.attn.relative_position_index" for j in range(2)
    }
    assert all(torch.equal(published[f"layers.{j}.attn.relative_position_index"], published_index(4)) for j in range(2))
    other = nn.Sequential(torch_nat.NAT(VIT).double())
    other.load_state_dict({f"0.{name}": tensor for name, tensor in published.items()}, strict=True)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))
    published["layers.1.attn.relative_position_index"] = published_index(4).flip(0, 1)
    with pytest.raises(ValueError, match=r"layers.1.attn.relative_position_index \(16, 16\) is not key minus query"):
        model.load_state_dict(published)


def test_models_of_other_layouts_have_no_buffer_to_give():
    model = torch_nat.NAT(ISOTROPIC)
    assert torch_nat.published_state_dict(model).keys() == model.state_dict().keys()
    state = model.state_dict() | {"layers.0.attn.relative_position_index": published_index(3)}
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict(state)


@pytest.mark.parametrize("config", [SWIN, ISOTROPIC, VIT], ids=lambda config: config.layout)
def test_files_and_training(config: NATConfig, tmp_path):
    torch.manual_seed(0)
    model, x = torch_nat.NAT(replace(config, num_classes=4)), torch.randn(4, 3, 64, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), torch.arange(4))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses
    assert all(p.grad is not None for p in model.parameters())
    torch_nat.save(model, tmp_path / "model")
    loaded = torch_nat.load(tmp_path / "model")
    assert loaded.config == model.config
    torch.testing.assert_close(loaded(x), model.eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"layout": "swin"}, "layout 'swin' must be one of nat, dinat_s, isotropic, vit_rpb"),
        ({"layout": "isotropic"}, r"layout 'isotropic' has one stage, but depths are \(2, 2\)"),
        ({"layout": "vit_rpb", "depths": (2,), "num_heads": (1,), "dilations": ((1, 2),)}, "dilations .* must be 1"),
    ],
)
def test_refusals(changes: dict, text: str):
    with pytest.raises(ValueError, match=text):
        replace(SWIN, **changes)


def test_timm_is_named_where_it_is_missing(monkeypatch):
    for name in ("timm", "timm.models"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "torch_nat.timm", raising=False)
    with pytest.raises(ImportError, match=r"needs timm 1\.0 or newer: pip install 'timm>=1\.0'"):
        importlib.import_module("torch_nat.timm")
