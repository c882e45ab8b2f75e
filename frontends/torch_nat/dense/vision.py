"""What torch_nat.dense takes from torchvision, and the error where torchvision does not import."""

import torch

try:
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
    from torchvision.models.detection.image_list import ImageList
    from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
    from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference, maskrcnn_loss
    from torchvision.ops import (
        FeaturePyramidNetwork,
        MultiScaleRoIAlign,
        clip_boxes_to_image,
        generalized_box_iou_loss,
        roi_align,
    )
    from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision of another torch
    raise ImportError(
        "Mask R-CNN and Cascade Mask R-CNN need torchvision 0.26 or newer, in the build that belongs to torch "
        f"{torch.__version__} (pip install torchvision, from where torch came): {error}"
    ) from error

__all__ = [
    "AnchorGenerator",
    "FastRCNNConvFCHead",
    "FastRCNNPredictor",
    "FeaturePyramidNetwork",
    "ImageList",
    "LastLevelMaxPool",
    "MaskRCNN",
    "MaskRCNNHeads",
    "MaskRCNNPredictor",
    "MultiScaleRoIAlign",
    "RoIHeads",
    "TwoMLPHead",
    "clip_boxes_to_image",
    "generalized_box_iou_loss",
    "maskrcnn_inference",
    "maskrcnn_loss",
    "roi_align",
]
