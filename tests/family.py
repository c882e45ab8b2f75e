"""The published family, written out: what the table of natcore.models is tested against."""

from __future__ import annotations

from dataclasses import dataclass

from natcore.models import NATConfig


@dataclass(frozen=True)
class Row:
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    width: int
    ratio: int
    drop_path: float
    scaled: bool
    kernel: int
    dilations: tuple[int, ...]  # of every second block of each stage
    size: int  # of the images of the published checkpoint
    parameters: int
    gmacs: float  # as its README says, to 0.1


_HEADS = {64: (2, 4, 8, 16), 96: (3, 6, 12, 24), 128: (4, 8, 16, 32), 192: (6, 12, 24, 48)}
_NAT, _MINI = (3, 4, 18, 5), (3, 4, 6, 5)
_TINY_S, _S = (2, 2, 6, 2), (2, 2, 18, 2)
_ONES, _D224, _D384 = (1, 1, 1, 1), (8, 4, 2, 1), (13, 6, 3, 1)

ROWS: dict[str, Row] = {
    "nat_mini": Row(_MINI, _HEADS[64], 64, 3, 0.2, False, 7, _ONES, 224, 19_984_174, 2.7),
    "nat_tiny": Row(_NAT, _HEADS[64], 64, 3, 0.2, False, 7, _ONES, 224, 27_901_582, 4.3),
    "nat_small": Row(_NAT, _HEADS[96], 96, 2, 0.3, True, 7, _ONES, 224, 50_743_297, 7.8),
    "nat_base": Row(_NAT, _HEADS[128], 128, 2, 0.5, True, 7, _ONES, 224, 89_769_652, 13.7),
    "dinat_mini": Row(_MINI, _HEADS[64], 64, 3, 0.2, False, 7, _D224, 224, 19_984_174, 2.7),
    "dinat_tiny": Row(_NAT, _HEADS[64], 64, 3, 0.2, False, 7, _D224, 224, 27_901_582, 4.3),
    "dinat_small": Row(_NAT, _HEADS[96], 96, 2, 0.3, False, 7, _D224, 224, 50_719_681, 7.8),
    "dinat_base": Row(_NAT, _HEADS[128], 128, 2, 0.5, True, 7, _D224, 224, 89_769_652, 13.7),
    "dinat_large": Row(_NAT, _HEADS[192], 192, 2, 0.35, False, 7, _D224, 224, 200_943_514, 30.6),
    "dinat_large_384": Row(_NAT, _HEADS[192], 192, 2, 0.35, False, 7, _D384, 384, 200_943_514, 89.7),
    "dinat_large_384_11x11": Row(_NAT, _HEADS[192], 192, 2, 0.35, False, 11, _D224, 384, 201_144_250, 92.4),
    "dinat_s_tiny": Row(_TINY_S, _HEADS[96], 96, 4, 0.2, False, 7, _D224, 224, 28_288_354, 4.5),
    "dinat_s_small": Row(_S, _HEADS[96], 96, 4, 0.3, False, 7, _D224, 224, 49_606_258, 8.7),
    "dinat_s_base": Row(_S, _HEADS[128], 128, 4, 0.5, False, 7, _D224, 224, 87_768_224, 15.4),
    "dinat_s_large": Row(_S, _HEADS[192], 192, 4, 0.35, False, 7, _D224, 224, 196_532_476, 34.5),
    "dinat_s_large_384": Row(_S, _HEADS[192], 192, 4, 0.35, False, 7, _D384, 384, 196_532_476, 101.5),
    "nat_isotropic_small": Row((12,), (12,), 384, 4, 0.1, False, 7, (1,), 224, 21_999_736, 4.3),
    "nat_isotropic_base": Row((12,), (24,), 768, 4, 0.4, False, 7, (1,), 224, 86_465_800, 16.9),
    "dinat_isotropic_small": Row((12,), (12,), 384, 4, 0.1, False, 7, (2,), 224, 21_999_736, 4.3),
    "dinat_isotropic_base": Row((12,), (24,), 768, 4, 0.4, False, 7, (2,), 224, 86_465_800, 16.9),
    "vit_rpb_small": Row((12,), (12,), 384, 4, 0.1, False, 14, (1,), 224, 22_080_376, 4.6),
    "vit_rpb_base": Row((12,), (24,), 768, 4, 0.4, False, 14, (1,), 224, 86_627_080, 17.5),
}

#: One small model of each layout but NAT's own.
SWIN = NATConfig(32, (2, 2), (1, 2), mlp_ratio=2, kernel_size=3, dilations=((1, 2), (1, 1)), layout="dinat_s")
ISOTROPIC = NATConfig(64, (2,), (2,), mlp_ratio=2, kernel_size=3, dilations=((1, 2),), layout="isotropic")
VIT = NATConfig(64, (2,), (2,), mlp_ratio=2, kernel_size=4, layout="vit_rpb")

#: For tests that run whole models: NAT in every size, and one of everything else.
OF_EVERY_LAYOUT = (
    *("nat_mini", "nat_tiny", "nat_small", "nat_base"),
    *("dinat_s_tiny", "dinat_mini", "dinat_isotropic_small", "vit_rpb_small"),
)


def published_shapes(name: str, depths: tuple[int, ...] | None = None) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a published classification checkpoint, written out; with other depths if given.

    Without the buffers ``attn.relative_position_index`` of a ViT-rpb.
    """
    row, shapes = ROWS[name], {}
    swin, flat = name.startswith("dinat_s_"), len(ROWS[name].depths) == 1
    width = row.width

    def both(module: str, *weight: int) -> None:
        shapes[f"{module}.weight"] = weight
        shapes[f"{module}.bias"] = weight[:1]

    if swin or flat:
        both("patch_embed.proj", width, 3, *((4, 4) if swin else (16, 16)))
    else:
        both("patch_embed.proj.0", width // 2, 3, 3, 3)
        both("patch_embed.proj.1", width, width // 2, 3, 3)
    both("patch_embed.norm", width)
    for i, depth in enumerate(depths or row.depths):
        d, stage = width * 2**i, f"{'layers' if swin else 'levels'}.{i}"
        for j in range(depth):
            block = f"layers.{j}" if flat else f"{stage}.blocks.{j}"
            both(f"{block}.norm1", d)
            both(f"{block}.norm2", d)
            shapes[f"{block}.attn.rpb"] = (row.heads[i], 2 * row.kernel - 1, 2 * row.kernel - 1)
            both(f"{block}.attn.qkv", 3 * d, d)
            both(f"{block}.attn.proj", d, d)
            both(f"{block}.mlp.fc1", row.ratio * d, d)
            both(f"{block}.mlp.fc2", d, row.ratio * d)
            if row.scaled:
                shapes[f"{block}.gamma1"] = shapes[f"{block}.gamma2"] = (d,)
        if i < len(row.depths) - 1:
            shapes[f"{stage}.downsample.reduction.weight"] = (2 * d, 4 * d) if swin else (2 * d, d, 3, 3)
            both(f"{stage}.downsample.norm", 4 * d if swin else 2 * d)
    last = width * 2 ** (len(row.depths) - 1)
    both("norm", last)
    both("head", 1000, last)
    return shapes
