"""Backbones for dense prediction: the published drop-path rates and dilations, which differ from classification's.

Source: the published configurations of NAT, DiNAT and DiNAT_s for mmsegmentation and mmdetection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle, islice
from typing import Literal

from natcore.models import NATConfig, model_config
from torch_nat.models import NAT

Task = Literal["upernet", "mask_rcnn", "cascade_mask_rcnn"]


def _rates(family: str, *rates: float) -> dict[str, float]:
    """Rates by name, smallest model first."""
    sizes = ("tiny", "small", "base", "large") if family == "dinat_s" else ("mini", "tiny", "small", "base", "large")
    return {f"{family}_{size}": rate for size, rate in zip(sizes, rates, strict=False)}


#: Drop-path rates of the published models; the others keep that of classification.
DROP_PATH: dict[Task, dict[str, float]] = {
    "upernet": _rates("nat", 0.2, 0.3, 0.5, 0.5)
    | _rates("dinat", 0.2, 0.3, 0.5, 0.5, 0.3)
    | _rates("dinat_s", 0.3, 0.3, 0.3, 0.3),
    "mask_rcnn": _rates("nat", 0.2, 0.2, 0.35) | _rates("dinat", 0.2, 0.2, 0.35) | _rates("dinat_s", 0.2, 0.35),
    "cascade_mask_rcnn": _rates("nat", 0.2, 0.3, 0.3, 0.5)
    | _rates("dinat", 0.2, 0.3, 0.5, 0.6, 0.6)
    | _rates("dinat_s", 0.3, 0.5, 0.6, 0.6),
}

#: Per stage, the dilations of its odd blocks, over and over; even blocks have 1. At 512 x 512 pixels for
#: segmentation (the large models: 640 x 640), about 800 x 1333 for detection.
_SEGMENTATION = ((16,), (4, 8), (2, 3, 4), (2,))
_SEGMENTATION_LARGE = ((20,), (5, 10), (2, 3, 4, 5, 2, 3, 4, 5, 5), (2,))
_DETECTION = ((28,), (7, 14), (3, 5, 7), (3,))


def dense_config(task: Task, name: str, **changes: object) -> NATConfig:
    """The config of a backbone by its name in `natcore.models.MODELS`, with the task's rate and dilations.

    ``changes`` are fields of NATConfig and come last. Raises ValueError for a model without a pyramid of maps.
    """
    config = model_config(name, features_only=True, num_classes=0)
    if config.flat:
        raise ValueError(f"{name} has one map of stride {config.patch_size}; dense prediction takes a pyramid of maps.")
    rate = DROP_PATH[task].get(name, config.drop_path_rate)
    config = replace(config, drop_path_rate=rate, dilations=_dilations(task, config))
    return replace(config, **changes)  # type: ignore[arg-type]


def dense_backbone(task: Task, backbone: str | NAT, **changes: object) -> NAT:
    """A NAT that gives maps: the named one, freshly initialised, or the one handed in.

    Raises ValueError for a NAT without ``features_only`` or with one stage, and for changes to one that exists.
    """
    if isinstance(backbone, str):
        return NAT(dense_config(task, backbone, **changes))
    if changes:
        raise ValueError(f"{', '.join(changes)}: a backbone that exists is taken as it is; name one to change it.")
    if not backbone.config.features_only or len(backbone.config.depths) < 2:
        raise ValueError(
            f"dense prediction takes a NAT with features_only=True and two stages or more, but this one has "
            f"features_only={backbone.config.features_only} and depths {backbone.config.depths}."
        )
    return backbone


def widths(config: NATConfig) -> list[int]:
    """The channels of a backbone's maps, finest first."""
    return [config.width(stage) for stage in range(len(config.depths))]


def strides(config: NATConfig) -> list[int]:
    """The pixels between tokens of a backbone's maps, finest first."""
    return [config.patch_size * 2**stage for stage in range(len(config.depths))]


def _dilations(task: Task, config: NATConfig) -> tuple[tuple[int, ...], ...] | None:
    if config.dilations is None:
        return None
    if task == "upernet":
        rule: Sequence[tuple[int, ...]] = _SEGMENTATION_LARGE if config.embed_dim == 192 else _SEGMENTATION
    else:
        rule = _DETECTION
    if config.layout == "dinat_s":  # one odd block in stage 1, which takes the larger
        rule = tuple(odd[-1:] if stage == 1 else odd for stage, odd in enumerate(rule))
    return tuple(
        tuple(d for odd in islice(cycle(odds), (depth + 1) // 2) for d in (1, odd))[:depth]
        for depth, odds in zip(config.depths, rule, strict=True)
    )
