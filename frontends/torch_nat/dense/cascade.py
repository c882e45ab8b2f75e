"""Cascade Mask R-CNN on NAT backbones: three stages of torchvision's RoI heads, each on the boxes of the last.

Source: Cai and Vasconcelos, "Cascade R-CNN: High Quality Object Detection and Instance Segmentation" (TPAMI 2019,
arXiv 1906.09756). Heads, losses and thresholds are those of the published NAT and DiNAT models, which mmdetection
trained.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_nat.dense.detection import COCO, PyramidBackbone, common_options, mask_modules
from torch_nat.dense.variants import dense_backbone
from torch_nat.dense.vision import torchvision_missing
from torch_nat.models import NAT

try:
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
    from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference, maskrcnn_loss
    from torchvision.ops import clip_boxes_to_image, generalized_box_iou_loss
except (ImportError, RuntimeError) as error:
    raise torchvision_missing(error) from error

Targets = list[dict[str, Tensor]]
Shapes = list[tuple[int, int]]


class StageRule(NamedTuple):
    """What tells the stages apart."""

    iou: float  # from which on a proposal belongs to an object
    deltas: tuple[float, float, float, float]  # a box's offsets are divided by these (x, y, width, height)
    loss_weight: float


STAGES = (
    StageRule(0.5, (0.1, 0.1, 0.2, 0.2), 1.0),
    StageRule(0.6, (0.05, 0.05, 0.1, 0.1), 0.5),
    StageRule(0.7, (0.033, 0.033, 0.067, 0.067), 0.25),
)
BOX_LOSS_WEIGHT = 10.0
#: Options of torchvision's MaskRCNN that here every stage has for itself.
_PER_STAGE = (
    *("num_classes", "bbox_reg_weights", "box_fg_iou_thresh", "box_bg_iou_thresh"),
    *("box_head", "box_predictor", "mask_head", "mask_predictor"),
)


class CascadeStage(RoIHeads):
    """One stage: from proposals to class logits and boxes ``[N, num_classes + 1, 4]``."""

    loss_weight: float

    def run(self, features: dict[str, Tensor], proposals: list[Tensor], shapes: Shapes) -> tuple[Tensor, Tensor]:
        """Logits ``[N, num_classes + 1]`` and offsets ``[N, (num_classes + 1) * 4]`` of all images' proposals."""
        return self.box_predictor(self.box_head(self.box_roi_pool(features, proposals, shapes)))

    def masks(self, features: dict[str, Tensor], boxes: list[Tensor], shapes: Shapes) -> Tensor:
        """Mask logits ``[N, num_classes + 1, 28, 28]`` of all images' boxes."""
        heads: Any = self  # which for torchvision may come without masks
        return heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(features, boxes, shapes)))

    def decoded(self, offsets: Tensor, proposals: list[Tensor], labels: Tensor) -> Tensor:
        """The box ``[N, 4]`` of each proposal under its label."""
        boxes = self.box_coder.decode(offsets, proposals)
        return boxes[torch.arange(len(labels), device=labels.device), labels]

    def refined(self, offsets: Tensor, proposals: list[Tensor], labels: Tensor, shapes: Shapes) -> list[Tensor]:
        """The next stage's proposals: boxes under their labels, inside their images, without a gradient."""
        boxes = self.decoded(offsets.detach(), proposals, labels).split([len(p) for p in proposals])
        return [clip_boxes_to_image(b, shape) for b, shape in zip(boxes, shapes, strict=True)]


class CascadeRoIHeads(nn.Module):
    """Stages in a row, called as torchvision's RoIHeads are.

    In training each stage samples its own proposals and has losses ``loss_classifier_i``, ``loss_box_reg_i``
    and ``loss_mask_i``, weighted already; in evaluation class logits and mask probabilities are means over stages,
    and boxes are the last stage's.
    """

    def __init__(self, stages: list[CascadeStage]):
        super().__init__()
        self.stages: list[CascadeStage] = nn.ModuleList(stages)  # type: ignore[assignment]

    def forward(
        self, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: Shapes, targets: Targets | None = None
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        if not self.training:
            return self._detect(features, proposals, image_shapes), {}
        if targets is None:
            raise ValueError("training needs targets: one dict of boxes, labels and masks per image.")
        return [], self._losses(features, proposals, image_shapes, targets)

    def _losses(
        self, features: dict[str, Tensor], proposals: list[Tensor], shapes: Shapes, targets: Targets
    ) -> dict[str, Tensor]:
        losses = {}
        for index, stage in enumerate(self.stages):
            proposals, matched, labels, _ = stage.select_training_samples(proposals, targets)
            logits, offsets = stage.run(features, proposals, shapes)
            found = torch.cat(labels)
            truth = torch.cat([_matched_boxes(t, m) for t, m in zip(targets, matched, strict=True)])
            own = {
                "loss_classifier": F.cross_entropy(logits, found),
                "loss_box_reg": _box_loss(stage.decoded(offsets, proposals, found), truth, found),
                "loss_mask": _mask_loss(stage, features, proposals, matched, labels, shapes, targets),
            }
            losses |= {f"{name}_{index}": stage.loss_weight * loss for name, loss in own.items()}
            if stage is not self.stages[-1]:
                best = 1 + logits[:, 1:].argmax(dim=1)
                refined = stage.refined(offsets, proposals, torch.where(found > 0, found, best), shapes)
                # An object's own box is among the samples of every stage; what would become of it is not.
                given = (torch.cat(proposals) == truth).all(dim=1) & (found > 0)
                kept = (~given).split([len(p) for p in proposals])
                proposals = [boxes[keep] for boxes, keep in zip(refined, kept, strict=True)]
        return losses

    def _detect(self, features: dict[str, Tensor], proposals: list[Tensor], shapes: Shapes) -> Targets:
        logits, offsets = self.stages[0].run(features, proposals, shapes)
        total = logits
        for stage, following in zip(self.stages[:-1], self.stages[1:], strict=True):
            proposals = stage.refined(offsets, proposals, 1 + logits[:, 1:].argmax(dim=1), shapes)
            logits, offsets = following.run(features, proposals, shapes)
            total = total + logits
        boxes, scores, labels = self.stages[-1].postprocess_detections(
            total / len(self.stages), offsets, proposals, shapes
        )
        masks = [maskrcnn_inference(stage.masks(features, boxes, shapes), labels) for stage in self.stages]
        return [
            {"boxes": b, "labels": l, "scores": s, "masks": torch.stack(m).mean(dim=0)}
            for b, l, s, m in zip(boxes, labels, scores, zip(*masks, strict=True), strict=True)
        ]


class CascadeMaskRCNN(MaskRCNN):
    """torchvision's MaskRCNN with three stages in place of its RoI heads: see `cascade_mask_rcnn`."""

    def __init__(self, backbone: NAT, num_classes: int, channels: int = 256, **options: Any):
        refused = [name for name in _PER_STAGE if name in options]
        if refused:
            raise ValueError(
                f"{', '.join(refused)}: every stage of a cascade has its own; see torch_nat.dense.cascade."
            )
        names = ("box_head", "box_predictor", "mask_head", "mask_predictor")
        placeholders = {name: nn.Identity() for name in names}  # for what the stages bring themselves
        settings: dict[str, Any] = {**common_options(backbone), **placeholders, **options}
        super().__init__(PyramidBackbone(backbone, channels), **settings)
        single = self.roi_heads
        heads: Any = CascadeRoIHeads([_stage(rule, single, channels, num_classes) for rule in STAGES])
        self.roi_heads = heads


def cascade_mask_rcnn(
    backbone: str | NAT = "nat_tiny", num_classes: int = COCO, channels: int = 256, **options: Any
) -> CascadeMaskRCNN:
    """A Cascade Mask R-CNN, freshly initialised, on a backbone by name or on a NAT with ``features_only``.

    Arguments, labels and calls are those of `torch_nat.dense.mask_rcnn`; ``options`` that every stage has for
    itself (IoU thresholds, box weights, heads) raise ValueError. Heads have four convolutions with batch norm
    (published: synchronised; `torch.nn.SyncBatchNorm.convert_sync_batchnorm` makes it so) and one linear layer;
    the box loss is 10 * GIoU.
    """
    return CascadeMaskRCNN(dense_backbone("cascade_mask_rcnn", backbone), num_classes, channels, **options)


def _stage(rule: StageRule, single: RoIHeads, channels: int, num_classes: int) -> CascadeStage:
    """A stage with the pools, the sampler and the thresholds of ``single``."""
    stage = CascadeStage(
        single.box_roi_pool,
        FastRCNNConvFCHead((channels, 7, 7), [channels] * 4, [4 * channels], norm_layer=nn.BatchNorm2d),
        FastRCNNPredictor(4 * channels, num_classes + 1),
        rule.iou,
        rule.iou,
        single.fg_bg_sampler.batch_size_per_image,
        single.fg_bg_sampler.positive_fraction,
        tuple(1 / delta for delta in rule.deltas),
        single.score_thresh,
        single.nms_thresh,
        single.detections_per_img,
        mask_roi_pool=single.mask_roi_pool,
        **mask_modules(channels, num_classes),
    )
    stage.loss_weight = rule.loss_weight
    return stage


def _matched_boxes(target: dict[str, Tensor], matched: Tensor) -> Tensor:
    """The object's box ``[N, 4]`` of each proposal; zeros in an image without objects."""
    boxes = target["boxes"]
    return boxes[matched] if len(boxes) else boxes.new_zeros((len(matched), 4))


def _box_loss(boxes: Tensor, truth: Tensor, labels: Tensor) -> Tensor:
    """GIoU of the foreground over the number of all samples."""
    (at,) = torch.where(labels > 0)
    loss = generalized_box_iou_loss(boxes[at], truth[at].to(boxes.dtype), reduction="sum")
    return BOX_LOSS_WEIGHT * loss / max(len(labels), 1)


def _mask_loss(
    stage: CascadeStage,
    features: dict[str, Tensor],
    proposals: list[Tensor],
    matched: list[Tensor],
    labels: list[Tensor],
    shapes: Shapes,
    targets: Targets,
) -> Tensor:
    foreground = [found > 0 for found in labels]
    boxes = [p[at] for p, at in zip(proposals, foreground, strict=True)]
    objects = [m[at] for m, at in zip(matched, foreground, strict=True)]
    logits = stage.masks(features, boxes, shapes)
    return maskrcnn_loss(logits, boxes, [t["masks"] for t in targets], [t["labels"] for t in targets], objects)
