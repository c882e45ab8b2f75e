"""Mask R-CNN on NAT backbones, with torchvision's feature pyramid, RPN and RoI heads.

Sources: He et al., "Mask R-CNN" (ICCV 2017); Lin et al., "Feature Pyramid Networks for Object Detection" (CVPR
2017). Sizes and thresholds are those of the published NAT and DiNAT models, which mmdetection trained; anchors and
RoIAlign follow its rules too, so that `torch_nat.dense.load_published` gives the same model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torch_nat.dense.variants import dense_backbone, strides, widths
from torch_nat.dense.vision import torchvision_missing
from torch_nat.models import NAT

try:
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
    from torchvision.models.detection.image_list import ImageList
    from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
    from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, roi_align
    from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
except (ImportError, RuntimeError) as error:
    raise torchvision_missing(error) from error

#: Classes of COCO, without the background.
COCO = 80
ASPECT_RATIOS = (0.5, 1.0, 2.0)


class PyramidBackbone(nn.Module):
    """A NAT and a feature pyramid: images ``[B, in_chans, H, W]`` to maps ``[B, channels, ~H/s, ~W/s]`` by name.

    "0", "1", ... are those of the NAT's maps, finest first; "pool" is every second token of the coarsest.
    """

    def __init__(self, body: NAT, channels: int):
        super().__init__()
        self.body = body
        self.fpn = FeaturePyramidNetwork(widths(body.config), channels, extra_blocks=LastLevelMaxPool())
        self.out_channels = channels

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.fpn({str(level): y for level, y in enumerate(self.body(x))})


class StrideAnchors(AnchorGenerator):
    """Anchors of 8 tokens' side at exact strides, in ratios 1:2, 1:1, 2:1; nothing is rounded.

    torchvision's own rounds their corners, and takes for a stride the image's side by the map's, which is another
    number where a map has an odd side.
    """

    def __init__(self, strides: Sequence[int]):
        super().__init__(tuple((8 * stride,) for stride in strides), (ASPECT_RATIOS,) * len(strides))
        self.strides = tuple(strides)

    def generate_anchors(
        self,
        scales: Sequence[float],
        aspect_ratios: Sequence[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """``[len(aspect_ratios) * len(scales), 4]``: corners x, y, x, y around 0; a ratio is height by width."""
        sides = [(scale / math.sqrt(ratio), scale * math.sqrt(ratio)) for ratio in aspect_ratios for scale in scales]
        return torch.tensor([(-w / 2, -h / 2, w / 2, h / 2) for w, h in sides], dtype=dtype, device=device)

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """For every image ``[anchors, 4]``, in pixels."""
        first = feature_maps[0]
        self.set_cell_anchors(torch.promote_types(first.dtype, torch.float32), first.device)
        sizes: Any = [tuple(y.shape[-2:]) for y in feature_maps]
        steps: Any = [(stride, stride) for stride in self.strides]
        anchors = torch.cat(self.grid_anchors(sizes, steps))
        return [anchors] * len(image_list.image_sizes)


class PyramidRoIAlign(MultiScaleRoIAlign):
    """RoIAlign on the level that fits a box's size: level i from ``14 * strides[i]`` pixels on (FPN paper, eq. 1).

    Half-pixel centres, and as many samples per bin as it has tokens; torchvision's own has neither.
    """

    def __init__(self, strides: Sequence[int], output_size: int):
        super().__init__([str(level) for level in range(len(strides))], output_size, sampling_ratio=0)
        self.strides = tuple(strides)

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """Maps by name and boxes ``[N_b, 4]`` in pixels, for each image, to ``[sum(N_b), channels, size, size]``."""
        maps = [x[name] for name in self.featmap_names]
        rois = torch.cat([torch.cat([b.new_full((len(b), 1), image), b], dim=1) for image, b in enumerate(boxes)])
        sides = (rois[:, 3:] - rois[:, 1:3]).clamp(min=0).float().prod(dim=1).sqrt()  # past what float16 holds
        levels = torch.log2(sides / (14 * self.strides[0]) + 1e-6).floor().clamp(0, len(maps) - 1)
        pooled = maps[0].new_zeros((len(rois), maps[0].shape[1], *self.output_size))
        for level, (y, stride) in enumerate(zip(maps, self.strides, strict=True)):
            (at,) = torch.where(levels == level)
            part = roi_align(y, rois[at], self.output_size, 1 / stride, self.sampling_ratio, aligned=True)  # type: ignore[arg-type]
            pooled = pooled.index_copy(0, at, part.to(pooled.dtype))
        return pooled


def common_options(backbone: NAT) -> dict[str, Any]:
    """Arguments of torchvision's MaskRCNN that Mask R-CNN and Cascade Mask R-CNN share."""
    steps = strides(backbone.config)
    return {
        "rpn_anchor_generator": StrideAnchors([*steps, 2 * steps[-1]]),
        "box_roi_pool": PyramidRoIAlign(steps, 7),
        "mask_roi_pool": PyramidRoIAlign(steps, 14),
    }


def mask_modules(channels: int, num_classes: int) -> dict[str, nn.Module]:
    """Four 3x3 convolutions, a transposed one of stride 2, and one mask per class (and for the background)."""
    return {
        "mask_head": MaskRCNNHeads(channels, (channels,) * 4, 1),  # type: ignore[arg-type]
        "mask_predictor": MaskRCNNPredictor(channels, channels, num_classes + 1),
    }


def mask_rcnn(
    backbone: str | NAT = "nat_tiny", num_classes: int = COCO, channels: int = 256, **options: Any
) -> MaskRCNN:
    """torchvision's MaskRCNN, freshly initialised, on a backbone by name or on a NAT with ``features_only``.

    ``num_classes`` does not count the background; labels are 1 to num_classes. ``channels`` is the width of the
    pyramid and of the heads, whose linear layers have 4 times that. ``options`` are arguments of torchvision's
    MaskRCNN (``min_size``, ``max_size``, ``image_mean``, ``box_score_thresh``, ...), and so are calls:
    ``model(images, targets)`` gives losses in training, ``model(images)`` detections in evaluation. The box
    loss is torchvision's smooth L1 (beta 1/9), where the published models had L1.

    A named backbone has the published drop-path rate and dilations for detection; for another, see
    `torch_nat.dense.dense_backbone`. Raises ValueError for an unknown name or a backbone without a pyramid of maps.
    """
    body = dense_backbone("mask_rcnn", backbone)
    settings: dict[str, Any] = {
        "rpn_post_nms_top_n_train": 1000,
        "box_head": TwoMLPHead(channels * 7**2, 4 * channels),
        "box_predictor": FastRCNNPredictor(4 * channels, num_classes + 1),
        **common_options(body),
        **mask_modules(channels, num_classes),
        **options,
    }
    return MaskRCNN(PyramidBackbone(body, channels), **settings)
