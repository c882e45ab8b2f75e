"""torch_nat.dense: semantic segmentation and detection on NAT backbones.

`upernet` needs nothing but PyTorch. `mask_rcnn` and `cascade_mask_rcnn` need torchvision, which is imported when
one of them is first named; without it that raises ImportError.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch_nat.dense.published import load_backbone, load_published
from torch_nat.dense.upernet import UPerNet, upernet
from torch_nat.dense.variants import Task, dense_backbone, dense_config

if TYPE_CHECKING:
    from torch_nat.dense.cascade import CascadeMaskRCNN, cascade_mask_rcnn
    from torch_nat.dense.detection import mask_rcnn

__all__ = [
    "CascadeMaskRCNN",
    "Task",
    "UPerNet",
    "cascade_mask_rcnn",
    "dense_backbone",
    "dense_config",
    "load_backbone",
    "load_published",
    "mask_rcnn",
    "upernet",
]


def __getattr__(name: str) -> Any:
    if name in ("CascadeMaskRCNN", "cascade_mask_rcnn"):
        from torch_nat.dense import cascade

        return getattr(cascade, name)
    if name == "mask_rcnn":
        from torch_nat.dense.detection import mask_rcnn

        return mask_rcnn
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
