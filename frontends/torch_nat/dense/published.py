"""Published checkpoints of NAT, DiNAT and DiNAT_s: classification, mmsegmentation and mmdetection files.

The renaming follows from both sides' parameter lists: mmdetection counts the background as the last class and has
no boxes or masks for it, torchvision as the first, with rows that nothing reads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torch_nat.dense.upernet import UPerNet
from torch_nat.models import NAT

_PREFIX = "backbone."

#: mmdetection's names to torchvision's, of what has the same numbers on both sides.
_RENAMED = (
    (r"backbone\.", "backbone.body."),
    (r"neck\.lateral_convs\.(\d+)\.conv\.", r"backbone.fpn.inner_blocks.\1.0."),
    (r"neck\.fpn_convs\.(\d+)\.conv\.", r"backbone.fpn.layer_blocks.\1.0."),
    (r"rpn_head\.rpn_conv\.", "rpn.head.conv.0.0."),
    (r"rpn_head\.rpn_cls\.", "rpn.head.cls_logits."),
    (r"rpn_head\.rpn_reg\.", "rpn.head.bbox_pred."),
    (r"roi_head\.bbox_head\.shared_fcs\.0\.", "roi_heads.box_head.fc6."),
    (r"roi_head\.bbox_head\.shared_fcs\.1\.", "roi_heads.box_head.fc7."),
    (r"roi_head\.bbox_head\.(\d)\.shared_convs\.(\d)\.conv\.", r"roi_heads.stages.\1.box_head.\2.0."),
    (r"roi_head\.bbox_head\.(\d)\.shared_convs\.(\d)\.bn\.", r"roi_heads.stages.\1.box_head.\2.1."),
    (r"roi_head\.bbox_head\.(\d)\.shared_fcs\.0\.", r"roi_heads.stages.\1.box_head.5."),
    (r"roi_head\.mask_head\.convs\.(\d)\.conv\.", r"roi_heads.mask_head.\1.0."),
    (r"roi_head\.mask_head\.upsample\.", "roi_heads.mask_predictor.conv5_mask."),
    (r"roi_head\.mask_head\.(\d)\.convs\.(\d)\.conv\.", r"roi_heads.stages.\1.mask_head.\2.0."),
    (r"roi_head\.mask_head\.(\d)\.upsample\.", r"roi_heads.stages.\1.mask_predictor.conv5_mask."),
)
#: What has rows per class. The last: where the background's rows come from.
_PER_CLASS = (
    (r"roi_head\.bbox_head\.(?:(\d)\.)?fc_cls\.", "box_predictor.cls_score.", "last"),
    (r"roi_head\.bbox_head\.(?:(\d)\.)?fc_reg\.", "box_predictor.bbox_pred.", "four zeros"),
    (r"roi_head\.mask_head\.(?:(\d)\.)?conv_logits\.", "mask_predictor.mask_fcn_logits.", "zero"),
)


def load_backbone(backbone: NAT, checkpoint: Mapping[str, Any]) -> None:
    """Fill a NAT with ``features_only`` from a published file that was read with `torch.load`.

    The file may be one of mmsegmentation or mmdetection: parameters under ``backbone.`` are taken, and every one
    of them has to fit, the norms of all maps included. Or it is one of classification: then its ``norm`` and
    ``head`` are left out, and the maps' norms stay as they are. Raises RuntimeError, listing every mismatch.
    """
    state = _parameters(checkpoint)
    if any(name.startswith(_PREFIX) for name in state):
        backbone.load_state_dict({n.removeprefix(_PREFIX): t for n, t in state.items() if n.startswith(_PREFIX)})
        return
    state = {name: t for name, t in state.items() if not name.startswith(("norm.", "head."))}
    own = {name: t for name, t in backbone.state_dict().items() if re.match(r"norm\d+\.", name)}
    backbone.load_state_dict(own | state)


def load_published(model: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Fill a `UPerNet`, Mask R-CNN or Cascade Mask R-CNN of this package from its published file, strictly.

    ``checkpoint`` is what `torch.load` gave. Raises RuntimeError, listing every mismatch.
    """
    state = _parameters(checkpoint)
    model.load_state_dict(state if isinstance(model, UPerNet) else dict(_torchvision(state)))


def _parameters(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The parameters of a file, which may have them beside other things."""
    state = checkpoint.get("state_dict", checkpoint)
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


def _torchvision(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """A detector's parameters under torchvision's names. Unknown ones keep theirs, and loading names them."""
    for name, tensor in state.items():
        for pattern, new, background in _PER_CLASS:
            if found := re.match(pattern, name):
                stage = "" if found[1] is None else f"stages.{found[1]}."
                yield f"roi_heads.{stage}{new}{name[found.end() :]}", _with_background(tensor, background)
                break
        else:
            for pattern, new in _RENAMED:
                renamed, count = re.subn(f"^{pattern}", new, name)
                if count:
                    name = renamed
                    break
            yield name, tensor


def _with_background(tensor: Tensor, background: str) -> Tensor:
    """Rows of classes with the background's first."""
    if background == "last":
        return tensor.roll(1, dims=0)
    rows = 4 if background == "four zeros" else 1
    return torch.cat([tensor.new_zeros((rows, *tensor.shape[1:])), tensor])
