"""Mask R-CNN and Cascade Mask R-CNN: sizes, anchors, pooling, stages, and scenes to overfit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from natcore.models import NATConfig
from torch_nat import NAT, dense
from torch_nat.dense import flops as dense_flops

try:
    from torch_nat.dense import detection
except ImportError as error:
    pytest.skip(str(error), allow_module_level=True)

from torchvision.models.detection.image_list import ImageList

from tests.torch.test_dense import digits, example, one_thread  # noqa: F401

SMALL = NATConfig(16, (1, 1, 1, 1), (1, 1, 2, 4), mlp_ratio=2, kernel_size=3, features_only=True)
CLASSES, CHANNELS = 3, 8
OPTIONS = {"min_size": 64, "max_size": 96, "box_batch_size_per_image": 16}

#: Of the published models: millions of parameters, and G at 1280 x 800.
PUBLISHED = {
    ("mask_rcnn", "nat_mini"): (40, 225),
    ("mask_rcnn", "nat_tiny"): (48, 258),
    ("mask_rcnn", "nat_small"): (70, 330),
    ("mask_rcnn", "dinat_s_tiny"): (48, 263),
    ("mask_rcnn", "dinat_s_small"): (69, 350),
    ("cascade_mask_rcnn", "nat_mini"): (77, 704),
    ("cascade_mask_rcnn", "nat_tiny"): (85, 737),
    ("cascade_mask_rcnn", "nat_small"): (108, 809),
    ("cascade_mask_rcnn", "nat_base"): (147, 931),
    ("cascade_mask_rcnn", "dinat_large"): (258, 1276),
    ("cascade_mask_rcnn", "dinat_s_tiny"): (86, 742),
    ("cascade_mask_rcnn", "dinat_s_small"): (107, 829),
    ("cascade_mask_rcnn", "dinat_s_base"): (145, 966),
    ("cascade_mask_rcnn", "dinat_s_large"): (253, 1357),
}


def small(task: str, **options):
    torch.manual_seed(0)
    return getattr(dense, task)(NAT(SMALL), CLASSES, CHANNELS, **(OPTIONS | options))


@pytest.mark.parametrize(("task", "name"), PUBLISHED)
def test_published_sizes(task, name: str):
    """Less the rows of torchvision's heads for boxes and masks of the background, which are never read."""
    with torch.device("meta"):
        model = dense_flops.build(task, name)
    stages = getattr(model.roi_heads, "stages", [model.roi_heads])
    boxes, masks = 4 * 1024 * dense_flops.BOXES, 28**2 * 256 * dense_flops.MASKS
    macs = sum(dense_flops.count(model, *dense_flops.SIZES[task]).values()) - len(stages) * (boxes + masks)
    parameters = sum(p.numel() for p in model.parameters()) - len(stages) * (4 * 1025 + 257)
    assert (round(parameters / 1e6), round(macs / 1e9)) == PUBLISHED[task, name]
    assert model.training


def test_anchors_at_odd_maps():
    """Side 8 strides and area that squared, centred on multiples of the stride, not rounded."""
    generator = detection.StrideAnchors([4, 8])
    maps = [torch.zeros(2, 1, 5, 7), torch.zeros(2, 1, 3, 4)]
    images = ImageList(torch.zeros(2, 3, 20, 28), [(20, 28)] * 2)
    first, second = generator(images, maps)
    assert torch.equal(first, second)
    expected = [
        (x * stride - w / 2, y * stride - h / 2, x * stride + w / 2, y * stride + h / 2)
        for stride, rows, columns in ((4, 5, 7), (8, 3, 4))
        for y in range(rows)
        for x in range(columns)
        for ratio in (0.5, 1.0, 2.0)
        for w, h in [(8 * stride / ratio**0.5, 8 * stride * ratio**0.5)]
    ]
    np.testing.assert_allclose(first.numpy(), np.array(expected), rtol=1e-6)
    assert generator.num_anchors_per_location() == [3, 3]
    half = generator(images, [y.bfloat16() for y in maps])
    assert half[0].dtype == torch.float32


def test_pooling_takes_the_level_and_the_centres():
    """On maps whose values are their pixels' x, plus 1000 per level, a bin's value is its centre."""
    pool = detection.PyramidRoIAlign([4, 8, 16], 2)
    maps = {}
    for level, stride in enumerate((4, 8, 16)):
        x = (torch.arange(256 // stride) + 0.5) * stride + 1000 * level
        maps[str(level)] = x.expand(1, 1, 256 // stride, -1).repeat(2, 1, 1, 1)
    boxes = [
        torch.tensor([[20.0, 30, 60, 70], [10, 20, 122, 132]]),  # sides of 40 and 112
        torch.tensor([[8.0, 8, 240, 240], [50, 60, 51, 61], [40, 60, 151, 171]]),  # of 232, 1 and 111
    ]
    pooled = pool(maps, boxes, [(256, 256)] * 2)
    assert pooled.shape == (5, 1, 2, 2)
    levels = torch.tensor([0, 1, 2, 0, 0]) * 1000
    for value, (x0, _, x1, _), level in zip(pooled[:, 0, 0], torch.cat(boxes), levels, strict=True):
        centres = x0 + (x1 - x0) * torch.tensor([0.25, 0.75])
        torch.testing.assert_close(value, centres + level, rtol=1e-4, atol=1e-2)
    assert pool(maps, [boxes[0][:0]] * 2, [(256, 256)] * 2).shape == (0, 1, 2, 2)


def _targets() -> list[dict[str, Tensor]]:
    masks = torch.zeros(2, 64, 64, dtype=torch.uint8)
    masks[0, 8:40, 4:30] = 1
    masks[1, 20:60, 30:62] = 1
    boxes = torch.tensor([[4.0, 8, 30, 40], [30, 20, 62, 60]])
    return [
        {"boxes": boxes, "labels": torch.tensor([1, 3]), "masks": masks},
        {"boxes": boxes[:0], "labels": torch.zeros(0, dtype=torch.int64), "masks": masks[:0]},
    ]


@pytest.mark.parametrize("task", ["mask_rcnn", "cascade_mask_rcnn"])
def test_training_and_inference(task: str):
    """One image has no objects. Every parameter that is read has a gradient."""
    model = small(task)
    losses = model([torch.rand(3, 64, 64), torch.rand(3, 64, 64)], _targets())
    names = {"loss_classifier", "loss_box_reg", "loss_mask"}
    if task == "cascade_mask_rcnn":
        names = {f"{name}_{stage}" for name in names for stage in range(3)}
    assert set(losses) == names | {"loss_objectness", "loss_rpn_box_reg"}
    assert all(torch.isfinite(loss) and loss > 0 for loss in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()] == []
    model.eval()
    for heads in getattr(model.roi_heads, "stages", [model.roi_heads]):
        heads.score_thresh = 0.0
    with torch.no_grad():
        found = model([torch.rand(3, 64, 64), torch.rand(3, 40, 80)])
    for result, (height, width) in zip(found, ((64, 64), (40, 80)), strict=True):
        assert len(result["boxes"]) == 100 and set(result["labels"].tolist()) <= {1, 2, 3}
        assert result["masks"].shape == (100, 1, height, width)
        assert result["boxes"][:, 2].max() <= width and result["boxes"][:, 3].max() <= height


def test_options_reach_torchvision_and_every_stage():
    model = small("cascade_mask_rcnn", box_score_thresh=0.3, box_detections_per_img=7, image_mean=[0.1, 0.2, 0.3])
    assert [(s.score_thresh, s.detections_per_img) for s in model.roi_heads.stages] == [(0.3, 7)] * 3
    assert [s.fg_bg_sampler.batch_size_per_image for s in model.roi_heads.stages] == [16] * 3
    assert [s.proposal_matcher.high_threshold for s in model.roi_heads.stages] == [0.5, 0.6, 0.7]
    assert model.transform.image_mean == [0.1, 0.2, 0.3]
    with pytest.raises(ValueError, match="box_fg_iou_thresh: every stage"):
        small("cascade_mask_rcnn", box_fg_iou_thresh=0.5)
    assert small("mask_rcnn", box_score_thresh=0.3).roi_heads.score_thresh == 0.3


def _moved(box: Tensor, deltas: Tensor, scale: tuple[float, ...]) -> Tensor:
    """A box after its offsets, as Faster R-CNN defines them."""
    x0, y0, x1, y1 = box
    dx, dy, dw, dh = deltas * torch.tensor(scale)
    w, h = x1 - x0, y1 - y0
    x, y = (x0 + x1) / 2 + dx * w, (y0 + y1) / 2 + dy * h
    w, h = w * dw.exp(), h * dh.exp()
    return torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2])


def test_refining_goes_by_label_and_stops_at_the_border():
    stage = small("cascade_mask_rcnn").roi_heads.stages[2]
    proposals = [torch.tensor([[10.0, 10, 30, 40], [40, 5, 60, 25]]), torch.tensor([[0.0, 0, 8, 8]])]
    offsets, labels = torch.randn(3, 4 * (CLASSES + 1), requires_grad=True), torch.tensor([3, 1, 2])
    refined = stage.refined(offsets, proposals, labels, [(64, 64), (50, 50)])
    assert [len(boxes) for boxes in refined] == [2, 1] and not refined[0].requires_grad
    for index, (box, label) in enumerate(zip(torch.cat(proposals), labels, strict=True)):
        expected = _moved(box, offsets[index].view(-1, 4)[label], (0.033, 0.033, 0.067, 0.067))
        torch.testing.assert_close(torch.cat(refined)[index], expected.clamp(0, 64 if index < 2 else 50))


class _Recorded:
    """Replaces a stage's box branch by logits and offsets that are known, and keeps its proposals."""

    def __init__(self, stage, logits: Tensor, offset: float):
        self.logits, self.offset, self.seen = logits, offset, []
        stage.run = self

    def __call__(self, features, proposals, shapes):
        self.seen.append(proposals)
        count = sum(map(len, proposals))
        offsets = torch.zeros(count, CLASSES + 1, 4)
        offsets[:, :, 0] = self.offset * torch.arange(CLASSES + 1)
        return self.logits.expand(count, -1), offsets.flatten(1)


def test_stages_in_a_row():
    """Offsets of the best class (2), never of the background; logits are averaged, boxes are the last stage's."""
    model = small("cascade_mask_rcnn", box_score_thresh=0.0).eval()
    stages = model.roi_heads.stages
    scores = [torch.tensor([9.0, 1, 2, 0]), torch.tensor([0.0, 1, 4, 0]), torch.tensor([0.0, 1, 3, 8])]
    records = [_Recorded(s, logits, 0.5) for s, logits in zip(stages, scores, strict=True)]
    box = torch.tensor([[20.0, 20, 40, 40]])
    features = {str(i): torch.randn(1, CHANNELS, 32 // 2**i, 32 // 2**i) for i in range(4)}
    with torch.no_grad():
        (found,), losses = model.roi_heads(features, [box], [(128, 128)])
    first, second = 20 * 0.1 * 2 * 0.5, 20 * 0.05 * 2 * 0.5
    shift = torch.tensor([1.0, 0, 1, 0])
    torch.testing.assert_close(records[1].seen[0][0], box + first * shift)
    torch.testing.assert_close(records[2].seen[0][0], box + (first + second) * shift)
    assert losses == {} and found["labels"].tolist() == [
        1 + int(i) for i in (sum(scores)[1:] / 3).argsort(descending=True)
    ]
    torch.testing.assert_close(found["scores"], (sum(scores) / 3).softmax(0)[found["labels"]])
    third = 20 * 0.033 * 0.5
    for label, at in zip(found["labels"], found["boxes"], strict=True):
        torch.testing.assert_close(at, (box + (first + second + third * label) * shift)[0])
    for label, mask in zip(found["labels"], found["masks"], strict=True):
        torch.manual_seed(0)
        expected = [s.masks(features, [found["boxes"]], [(128, 128)]).sigmoid()[:, label] for s in stages]
        index = found["labels"].tolist().index(label)
        torch.testing.assert_close(mask[0], torch.stack(expected).mean(0)[index])


def test_training_stages_refine_what_they_sampled():
    """Objects' own boxes are samples of every stage, but are not refined into proposals of the next."""
    model = small("cascade_mask_rcnn")
    stages, targets = model.roi_heads.stages, _targets()[:1]
    records = [_Recorded(s, torch.tensor([0.0, 1, 2, 0]), 0.5) for s in stages]
    boxes = targets[0]["boxes"]
    proposals = torch.cat([boxes[:1] + torch.tensor([2.0, 0, 2, 0]), torch.tensor([[0.0, 50, 10, 60]])])
    features = {str(i): torch.randn(1, CHANNELS, 16 // 2**i, 16 // 2**i) for i in range(4)}
    losses = model.roi_heads(features, [proposals], [(64, 64)], targets)[1]
    (sampled,), (following,) = records[0].seen[0], records[1].seen[0]
    assert {tuple(b) for b in sampled.tolist()} == {tuple(b) for b in torch.cat([proposals, boxes]).tolist()}
    label_1 = proposals[0] + 26 * 0.1 * 0.5 * torch.tensor([1.0, 0, 1, 0])  # an object's: by its own label, 1
    label_2 = proposals[1] + 10 * 0.1 * 0.5 * 2 * torch.tensor([1.0, 0, 1, 0])  # background's: by the best class, 2
    expected = torch.stack([label_1, label_2, *boxes])
    torch.testing.assert_close(following[following[:, 0].argsort()], expected[expected[:, 0].argsort()])
    logits = torch.tensor([0.0, 1, 2, 0]).log_softmax(0)
    found = torch.tensor([1, 0, 1, 3])  # what the proposals of the first stage are
    torch.testing.assert_close(losses["loss_classifier_0"], -logits[found].mean())
    moved = [
        label_1,
        boxes[0] + 26 * 0.05 * torch.tensor([1.0, 0, 1, 0]),
        boxes[1] + 32 * 0.15 * torch.tensor([1.0, 0, 1, 0]),
    ]
    giou = sum(1 - _giou(a, b) for a, b in zip(moved, (boxes[0], boxes[0], boxes[1]), strict=True))
    torch.testing.assert_close(losses["loss_box_reg_0"], 10 * giou / 4, rtol=1e-4, atol=1e-5)
    second = torch.tensor([1 if _giou(b, boxes[0]) > 0.6 else 3 if _giou(b, boxes[1]) > 0.6 else 0 for b in following])
    torch.testing.assert_close(losses["loss_classifier_1"], -0.5 * logits[second].mean())


def _giou(a: Tensor, b: Tensor) -> Tensor:
    """Of two boxes at the same height: intersection over union, less the share of the hull in neither."""
    low, high = torch.maximum(a[:2], b[:2]), torch.minimum(a[2:], b[2:])
    both = (high - low).clamp(min=0).prod()
    union = (a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - both
    hull = (torch.maximum(a[2:], b[2:]) - torch.minimum(a[:2], b[:2])).prod()
    return both / union - (hull - union) / hull


@pytest.mark.parametrize(
    ("task", "steps", "rate", "samples"), [("mask_rcnn", 80, 2e-3, 128), ("cascade_mask_rcnn", 60, 1e-3, 64)]
)
def test_overfitting_a_detection(task, steps: int, rate: float, samples: int, one_thread):  # noqa: F811
    """Masks overlap by a half or more, labels are right, and nothing else is found."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    scenes = [example.scene(digits.load(40, 10)[0], rng, most=3) for _ in range(2)]
    model = example.make(task, box_batch_size_per_image=samples)
    before = example.f1(example.predict(model, scenes), scenes)
    history = example.train(model, [scenes] * steps, rate)
    assert history[-1] < history[0] / 4
    assert before < 0.2 and example.f1(example.predict(model, scenes), scenes, score=0.7) > 0.8
