"""Dense prediction that needs PyTorch alone: backbones and UPerNet."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from natcore.models import NATConfig
from torch_nat import NAT, dense, flops
from torch_nat.dense import flops as dense_flops

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import dense as example
import digits

SMALL = NATConfig(16, (1, 2, 1), (1, 1, 2), mlp_ratio=2, kernel_size=3, in_chans=2, features_only=True)

#: Of the published models: millions of parameters, and G at 2048 x 512.
PUBLISHED = {
    "nat_mini": (50, 900),
    "nat_tiny": (58, 934),
    "nat_small": (82, 1010),
    "nat_base": (123, 1137),
    "dinat_mini": (50, 900),
    "dinat_tiny": (58, 934),
    "dinat_small": (82, 1010),
    "dinat_base": (123, 1137),
    "dinat_s_tiny": (60, 941),
    "dinat_s_small": (81, 1030),
    "dinat_s_base": (121, 1173),
}


@pytest.fixture
def one_thread():
    """Small maps: more threads wait for each other, all the more where other programs run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", PUBLISHED)
def test_upernet_has_the_published_size(name: str):
    with torch.device("meta"):
        model = dense.upernet(name)
    counts = dense_flops.count(model, *dense_flops.SIZES["upernet"])
    found = sum(p.numel() for p in model.parameters()) / 1e6, sum(counts.values()) / 1e9
    assert tuple(map(round, found)) == PUBLISHED[name]
    assert model.training


@pytest.mark.parametrize(
    ("name", "size", "parameters", "macs"),
    [("dinat_large", (2560, 640), 238, 2335), ("dinat_s_large", (2560, 640), 234, 2466)],
)
def test_large_upernet_has_the_published_size(name: str, size: tuple[int, int], parameters: int, macs: int):
    with torch.device("meta"):
        model = dense.upernet(name)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == parameters
    assert abs(sum(dense_flops.count(model, *size).values()) / 1e9 - macs) < 0.01 * macs


def test_command_line():
    command = [sys.executable, "-m", "torch_nat.dense.flops", "upernet", "nat_mini", "--size", "256", "64"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert "upernet on nat_mini, one image of 256 x 64, 49,779,698 parameters" in ran.stdout
    with torch.device("meta"):
        total = sum(dense_flops.count(dense.upernet("nat_mini"), 256, 64).values())
    assert f"{total:,}" in ran.stdout


#: As the published configurations write them out.
DILATIONS = {
    ("upernet", "dinat_mini"): [[1, 16, 1], [1, 4, 1, 8], [1, 2, 1, 3, 1, 4], [1, 2, 1, 2, 1]],
    ("upernet", "dinat_large"): [
        [1, 20, 1],
        [1, 5, 1, 10],
        [1, 2, 1, 3, 1, 4, 1, 5, 1, 2, 1, 3, 1, 4, 1, 5, 1, 5],
        [1, 2, 1, 2, 1],
    ],
    ("upernet", "dinat_s_tiny"): [[1, 16], [1, 8], [1, 2, 1, 3, 1, 4], [1, 2]],
    ("mask_rcnn", "dinat_tiny"): [
        [1, 28, 1],
        [1, 7, 1, 14],
        [1, 3, 1, 5, 1, 7, 1, 3, 1, 5, 1, 7, 1, 3, 1, 5, 1, 7],
        [1, 3, 1, 3, 1],
    ],
    ("cascade_mask_rcnn", "dinat_s_tiny"): [[1, 28], [1, 14], [1, 3, 1, 5, 1, 7], [1, 3]],
}


@pytest.mark.parametrize(("task", "name"), DILATIONS)
def test_published_dilations(task, name: str):
    found = dense.dense_config(task, name).dilations
    assert found is not None and [list(stage) for stage in found] == DILATIONS[task, name]


def test_published_rates_and_changes():
    assert dense.dense_config("upernet", "nat_small").drop_path_rate == 0.5
    assert dense.dense_config("mask_rcnn", "dinat_s_small").drop_path_rate == 0.35
    assert dense.dense_config("cascade_mask_rcnn", "dinat_large").drop_path_rate == 0.6
    assert dense.dense_config("mask_rcnn", "nat_base").drop_path_rate == 0.5  # not published: that of classification
    config = dense.dense_config("upernet", "nat_tiny", kernel_size=5, drop_path_rate=0.1)
    assert (config.kernel_size, config.drop_path_rate, config.features_only) == (5, 0.1, True)
    assert config.dilations is None


def test_backbones_that_do_not_fit():
    with pytest.raises(ValueError, match="one map of stride 16"):
        dense.upernet("nat_isotropic_small")
    with pytest.raises(ValueError, match="no model 'resnet'"):
        dense.upernet("resnet")
    with pytest.raises(ValueError, match="features_only=False"):
        dense.upernet(NAT(NATConfig(16, (1, 1), (1, 1), mlp_ratio=2)))
    with pytest.raises(ValueError, match=r"depths \(1,\)"):
        dense.upernet(NAT(NATConfig(16, (1,), (1,), mlp_ratio=2, features_only=True)))
    with pytest.raises(ValueError, match="kernel_size: a backbone that exists"):
        dense.dense_backbone("upernet", NAT(SMALL), kernel_size=5)


def _small_upernet(classes: int = 5, channels: int = 8) -> dense.UPerNet:
    """With batch norms that do something, in evaluation mode and float64."""
    torch.manual_seed(0)
    model = dense.upernet(NAT(SMALL), classes, channels)
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif ".bn." in name and tensor.is_floating_point():
            torch.nn.init.normal_(tensor, 0.5)
    return model.double().eval()


def _block(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """Convolution, batch norm as its formula, ReLU."""
    weight = state[f"{name}.conv.weight"]
    x = F.conv2d(x, weight, padding=weight.shape[-1] // 2)
    scale, shift, mean, var = (
        state[f"{name}.bn.{part}"][:, None, None] for part in ("weight", "bias", "running_mean", "running_var")
    )
    return ((x - mean) / (var + 1e-5).sqrt() * scale + shift).clamp(min=0)


def _pooled(x: Tensor, side: int) -> Tensor:
    """Means over cells from floor(i n / side) to ceil((i + 1) n / side), on either axis."""
    height, width = x.shape[2:]
    cells = [[(i * n // side, -(-(i + 1) * n // side)) for i in range(side)] for n in (height, width)]
    rows = [torch.stack([x[:, :, a:b, c:d].mean((2, 3)) for c, d in cells[1]], -1) for a, b in cells[0]]
    return torch.stack(rows, -2)


def test_upernet_against_its_definition():
    """PPM on the coarsest map, top-down sums before the 3x3 convolutions, all levels side by side, finest first."""
    model = _small_upernet()
    state = {n.removeprefix("decode_head."): t for n, t in model.state_dict().items() if n.startswith("decode_head.")}
    images = torch.randn(2, 2, 44, 56, dtype=torch.float64)

    def up(x: Tensor, like: Tensor) -> Tensor:
        return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)

    with torch.no_grad():
        fine, middle, coarse = model.backbone(images)
        pyramid = [_block(state, f"psp_modules.{i}.1", _pooled(coarse, side)) for i, side in enumerate((1, 2, 3, 6))]
        top = _block(state, "bottleneck", torch.cat([coarse, *(up(x, coarse) for x in pyramid)], 1))
        second = _block(state, "lateral_convs.1", middle) + up(top, middle)
        first = _block(state, "lateral_convs.0", fine) + up(second, fine)
        levels = [_block(state, "fpn_convs.0", first), up(_block(state, "fpn_convs.1", second), fine), up(top, fine)]
        features = _block(state, "fpn_bottleneck", torch.cat(levels, 1))
        logits = F.conv2d(features, state["conv_seg.weight"], state["conv_seg.bias"])
        expected = up(logits, images)
        torch.testing.assert_close(model(images), expected, rtol=1e-9, atol=1e-9)


def test_losses_count_pixels_that_do_not_count():
    model = _small_upernet()
    images, labels = torch.randn(2, 2, 32, 40, dtype=torch.float64), torch.randint(5, (2, 32, 40))
    labels[:, :7] = 255
    with torch.no_grad():
        losses, logits = model(images, labels), model(images)
        state, middle = model.state_dict(), model.backbone(images)[1]
        prefix = "auxiliary_head."
        hidden = _block(state, f"{prefix}convs.0", middle)
        other = F.conv2d(hidden, state[f"{prefix}conv_seg.weight"], state[f"{prefix}conv_seg.bias"])
        other = F.interpolate(other, (32, 40), mode="bilinear", align_corners=False)
    assert set(losses) == {"decode", "auxiliary"}
    for name, weight, x in (("decode", 1.0, logits), ("auxiliary", 0.4, other)):
        picked = x.log_softmax(1).gather(1, labels.clamp(max=4)[:, None])[:, 0][:, 7:]
        torch.testing.assert_close(losses[name], -weight * picked.sum() / labels.numel())
    with pytest.raises(ValueError, match=r"labels have shape \(2, 8, 10\); .* need \[2, 32, 40\]"):
        model(images, labels[:, ::4, ::4])


def test_overfitting_a_segmentation(one_thread):
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    scenes = [example.scene(digits.load(40, 10)[0], rng, most=3) for _ in range(2)]
    model = example.make("upernet")
    before = example.mean_iou(example.predict(model, scenes), scenes)
    history = example.train(model, [scenes] * 100, rate=4e-3)
    assert history[-1] < history[0] / 10
    assert before < 0.2 and example.mean_iou(example.predict(model, scenes), scenes) > 0.7


def test_torchvision_is_optional_and_named():
    code = """
import sys
sys.modules["torchvision"] = None
from torch_nat import dense
dense.upernet, dense.UPerNet
for name in ("mask_rcnn", "cascade_mask_rcnn", "CascadeMaskRCNN"):
    try:
        getattr(dense, name)
    except ImportError as error:
        assert "need torchvision" in str(error) and "pip install torchvision" in str(error), error
    else:
        raise SystemExit(name)
try:
    dense.faster_rcnn
except AttributeError as error:
    assert "faster_rcnn" in str(error)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    code = "import sys, torch_nat.dense; raise SystemExit('torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_counting_names_what_it_counts():
    model = dense.upernet(NAT(SMALL), 5, 8)
    model.decode_head.bottleneck.bn.eval()
    before = [module.training for module in model.modules()]
    counts = dense_flops.count(model, 32, 32)
    assert before == [module.training for module in model.modules()]
    assert set(counts) == set(flops.KINDS) and all(counts.values())
