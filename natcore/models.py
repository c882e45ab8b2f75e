"""The NAT family as data: no framework, no arrays.

Architectures and published variants: Hassani et al., "Neighborhood Attention Transformer", CVPR 2023;
Hassani and Shi, "Dilated Neighborhood Attention Transformer", arXiv 2209.15001; and the published code,
which the checkpoints need where paper and code differ.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace

from natcore.problem import Problem
from natcore.window import window_of

#: Layout -> side of a patch. All give square maps of tokens, without a class token.
#: - "nat" (NAT, DiNAT): two overlapping 3x3 convolutions of stride 2; between stages another one.
#: - "dinat_s": Swin's frame: patches of 4x4; between stages, 2x2 tokens merge into one.
#: - "isotropic": patches of 16x16 and one stage.
#: - "vit_rpb": isotropic, and every window is the whole map: self attention with a positional bias.
LAYOUTS: dict[str, int] = {"nat": 4, "dinat_s": 4, "isotropic": 16, "vit_rpb": 16}


@dataclass(frozen=True)
class NATConfig:
    """All that fixes a model of the NAT family. Stage i has width ``embed_dim * 2**i``."""

    embed_dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    mlp_ratio: float
    drop_path_rate: float = 0.0
    layer_scale: float | None = None
    kernel_size: int = 7
    dilations: tuple[tuple[int, ...], ...] | None = None  # per stage and block; None = all 1
    qkv_bias: bool = True
    rel_pos_bias: bool = True
    in_chans: int = 3
    num_classes: int = 1000
    drop_rate: float = 0.0  # after the patch embedding and after every projection
    features_only: bool = False  # one normed map per stage (norm0, norm1, ...) in place of norm and head
    layout: str = "nat"  # one of LAYOUTS

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout {self.layout!r} must be one of {', '.join(LAYOUTS)}.")
        if len(self.depths) != len(self.num_heads):
            raise ValueError(f"depths {self.depths} and num_heads {self.num_heads} must have one entry per stage.")
        if self.flat and len(self.depths) != 1:
            raise ValueError(f"layout {self.layout!r} has one stage, but depths are {self.depths}.")
        for stage, heads in enumerate(self.num_heads):
            if self.width(stage) % heads:
                raise ValueError(f"stage {stage} has width {self.width(stage)}, not divisible by its {heads} heads.")
        if self.dilations is not None and tuple(len(d) for d in self.dilations) != self.depths:
            raise ValueError(f"dilations {self.dilations} must have one entry per block of depths {self.depths}.")
        if self.layout == "vit_rpb" and any(dilation != 1 for stage in self.dilations or () for dilation in stage):
            raise ValueError(f"layout 'vit_rpb' attends to the whole map: dilations {self.dilations} must be 1.")

    @property
    def flat(self) -> bool:
        """One stage, whose blocks are not numbered by stage."""
        return self.layout in ("isotropic", "vit_rpb")

    @property
    def patch_size(self) -> int:
        """The side of a token of stage 0 in pixels."""
        return LAYOUTS[self.layout]

    def width(self, stage: int) -> int:
        return self.embed_dim * 2**stage

    @property
    def trunk_name(self) -> str:
        """The published name of the list of stages (of blocks, where the layout is flat)."""
        return "levels" if self.layout == "nat" else "layers"

    def stage_name(self, stage: int) -> str:
        """The published name of a stage's parameters, such as "levels.0"."""
        return self.trunk_name if self.flat else f"{self.trunk_name}.{stage}"

    def block_name(self, stage: int, block: int) -> str:
        """The published name of a block's parameters, such as "levels.0.blocks.2"."""
        return f"{self.stage_name(stage)}.{block}" if self.flat else f"{self.stage_name(stage)}.blocks.{block}"

    def dilation(self, stage: int, block: int) -> int:
        return 1 if self.dilations is None else self.dilations[stage][block]

    def padding(self, extent: int, dilation: int) -> int:
        """Zeros after a map's axis before attention: the published models pad what is smaller than a window.

        Raises ValueError where a window has to be the whole map and is not.
        """
        if self.layout == "vit_rpb" and extent != self.kernel_size:
            side = self.kernel_size * self.patch_size
            raise ValueError(
                f"this model attends to whole maps of {self.kernel_size} x {self.kernel_size} tokens (images of {side} "
                f"x {side}), but one axis has {extent}: load its file with kernel_size={extent} to resize its tables."
            )
        return max(self.kernel_size * dilation - extent, 0)

    def attentions(self, batch: int, height: int, width: int, dtype: str, rpb_dtype: str) -> tuple[Problem, ...]:
        """The attention problems, each once, that the blocks meet on images ``[batch, in_chans, height, width]``, where
        q, k and v have ``dtype`` and the biases ``rpb_dtype``. Raises ValueError as `padding` does."""
        problems = {}
        for stage, heads in enumerate(self.num_heads):
            side = self.patch_size * 2**stage
            extents = [-(-extent // side) for extent in (height, width)]
            for dilation in {self.dilation(stage, block): None for block in range(self.depths[stage])}:
                spatial = tuple(extent + self.padding(extent, dilation) for extent in extents)
                window, head_dim = window_of(2, self.kernel_size, 1, dilation, False), self.width(stage) // heads
                bias = rpb_dtype if self.rel_pos_bias else None
                problems[Problem(window, batch, spatial, heads, heads, head_dim, head_dim, 0, dtype, bias)] = None
        return tuple(problems)

    def drop_path(self, stage: int, block: int) -> float:
        """Stochastic-depth rate, linear over all blocks from 0 to drop_path_rate."""
        last = sum(self.depths) - 1
        return self.drop_path_rate * (sum(self.depths[:stage]) + block) / last if last else 0.0

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> NATConfig:
        """Raises ValueError for text that is not such a config."""
        try:
            fields = json.loads(text)
            for name in ("depths", "num_heads"):
                fields[name] = tuple(fields[name])
            if fields.get("dilations") is not None:
                fields["dilations"] = tuple(tuple(stage) for stage in fields["dilations"])
            return cls(**fields)
        except (TypeError, KeyError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"not a NATConfig: {text[:200]!r} ({error})") from error


def alternating(depths: tuple[int, ...], dilations: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """DiNAT's rule: in stage i every second block has dilation dilations[i], the others 1."""
    return tuple(
        tuple(dilation if block % 2 else 1 for block in range(depth))
        for depth, dilation in zip(depths, dilations, strict=True)
    )


def _dilated(config: NATConfig, dilations: tuple[int, ...] = (8, 4, 2, 1), **changes: object) -> NATConfig:
    config = replace(config, **changes)  # type: ignore[arg-type]
    return replace(config, dilations=alternating(config.depths, dilations))


_HEADS = {64: (2, 4, 8, 16), 96: (3, 6, 12, 24), 128: (4, 8, 16, 32), 192: (6, 12, 24, 48)}  # 32 channels each
_TINY = NATConfig(64, (3, 4, 18, 5), _HEADS[64], mlp_ratio=3, drop_path_rate=0.2)
_MINI = replace(_TINY, depths=(3, 4, 6, 5))
_SMALL = NATConfig(96, (3, 4, 18, 5), _HEADS[96], mlp_ratio=2, drop_path_rate=0.3, layer_scale=1e-5)
_BASE = replace(_SMALL, embed_dim=128, num_heads=_HEADS[128], drop_path_rate=0.5)
_LARGE = NATConfig(192, (3, 4, 18, 5), _HEADS[192], mlp_ratio=2, drop_path_rate=0.35)
_S_TINY = NATConfig(96, (2, 2, 6, 2), _HEADS[96], mlp_ratio=4, drop_path_rate=0.2, layout="dinat_s")
_S_SMALL = replace(_S_TINY, depths=(2, 2, 18, 2), drop_path_rate=0.3)
_S_BASE = replace(_S_SMALL, embed_dim=128, num_heads=_HEADS[128], drop_path_rate=0.5)
_S_LARGE = replace(_S_SMALL, embed_dim=192, num_heads=_HEADS[192], drop_path_rate=0.35)
_ISO_SMALL = NATConfig(384, (12,), (12,), mlp_ratio=4, drop_path_rate=0.1, layout="isotropic")
_ISO_BASE = replace(_ISO_SMALL, embed_dim=768, num_heads=(24,), drop_path_rate=0.4)

#: The published variants, by the names that create_model and load know. Their dilations are meant for
#: images of 224x224, or of 384x384 where the name says so; "11x11" is the kernel size.
MODELS: dict[str, NATConfig] = {
    "nat_mini": _MINI,
    "nat_tiny": _TINY,
    "nat_small": _SMALL,
    "nat_base": _BASE,
    "dinat_mini": _dilated(_MINI),
    "dinat_tiny": _dilated(_TINY),
    "dinat_small": _dilated(_SMALL, layer_scale=None),
    "dinat_base": _dilated(_BASE),
    "dinat_large": _dilated(_LARGE),
    "dinat_large_384": _dilated(_LARGE, (13, 6, 3, 1)),
    "dinat_large_384_11x11": _dilated(_LARGE, kernel_size=11),
    "dinat_s_tiny": _dilated(_S_TINY),
    "dinat_s_small": _dilated(_S_SMALL),
    "dinat_s_base": _dilated(_S_BASE),
    "dinat_s_large": _dilated(_S_LARGE),
    "dinat_s_large_384": _dilated(_S_LARGE, (13, 6, 3, 1)),
    "nat_isotropic_small": _ISO_SMALL,
    "nat_isotropic_base": _ISO_BASE,
    "dinat_isotropic_small": _dilated(_ISO_SMALL, (2,)),
    "dinat_isotropic_base": _dilated(_ISO_BASE, (2,)),
    "vit_rpb_small": replace(_ISO_SMALL, kernel_size=14, layout="vit_rpb"),
    "vit_rpb_base": replace(_ISO_BASE, kernel_size=14, layout="vit_rpb"),
}


def model_config(name: str, **changes: object) -> NATConfig:
    """A named variant with some fields changed. Raises ValueError for an unknown name."""
    if name not in MODELS:
        raise ValueError(f"no model {name!r}; there are {', '.join(MODELS)}.")
    return replace(MODELS[name], **changes)  # type: ignore[arg-type]
