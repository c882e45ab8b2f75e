"""UPerNet: semantic segmentation from a backbone's maps.

Source: Xiao et al., "Unified Perceptual Parsing for Scene Understanding" (ECCV 2018, arXiv 1807.10221); pyramid
pooling: Zhao et al., "Pyramid Scene Parsing Network" (CVPR 2017). Sizes, names of parameters and the auxiliary
head are those of the published NAT and DiNAT checkpoints, which mmsegmentation wrote.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_nat.dense.variants import dense_backbone, widths
from torch_nat.models import NAT

#: Classes of ADE20K.
ADE20K = 150


class ConvBNReLU(nn.Module):
    """A convolution that keeps the map's size, batch norm and ReLU: ``[B, C, H, W]`` to ``[B, C', H, W]``."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class PixelClassifier(nn.Module):
    """What ends either head: dropout of channels and a 1x1 convolution to ``num_classes``."""

    def __init__(self, channels: int, num_classes: int, dropout: float):
        super().__init__()
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(channels, num_classes, kernel_size=1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(self.conv_seg.bias)  # type: ignore[arg-type]

    def classify(self, x: Tensor) -> Tensor:
        return self.conv_seg(self.dropout(x))


class UPerHead(PixelClassifier):
    """Pyramid pooling of the coarsest map, a feature pyramid down to the finest, and a classifier on all levels.

    Takes maps ``[B, in_channels[i], H_i, W_i]``, finest first; gives logits ``[B, num_classes, H_0, W_0]``.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int,
        num_classes: int,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        dropout: float = 0.1,
    ):
        super().__init__(channels, num_classes, dropout)
        *finer, coarsest = in_channels
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), ConvBNReLU(coarsest, channels, 1)) for scale in pool_scales
        )
        self.bottleneck = ConvBNReLU(coarsest + len(pool_scales) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(ConvBNReLU(width, channels, 1) for width in finer)
        self.fpn_convs = nn.ModuleList(ConvBNReLU(channels, channels, 3) for _ in finer)
        self.fpn_bottleneck = ConvBNReLU(len(in_channels) * channels, channels, 3)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        x = maps[-1]
        x = self.bottleneck(torch.cat([x, *(_resized(pool(x), x.shape[2:]) for pool in self.psp_modules)], dim=1))
        levels = [x]
        for index in reversed(range(len(self.lateral_convs))):
            lateral = self.lateral_convs[index](maps[index])
            x = lateral + _resized(x, lateral.shape[2:])
            levels.append(self.fpn_convs[index](x))
        levels = [_resized(level, maps[0].shape[2:]) for level in reversed(levels)]
        return self.classify(self.fpn_bottleneck(torch.cat(levels, dim=1)))


class FCNHead(PixelClassifier):
    """The auxiliary head: a 3x3 convolution and a classifier on one map, ``[B, C, H, W]`` to ``[B, classes, H, W]``.

    Source: Long et al., "Fully Convolutional Networks for Semantic Segmentation" (CVPR 2015).
    """

    def __init__(self, in_channels: int, channels: int, num_classes: int, dropout: float = 0.1):
        super().__init__(channels, num_classes, dropout)
        self.convs = nn.Sequential(ConvBNReLU(in_channels, channels, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.convs(x))


class UPerNet(nn.Module):
    """A NAT with a UPerHead, and in training a FCNHead on its last map but one.

    ``backbone`` is a NAT with ``features_only``; ``channels`` is the width of the UPerHead, half of it that of
    the FCNHead. Raises ValueError for another backbone.

    State dicts have the names of the published checkpoints: ``model.load_state_dict(file["state_dict"])``, or
    `torch_nat.dense.load_published`.
    """

    def __init__(
        self,
        backbone: NAT,
        num_classes: int,
        channels: int = 512,
        auxiliary_weight: float = 0.4,
        ignore_index: int = 255,
    ):
        super().__init__()
        in_channels = widths(backbone.config)
        self.backbone = dense_backbone("upernet", backbone)
        self.decode_head = UPerHead(in_channels, channels, num_classes)
        self.auxiliary_head = FCNHead(in_channels[-2], channels // 2, num_classes)
        self.auxiliary_weight = auxiliary_weight
        self.ignore_index = ignore_index

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor | dict[str, Tensor]:
        """Logits ``[B, num_classes, H, W]`` of images ``[B, in_chans, H, W]``; with ``labels``, losses instead.

        Labels are int64 ``[B, H, W]``, from 0 to num_classes - 1, or ``ignore_index`` for pixels that do not count.
        The losses are scalars to be added up: "decode", and "auxiliary", which is weighted already. Batch norm
        needs two images or more in training. Raises ValueError for labels of another shape.
        """
        if labels is not None and labels.shape != (images.shape[0], *images.shape[2:]):
            raise ValueError(
                f"labels have shape {tuple(labels.shape)}; images {tuple(images.shape)} need "
                f"[{images.shape[0]}, {images.shape[2]}, {images.shape[3]}]."
            )
        maps = self.backbone(images)
        logits = _resized(self.decode_head(maps), images.shape[2:])
        if labels is None:
            return logits
        auxiliary = _resized(self.auxiliary_head(maps[-2]), images.shape[2:])
        return {
            "decode": self._loss(logits, labels),
            "auxiliary": self.auxiliary_weight * self._loss(auxiliary, labels),
        }

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy over the number of all pixels, as published: those that do not count make it smaller."""
        return F.cross_entropy(logits, labels, ignore_index=self.ignore_index, reduction="sum") / labels.numel()


def upernet(backbone: str | NAT = "nat_tiny", num_classes: int = ADE20K, channels: int = 512) -> UPerNet:
    """A UPerNet, freshly initialised, on a backbone of `natcore.models.MODELS` or on a NAT with ``features_only``.

    A named backbone has the published drop-path rate and dilations for segmentation; for another, see
    `torch_nat.dense.dense_backbone`. Raises ValueError for an unknown name or a backbone without a pyramid of maps.
    """
    return UPerNet(dense_backbone("upernet", backbone), num_classes, channels)


def _resized(x: Tensor, size: Sequence[int]) -> Tensor:
    if x.shape[2:] == torch.Size(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)
