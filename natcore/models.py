"""The NAT family as data: no framework, no arrays.

Architecture and published variants: Hassani et al., "Neighborhood Attention Transformer",
CVPR 2023, and the published code, which the checkpoints need where paper and code differ.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace


@dataclass(frozen=True)
class NATConfig:
    """All that fixes a hierarchical NAT. Stage i has width ``embed_dim * 2**i``."""

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

    def __post_init__(self) -> None:
        if len(self.depths) != len(self.num_heads):
            raise ValueError(f"depths {self.depths} and num_heads {self.num_heads} must have one entry per stage.")
        for stage, heads in enumerate(self.num_heads):
            if self.width(stage) % heads:
                raise ValueError(f"stage {stage} has width {self.width(stage)}, not divisible by its {heads} heads.")
        if self.dilations is not None and tuple(len(d) for d in self.dilations) != self.depths:
            raise ValueError(f"dilations {self.dilations} must have one entry per block of depths {self.depths}.")

    def width(self, stage: int) -> int:
        return self.embed_dim * 2**stage

    def dilation(self, stage: int, block: int) -> int:
        return 1 if self.dilations is None else self.dilations[stage][block]

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


_TINY = NATConfig(64, (3, 4, 18, 5), (2, 4, 8, 16), mlp_ratio=3, drop_path_rate=0.2)
_SMALL = NATConfig(96, (3, 4, 18, 5), (3, 6, 12, 24), mlp_ratio=2, drop_path_rate=0.3, layer_scale=1e-5)

#: The published variants, by the names that create_model and load know.
MODELS: dict[str, NATConfig] = {
    "nat_mini": replace(_TINY, depths=(3, 4, 6, 5)),
    "nat_tiny": _TINY,
    "nat_small": _SMALL,
    "nat_base": replace(_SMALL, embed_dim=128, num_heads=(4, 8, 16, 32), drop_path_rate=0.5),
}


def model_config(name: str, **changes: object) -> NATConfig:
    """A named variant with some fields changed. Raises ValueError for an unknown name."""
    if name not in MODELS:
        raise ValueError(f"no model {name!r}; there are {', '.join(sorted(MODELS))}.")
    return replace(MODELS[name], **changes)  # type: ignore[arg-type]
