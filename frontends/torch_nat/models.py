"""The hierarchical NAT: classification and feature maps, exactly as the published checkpoints need it.

Source: Hassani et al., "Neighborhood Attention Transformer" (CVPR 2023) and its published code. Maps
are channels-last between the convolutions; parameter names are the published ones.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from natcore.models import NATConfig, model_config
from torch_nat.layers import DropPath, NeighborhoodAttention2D


class ConvTokenizer(nn.Module):
    """Two 3x3 convolutions of stride 2: images ``[B, in_chans, H, W]`` to maps ``[B, ~H/4, ~W/4, C]``."""

    def __init__(self, in_chans: int, embed_dim: int):
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, embed_dim // 2, kernel_size=3, stride=2, padding=1),
            nn.Conv2d(embed_dim // 2, embed_dim, kernel_size=3, stride=2, padding=1),
        )
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class ConvDownsampler(nn.Module):
    """One 3x3 convolution of stride 2, without bias: ``[B, H, W, C]`` to ``[B, ~H/2, ~W/2, 2C]``."""

    def __init__(self, dim: int):
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, kernel_size=3, stride=2, padding=1, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class Mlp(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, dim: int, hidden: int, drop: float):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class NATBlock(nn.Module):
    """x += drop_path(gamma1 * attention(norm1(x))); x += drop_path(gamma2 * mlp(norm2(x)))."""

    def __init__(self, config: NATConfig, stage: int, block: int):
        super().__init__()
        dim = config.width(stage)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = NeighborhoodAttention2D(
            dim,
            config.num_heads[stage],
            config.kernel_size,
            dilation=config.dilation(stage, block),
            rel_pos_bias=config.rel_pos_bias,
            qkv_bias=config.qkv_bias,
            proj_drop=config.drop_rate,
        )
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio), config.drop_rate)
        self.drop_path = DropPath(config.drop_path(stage, block))
        if config.layer_scale is None:
            self.gamma1 = self.gamma2 = None
        else:
            self.gamma1, self.gamma2 = (nn.Parameter(torch.full((dim,), config.layer_scale)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(_scaled(self._attend(self.norm1(x)), self.gamma1))
        return x + self.drop_path(_scaled(self.mlp(self.norm2(x)), self.gamma2))

    def _attend(self, x: Tensor) -> Tensor:
        """The published models pad a map that is smaller than the window with zeros, right and bottom.

        The padding comes after the norm and before the qkv projection, is attended to like any other
        token (its keys are the projection's bias), and is cut off afterwards.
        """
        height, width = x.shape[1:3]
        window = self.attn.window
        reach = [k * d for k, d in zip(window.kernel_size, window.dilation, strict=True)]
        bottom, right = max(reach[0] - height, 0), max(reach[1] - width, 0)
        if not bottom and not right:
            return self.attn(x)
        return self.attn(F.pad(x, (0, 0, 0, right, 0, bottom)))[:, :height, :width]


def _scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
    return x if gamma is None else gamma * x


class NATStage(nn.Module):
    """Blocks at one resolution and, but for the last stage, the way to the next."""

    def __init__(self, config: NATConfig, stage: int):
        super().__init__()
        self.blocks = nn.ModuleList(NATBlock(config, stage, block) for block in range(config.depths[stage]))
        last = stage == len(config.depths) - 1
        self.downsample = None if last else ConvDownsampler(config.width(stage))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The map before downsampling, and the next stage's input (the same for the last stage)."""
        for block in self.blocks:
            x = block(x)
        return x, x if self.downsample is None else self.downsample(x)


class NAT(nn.Module):
    """A hierarchical NAT for images ``[batch, in_chans, height, width]``.

    Returns logits ``[batch, num_classes]``; with ``num_classes=0`` the pooled features
    ``[batch, width of the last stage]``; with ``features_only`` one normed map per stage,
    ``[batch, embed_dim * 2**i, ~height / 2**(i + 2), ~width / 2**(i + 2)]``.
    """

    def __init__(self, config: NATConfig):
        super().__init__()
        self.config = config
        stages = len(config.depths)
        self.patch_embed = ConvTokenizer(config.in_chans, config.embed_dim)
        self.pos_drop = nn.Dropout(config.drop_rate)
        self.levels = nn.ModuleList(NATStage(config, stage) for stage in range(stages))
        if config.features_only:
            for stage in range(stages):
                self.add_module(f"norm{stage}", nn.LayerNorm(config.width(stage)))
        else:
            width = config.width(stages - 1)
            self.norm = nn.LayerNorm(width)
            self.head = nn.Linear(width, config.num_classes) if config.num_classes else nn.Identity()
        self.apply(_initialize)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        if x.dim() != 4 or x.shape[1] != self.config.in_chans:
            raise ValueError(
                f"images have shape {tuple(x.shape)}; expected [batch, {self.config.in_chans}, height, width]."
            )
        x = self.pos_drop(self.patch_embed(x))
        maps: list[Tensor] = []
        for stage, level in enumerate(self.levels):
            before, x = level(x)
            if self.config.features_only:
                norm = self.get_submodule(f"norm{stage}")
                maps.append(norm(before).permute(0, 3, 1, 2).contiguous())
        return maps if self.config.features_only else self.head(self.norm(x).mean(dim=(1, 2)))


def _initialize(module: nn.Module) -> None:
    """Linear layers: truncated normal of std 0.02, bias 0. Norms and convolutions keep torch's defaults."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def create_model(name: str, **changes: object) -> NAT:
    """A published variant by name (nat_mini, nat_tiny, nat_small, nat_base), freshly initialised.

    ``changes`` are fields of `natcore.models.NATConfig`: ``num_classes`` (0: pooled features),
    ``features_only``, ``drop_path_rate``, and so on. Raises ValueError for an unknown name.
    """
    return NAT(model_config(name, **changes))
