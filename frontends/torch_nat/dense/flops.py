"""Multiply-accumulates of the dense models, in the convention of `torch_nat.flops`.

    python -m torch_nat.dense.flops cascade_mask_rcnn nat_tiny

A detector's heads run on 1,000 boxes, in every stage, and on the masks of 100: what mmdetection counts, and so
the published figures do. UPerNet is counted as it infers, without its auxiliary head.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from natcore.models import MODELS
from torch_nat import dense, flops
from torch_nat.dense.variants import Task

BOXES, MASKS = 1000, 100
#: Height and width at which the published figures were counted.
SIZES: dict[Task, tuple[int, int]] = {
    "upernet": (2048, 512),
    "mask_rcnn": (1280, 800),
    "cascade_mask_rcnn": (1280, 800),
}


def count(model: nn.Module, height: int, width: int) -> flops.Counts:
    """Counts by kind, as `torch_nat.flops.count` gives them, for one image through a model of `torch_nat.dense`.

    The model may be on the meta device, where nothing is computed; it is counted in evaluation mode. A detector
    is counted without its resizing of the image: height and width are what its backbone sees.
    """
    device = next(model.parameters()).device
    body: Any = model.backbone
    image = torch.empty(1, getattr(body, "body", body).config.in_chans, height, width, device=device)
    modes = [(module, module.training) for module in model.modules()]
    try:
        return flops.count((_Detector(model) if hasattr(model, "roi_heads") else model).eval(), image)
    finally:
        for module, training in modes:
            module.training = training


def build(task: Task, name: str) -> nn.Module:
    """A published dense model by its task and its backbone's name. Raises ValueError for an unknown one."""
    return getattr(dense, task)(name)


class _Detector(nn.Module):
    """A detector's multiply-accumulates, on as many boxes and masks as everybody counts."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> None:
        maps = self.model.backbone(image)
        self.model.rpn.head(list(maps.values()))
        channels = self.model.backbone.out_channels
        for heads in getattr(self.model.roi_heads, "stages", [self.model.roi_heads]):
            heads.box_predictor(heads.box_head(image.new_empty(BOXES, channels, *heads.box_roi_pool.output_size)))
            heads.mask_predictor(heads.mask_head(image.new_empty(MASKS, channels, *heads.mask_roi_pool.output_size)))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m torch_nat.dense.flops", description=__doc__.partition("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("task", choices=get_args(Task), metavar="task", help=", ".join(get_args(Task)))
    parser.add_argument("model", choices=MODELS, metavar="model", help="the backbone, such as nat_tiny")
    parser.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="(default: as published)")
    options = parser.parse_args(arguments)
    height, width = options.size or SIZES[options.task]
    with torch.device("meta"):
        model = build(options.task, options.model)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{options.task} on {options.model}, one image of {height} x {width}, {parameters:,} parameters")
    flops.print_counts(count(model, height, width))


if __name__ == "__main__":
    main()
