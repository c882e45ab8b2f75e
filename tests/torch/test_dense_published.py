"""Files as mmsegmentation, mmdetection and the classification code wrote them: every name and shape fits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from natcore.models import NATConfig
from torch_nat import NAT, dense

SMALL = NATConfig(16, (1, 2, 1), (1, 1, 2), mlp_ratio=2, kernel_size=3, in_chans=2, features_only=True)
PYRAMID = NATConfig(16, (1, 1, 1, 1), (1, 1, 2, 4), mlp_ratio=2, kernel_size=3, features_only=True)
CLASSES, CHANNELS = 3, 8


def _published_upernet(classes: int, channels: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the heads in a file of mmsegmentation, for SMALL."""

    def block(name: str, inward: int, outward: int, side: int) -> dict[str, tuple[int, ...]]:
        norm = {f"{name}.bn.{part}": (outward,) for part in ("weight", "bias", "running_mean", "running_var")}
        return {f"{name}.conv.weight": (outward, inward, side, side), **norm, f"{name}.bn.num_batches_tracked": ()}

    c, half = channels, channels // 2
    shapes = {"decode_head.conv_seg.weight": (classes, c, 1, 1), "decode_head.conv_seg.bias": (classes,)}
    for i in range(4):
        shapes |= block(f"decode_head.psp_modules.{i}.1", 64, c, 1)
    shapes |= block("decode_head.bottleneck", 64 + 4 * c, c, 3) | block("decode_head.fpn_bottleneck", 3 * c, c, 3)
    for i in range(2):
        shapes |= block(f"decode_head.lateral_convs.{i}", 16 * 2**i, c, 1) | block(
            f"decode_head.fpn_convs.{i}", c, c, 3
        )
    shapes |= block("auxiliary_head.convs.0", 32, half, 3)
    return shapes | {
        "auxiliary_head.conv_seg.weight": (classes, half, 1, 1),
        "auxiliary_head.conv_seg.bias": (classes,),
    }


def published_file(backbone: NAT, heads: dict[str, tuple[int, ...]]) -> dict:
    """A checkpoint as mmsegmentation and mmdetection write them."""
    state = {f"backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}
    state |= {name: torch.rand(shape) for name, shape in heads.items()}
    return {"meta": {"CLASSES": ("a", "b")}, "state_dict": state, "optimizer": {"state": {}}}


def test_a_published_upernet_loads_strictly(tmp_path: Path):
    source = NAT(SMALL)
    torch.save(published_file(source, _published_upernet(5, 8)), tmp_path / "upernet.pth")
    checkpoint = torch.load(tmp_path / "upernet.pth", weights_only=True)
    model = dense.upernet(NAT(SMALL), 5, 8)
    dense.load_published(model, checkpoint)
    assert torch.equal(
        model.decode_head.fpn_convs[1].conv.weight, checkpoint["state_dict"]["decode_head.fpn_convs.1.conv.weight"]
    )
    image = torch.randn(1, 2, 32, 32)
    for ours, theirs in zip(model.backbone(image), source(image), strict=True):
        assert torch.equal(ours, theirs)
    del checkpoint["state_dict"]["decode_head.bottleneck.bn.running_var"]
    with pytest.raises(RuntimeError, match=r"decode_head\.bottleneck\.bn\.running_var"):
        dense.load_published(model, checkpoint)


def test_a_published_backbone_loads_strictly():
    source, target = NAT(SMALL), NAT(SMALL)
    for name, parameter in source.named_parameters():
        if name.startswith("norm"):
            torch.nn.init.normal_(parameter)
    checkpoint = published_file(source, {"neck.lateral_convs.0.conv.weight": (8, 16, 1, 1)})
    assert "backbone.norm2.weight" in checkpoint["state_dict"]
    dense.load_backbone(target, checkpoint)
    image = torch.randn(1, 2, 40, 32)
    for ours, theirs in zip(target(image), source(image), strict=True):
        assert torch.equal(ours, theirs)
    norm = checkpoint["state_dict"].pop("backbone.norm1.bias")
    with pytest.raises(RuntimeError, match=r"norm1\.bias"):
        dense.load_backbone(target, checkpoint)
    checkpoint["state_dict"] |= {"backbone.norm1.bias": norm, "backbone.norm3.bias": norm}
    with pytest.raises(RuntimeError, match=r"norm3\.bias"):
        dense.load_backbone(target, checkpoint)


def test_a_classification_file_fills_the_backbone():
    source, target = NAT(replace(SMALL, features_only=False, num_classes=3)), NAT(SMALL)
    torch.nn.init.constant_(target.norm1.weight, 2.0)
    dense.load_backbone(target, source.state_dict())
    state = target.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in source.state_dict().items() if not n.startswith(("norm.", "head.")))
    assert torch.equal(target.norm1.weight, torch.full((32,), 2.0))
    incomplete = {n: t for n, t in source.state_dict().items() if n != "levels.1.blocks.0.attn.rpb"}
    with pytest.raises(RuntimeError, match=r"levels\.1\.blocks\.0\.attn\.rpb"):
        dense.load_backbone(target, incomplete)


def _published_detector(stages: int | None) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a file of mmdetection, the backbone's left out: Mask R-CNN, or a cascade of stages."""
    c, wide = CHANNELS, 4 * CHANNELS
    shapes: dict[str, tuple[int, ...]] = {}

    def add(name: str, *shape: int, bias: int | None = None) -> None:
        shapes[f"{name}.weight"] = shape
        shapes[f"{name}.bias"] = (shape[0] if bias is None else bias,)

    for level in range(4):
        add(f"neck.lateral_convs.{level}.conv", c, 16 * 2**level, 1, 1)
        add(f"neck.fpn_convs.{level}.conv", c, c, 3, 3)
    add("rpn_head.rpn_conv", c, c, 3, 3)
    add("rpn_head.rpn_cls", 3, c, 1, 1)
    add("rpn_head.rpn_reg", 12, c, 1, 1)
    for stage in [""] if stages is None else [f".{index}" for index in range(stages)]:
        box, mask = f"roi_head.bbox_head{stage}", f"roi_head.mask_head{stage}"
        add(f"{box}.shared_fcs.0", wide, 49 * c)
        if stages is None:
            add(f"{box}.shared_fcs.1", wide, wide)
        for i in range(0 if stages is None else 4):
            shapes[f"{box}.shared_convs.{i}.conv.weight"] = (c, c, 3, 3)
            parts = ("weight", "bias", "running_mean", "running_var")
            shapes |= {f"{box}.shared_convs.{i}.bn.{part}": (c,) for part in parts}
            shapes[f"{box}.shared_convs.{i}.bn.num_batches_tracked"] = ()
        add(f"{box}.fc_cls", CLASSES + 1, wide)
        add(f"{box}.fc_reg", 4 * CLASSES, wide)
        for i in range(4):
            add(f"{mask}.convs.{i}.conv", c, c, 3, 3)
        add(f"{mask}.upsample", c, c, 2, 2)
        add(f"{mask}.conv_logits", CLASSES, c, 1, 1)
    return shapes


@pytest.mark.parametrize(("task", "stages"), [("mask_rcnn", None), ("cascade_mask_rcnn", 3)])
def test_published_files_load_strictly(task: str, stages: int | None):
    """Background last, and without boxes and masks, on their side; first, and never read, on ours."""
    try:
        getattr(dense, task)
    except ImportError as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    source, model = NAT(PYRAMID), getattr(dense, task)(NAT(PYRAMID), CLASSES, CHANNELS).eval()
    checkpoint = published_file(source, _published_detector(stages))
    dense.load_published(model, checkpoint)
    state = checkpoint["state_dict"]
    image = torch.randn(1, 3, 64, 64)
    for ours, theirs in zip(model.backbone.body(image), source(image), strict=True):
        assert torch.equal(ours, theirs)
    x, y = torch.randn(2, CHANNELS, 7, 7), torch.randn(2, CHANNELS, 14, 14)
    for index, heads in enumerate(getattr(model.roi_heads, "stages", [model.roi_heads])):
        stage = "" if stages is None else f".{index}"
        box, mask = f"roi_head.bbox_head{stage}", f"roi_head.mask_head{stage}"
        with torch.no_grad():
            logits, offsets = heads.box_predictor(heads.box_head(x))
            hidden = _their_box_features(state, box, x)
            theirs = hidden @ state[f"{box}.fc_cls.weight"].T + state[f"{box}.fc_cls.bias"]
            torch.testing.assert_close(logits, theirs[:, [CLASSES, *range(CLASSES)]])
            theirs = hidden @ state[f"{box}.fc_reg.weight"].T + state[f"{box}.fc_reg.bias"]
            torch.testing.assert_close(offsets[:, 4:], theirs)
            torch.testing.assert_close(heads.mask_predictor(heads.mask_head(y))[:, 1:], _their_masks(state, mask, y))
    torch.testing.assert_close(model.rpn.head.bbox_pred.weight.detach(), state["rpn_head.rpn_reg.weight"])
    state["roi_head.unknown"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r"roi_head\.unknown"):
        dense.load_published(model, checkpoint)


_MASK_LAYERS = (*(f"convs.{index}.conv" for index in range(4)), "upsample", "conv_logits")


def _their_box_features(state: dict[str, Tensor], box: str, x: Tensor) -> Tensor:
    for i in range(4 if f"{box}.shared_convs.0.conv.weight" in state else 0):
        name = f"{box}.shared_convs.{i}"
        x = F.conv2d(x, state[f"{name}.conv.weight"], padding=1)
        parts = (state[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        x = F.batch_norm(x, *parts).relu()
    x = x.flatten(1)
    for i in range(2):
        if f"{box}.shared_fcs.{i}.weight" in state:
            x = F.linear(x, state[f"{box}.shared_fcs.{i}.weight"], state[f"{box}.shared_fcs.{i}.bias"]).relu()
    return x


def _their_masks(state: dict[str, Tensor], mask: str, y: Tensor) -> Tensor:
    weights = {name: (state[f"{mask}.{name}.weight"], state[f"{mask}.{name}.bias"]) for name in _MASK_LAYERS}
    for name in _MASK_LAYERS[:4]:
        y = F.conv2d(y, *weights[name], padding=1).relu()
    y = F.conv_transpose2d(y, *weights["upsample"], stride=2).relu()
    return F.conv2d(y, *weights["conv_logits"])
