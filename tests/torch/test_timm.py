"""The family in timm's registry, with what its training and evaluation scripts call.

The test environment has no timm, which wants a torchvision made for the installed torch. timm 1.0.3 and 1.0.31 pass,
with torch 2.13.0 (CPU) and torchvision 0.28.0.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import torch_nat
from natcore.checkpoints import resize_rpb
from natcore.models import MODELS
from tests.family import ROWS

try:
    import timm
    from timm.data import resolve_data_config
    from timm.optim import create_optimizer_v2
except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision of another torch
    reason = f"timm does not import: {error}; pip install timm torchvision (1.0.3 and 1.0.31 pass with 0.28.0)"
    pytest.skip(reason, allow_module_level=True)

with warnings.catch_warnings():
    warnings.simplefilter("error")  # a name that timm has already
    import torch_nat.timm

PUBLISHED = "https://shi-labs.com/projects/"


def small(name: str, **changes) -> nn.Module:
    """A model of a few blocks under one of the family's names."""
    depths = tuple(1 for _ in MODELS[name].depths)
    heads = MODELS[name].num_heads if len(depths) == 1 else (1, 2, 4, 8)
    changes = {"embed_dim": 384 if len(depths) == 1 else 32, "num_heads": heads, **changes}
    return timm.create_model(name, depths=depths, dilations=ones(depths), num_classes=5, **changes)


def ones(depths: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Dilations of 1, since timm drops keywords that are None."""
    return tuple((1,) * depth for depth in depths)


def test_every_model_is_registered():
    assert set(MODELS) <= set(timm.list_models())
    with torch.device("meta"):
        model = timm.create_model("dinat_s_tiny", drop_path_rate=0.1)
    assert sum(p.numel() for p in model.parameters()) == ROWS["dinat_s_tiny"].parameters
    assert model.config == torch_nat.models.model_config("dinat_s_tiny", drop_path_rate=0.1)
    with torch.device("meta"):
        assert timm.create_model("vitrpb_small").config == MODELS["vit_rpb_small"]


@pytest.mark.parametrize("name", MODELS)
def test_data_configs(name: str):
    cfg = timm.get_pretrained_cfg(name)
    size = ROWS[name].size
    assert cfg.input_size == (3, size, size) and cfg.crop_pct == (1.0 if size == 384 else 0.875)
    data = resolve_data_config({}, pretrained_cfg=cfg.to_dict())
    assert data["interpolation"] == "bicubic" and data["mean"] == (0.485, 0.456, 0.406)
    with torch.device("meta"):
        model = timm.create_model(name)
        assert model.forward_features(torch.empty(1, *cfg.input_size)).shape[1:3] == cfg.pool_size
    assert isinstance(model.get_submodule(cfg.first_conv), nn.Conv2d)
    assert model.get_classifier() is model.get_submodule(cfg.classifier)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("nat_tiny", "nat/checkpoints/CLS/nat_tiny.pth"),
        ("dinat_mini", "dinat/checkpoints/imagenet1k/dinat_mini_in1k_224.pth"),
        ("dinat_large", "dinat/checkpoints/imagenet1k/dinat_large_in22k_in1k_224.pth"),
        ("dinat_large_384_11x11", "dinat/checkpoints/imagenet1k/dinat_large_in22k_in1k_384_11x11.pth"),
        ("dinat_s_large_384", "dinat/checkpoints/imagenet1k/dinat_s_large_in1k_384.pth"),
        ("dinat_isotropic_base", "dinat/checkpoints/isotropic/dinat_isotropic_base_in1k_224.pth"),
        ("vit_rpb_small", "dinat/checkpoints/isotropic/vitrpb_small_in1k_224.pth"),
    ],
)
def test_published_weights(name: str, file: str):
    assert timm.get_pretrained_cfg(name).url == PUBLISHED + file


@pytest.mark.parametrize("name", ["nat_mini", "dinat_s_tiny", "dinat_isotropic_small", "vit_rpb_small"])
def test_features_and_classifier(name: str, tmp_path: Path):
    torch.manual_seed(0)
    size = 48 if "rpb" in name else 64
    model, x = small(name, **({"img_size": size} if "rpb" in name else {})).eval(), torch.randn(1, 3, size, size)
    features = model.forward_features(x)
    assert features.shape[-1] == model.num_features
    assert model.forward_head(features, pre_logits=True).shape == (1, model.head_hidden_size)
    torch_nat.save(model, tmp_path / "model")
    same = torch_nat.load(tmp_path / "model")
    torch.testing.assert_close(model(x), same(x))
    torch.testing.assert_close(model.forward_head(features), same(x))
    model.reset_classifier(3)
    assert model(x).shape == (1, 3) and model.num_classes == 3 and model.config.num_classes == 3
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), model.forward_head(features, pre_logits=True))
    with pytest.raises(ValueError, match="global_pool is 'max'"):
        model.reset_classifier(3, "max")


def test_intermediates():
    torch.manual_seed(0)
    model, x = small("nat_mini").eval(), torch.randn(1, 3, 64, 64)
    final, maps = model.forward_intermediates(x, norm=True)
    torch.testing.assert_close(maps[-1].permute(0, 2, 3, 1), final)
    torch.testing.assert_close(final, model.forward_features(x))
    early, (third,) = model.forward_intermediates(x, [2], stop_early=True, output_fmt="NHWC")
    torch.testing.assert_close(third.permute(0, 3, 1, 2), maps[2])
    assert early.shape == (1, 2, 2, 256)  # the next stage's input


@pytest.mark.parametrize("name", ["dinat_s_tiny", "nat_isotropic_small"])
def test_features_only(name: str):
    model = small(name, features_only=True)
    maps = model(torch.randn(1, 3, 64, 64))
    assert [m.shape[1] for m in maps] == model.feature_info.channels()
    assert [64 // m.shape[2] for m in maps] == model.feature_info.reduction()
    two = small("nat_mini", features_only=True, out_indices=(0, 1))
    assert len(two(torch.randn(1, 3, 64, 64))) == 2
    assert not [n for n, _ in two.named_parameters() if "levels.2" in n or "head" in n or n.startswith("model.norm")]


@pytest.mark.parametrize(
    ("name", "changes"), [("dinat_mini", {"kernel_size": 11}), ("vit_rpb_small", {"img_size": 256})]
)
def test_pretrained_weights_of_another_kernel_size_and_head(name: str, changes: dict, tmp_path: Path):
    torch.manual_seed(0)
    depths = {"depths": (short := tuple(1 for _ in MODELS[name].depths)), "dilations": ones(short)}
    source = torch_nat.create_model(name, **depths)
    torch.save(torch_nat.published_state_dict(source), tmp_path / "published.pth")
    overlay = {"file": str(tmp_path / "published.pth")}
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=7, **depths, **changes)
    assert model.config.kernel_size == {"dinat_mini": 11, "vit_rpb_small": 16}[name]
    side = 2 * model.config.kernel_size - 1
    for (key, old), (other, new) in zip(source.state_dict().items(), model.state_dict().items(), strict=True):
        assert key == other
        if key.endswith("rpb"):
            assert torch.equal(new, torch.from_numpy(resize_rpb(old.numpy(), (side, side))))
        elif key.startswith("head"):
            assert len(new) == 7
        else:
            assert torch.equal(old, new), key
    same = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **depths)
    assert all(torch.equal(a, b) for a, b in zip(same.parameters(), source.parameters(), strict=True))


def test_optimizers_group_layers():
    for name, biases in (("nat_mini", 4), ("dinat_isotropic_small", 1)):
        model = small(name)
        groups = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.7).param_groups
        assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
        tables = {id(p) for n, p in model.named_parameters() if n.endswith("rpb")}
        assert len(tables) == biases
        assert all(group["weight_decay"] == 0.05 for group in groups if tables & {id(p) for p in group["params"]})


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: small("nat_mini", global_pool="max"), "global_pool is 'max'"),
        (lambda: small("vit_rpb_small", img_size=(224, 256)), "square images of whole patches of 16, not 224 x 256"),
        (lambda: small("nat_mini").forward_intermediates(torch.zeros(1, 3, 64, 64), output_fmt="NLC"), "output_fmt"),
    ],
)
def test_refusals(call, text: str):
    with pytest.raises(ValueError, match=text):
        call()
