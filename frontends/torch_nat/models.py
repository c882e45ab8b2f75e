"""The NAT family: classification and feature maps, exactly as the published checkpoints need it.

Sources: Hassani et al., "Neighborhood Attention Transformer" (CVPR 2023); Hassani and Shi, "Dilated
Neighborhood Attention Transformer" (arXiv 2209.15001); their published code. Maps are channels-last
between the convolutions; parameter names are the published ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from natcore.models import NATConfig, model_config
from torch_nat import ahead
from torch_nat.casting import autocast_dtype, with_cast_weights
from torch_nat.layers import DropPath, NeighborhoodAttention2D, drop_path_factors
from torch_nat.recomputation import recomputed, recomputing
from torch_nat.token_sums import apply_linear, apply_norm, with_tables


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
        return self.norm(self.proj(_channels_last(x)).permute(0, 2, 3, 1))


def _channels_last(images: Tensor) -> Tensor:
    """Images ``[B, C, H, W]`` as they lie from here on: nothing then turns a map around, neither convolutions nor the
    norm after them. torch.compile leaves layouts alone in graphs of so few convolutions."""
    return images.contiguous(memory_format=torch.channels_last)


class ConvDownsampler(nn.Module):
    """One 3x3 convolution of stride 2, without bias: ``[B, H, W, C]`` to ``[B, ~H/2, ~W/2, 2C]``."""

    def __init__(self, dim: int):
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, kernel_size=3, stride=2, padding=1, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class PatchEmbed(nn.Module):
    """One convolution over patches that do not overlap: images ``[B, in_chans, H, W]`` to ``[B, H/p, W/p, C]``.

    Images that are no multiple of the patch get zeros, right and bottom.
    """

    def __init__(self, in_chans: int, embed_dim: int, patch_size: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        bottom, right = (-extent % self.patch_size for extent in x.shape[2:])
        if bottom or right:
            x = F.pad(x, (0, right, 0, bottom))
        return self.norm(self.proj(_channels_last(x)).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """Swin's: 2x2 tokens side by side in one, norm, linear: ``[B, H, W, C]`` to ``[B, H/2, W/2, 2C]``.

    Odd maps get zeros, right and bottom. Channels come in the order (0, 0), (1, 0), (0, 1), (1, 1) of
    (row, column).
    """

    def __init__(self, dim: int):
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        bottom, right = (extent % 2 for extent in x.shape[1:3])
        if bottom or right:
            x = F.pad(x, (0, 0, 0, right, 0, bottom))
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # [B, H/2, row, W/2, column, C]
        return self.reduction(self.norm(x.permute(0, 1, 3, 4, 2, 5).flatten(3)))


class Mlp(nn.Module):
    """Linear, exact GELU, linear.

    In training without dropout, GELU's output, the largest map of a block, is not kept for the backward pass, which
    computes it again from GELU's input (`recomputation`).
    """

    def __init__(self, dim: int, hidden: int, drop: float):
        super().__init__()
        self.fc1 = with_tables(nn.Linear(dim, hidden))
        self.act = nn.GELU()
        self.fc2 = with_tables(nn.Linear(hidden, dim))
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = apply_linear(self.fc1, x)
        if self.training and not self.drop.p:
            return recomputing(self.act, partial(apply_linear, self.fc2), x)
        return self.drop(apply_linear(self.fc2, self.drop(self.act(x))))


class NATBlock(nn.Module):
    """x += drop_path(gamma1 * attention(norm1(x))); x += drop_path(gamma2 * mlp(norm2(x)))."""

    def __init__(self, config: NATConfig, stage: int, block: int):
        super().__init__()
        dim = config.width(stage)
        self.config = config
        self.norm1 = with_tables(nn.LayerNorm(dim))
        self.attn = NeighborhoodAttention2D(
            dim,
            config.num_heads[stage],
            config.kernel_size,
            dilation=config.dilation(stage, block),
            rel_pos_bias=config.rel_pos_bias,
            qkv_bias=config.qkv_bias,
            proj_drop=config.drop_rate,
        )
        self.norm2 = with_tables(nn.LayerNorm(dim))
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio), config.drop_rate)
        self.drop_path = DropPath(config.drop_path(stage, block))
        if config.layer_scale is None:
            self.gamma1 = self.gamma2 = None
        else:
            self.gamma1, self.gamma2 = (nn.Parameter(torch.full((dim,), config.layer_scale)) for _ in range(2))

    def forward(self, x: Tensor, factors: Sequence[Tensor] | Tensor | None = None) -> Tensor:
        """``factors`` of samples in each of the two branches (`layers.DropPath`); drawn if not given."""
        of_attention, of_mlp = (None, None) if factors is None else factors
        x = x + self.drop_path(_scaled(self._attend(apply_norm(self.norm1, x)), self.gamma1), of_attention)
        return x + self.drop_path(_scaled(self.mlp(apply_norm(self.norm2, x)), self.gamma2), of_mlp)

    def branch_dtype(self, x: Tensor) -> torch.dtype:
        """Of what is added to x."""
        dtype = autocast_dtype(x) or x.dtype
        return dtype if self.gamma1 is None else torch.promote_types(dtype, self.gamma1.dtype)

    def _attend(self, x: Tensor) -> Tensor:
        """The published models pad a map that is smaller than the window with zeros, right and bottom.

        The padding comes after the norm and before the qkv projection, is attended to like any other
        token (its keys are the projection's bias), and is cut off afterwards.
        """
        height, width = x.shape[1:3]
        bottom, right = (self.config.padding(n, self.attn.window.dilation[0]) for n in (height, width))
        if not bottom and not right:
            return self.attn(x)
        return self.attn(F.pad(x, (0, 0, 0, right, 0, bottom)))[:, :height, :width]


def _scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
    return x if gamma is None else gamma * x


def _through(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    """One block after the other. Which samples their branches drop is drawn for all of them at once."""
    drawn = {at: block for at, block in enumerate(blocks) if isinstance(block, NATBlock) and block.drop_path.rate}
    factors: dict[int, Tensor] = {}
    if drawn and blocks.training:
        rates, dtype = [block.drop_path.rate for block in drawn.values()], next(iter(drawn.values())).branch_dtype(x)
        numbers = torch.rand(len(rates), 2, x.shape[0], device=x.device)
        factors = dict(zip(drawn, recomputed(partial(drop_path_factors, rates, dtype), numbers), strict=True))
    for at, block in enumerate(blocks):
        x = block(x, factors[at]) if at in factors else block(x)
    return x


class NATStage(nn.Module):
    """Blocks at one resolution and, but for the last stage, the way to the next."""

    def __init__(self, config: NATConfig, stage: int):
        super().__init__()
        self.blocks = nn.ModuleList(NATBlock(config, stage, block) for block in range(config.depths[stage]))
        last = stage == len(config.depths) - 1
        downsampler = ConvDownsampler if config.layout == "nat" else PatchMerging
        self.downsample = None if last else downsampler(config.width(stage))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The map before downsampling, and the next stage's input (the same for the last stage)."""
        x = _through(self.blocks, x)
        return x, x if self.downsample is None else self.downsample(x)


class FlatStage(nn.ModuleList):
    """The blocks of a model that has one stage, without a name of their own among the parameters."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The map, twice: see NATStage."""
        x = _through(self, x)
        return x, x


class NAT(nn.Module):
    """A model of the NAT family for images ``[batch, in_chans, height, width]``.

    Returns logits ``[batch, num_classes]``; with ``num_classes=0`` the pooled features
    ``[batch, width of the last stage]``; with ``features_only`` one normed map per stage,
    ``[batch, embed_dim * 2**i, ~height / (p * 2**i), ~width / (p * 2**i)]``, p the config's patch_size.

    Compiles with ``fullgraph=True``; ``mode="reduce-overhead"`` (CUDA graphs) keeps the GPU busy where the host is slow
    or the batch small.

    State dicts have the published names. A ViT-rpb's published buffer ``relative_position_index`` may be
    among them: it is checked and dropped (`torch_nat.published_state_dict` gives it back).
    """

    def __init__(self, config: NATConfig):
        super().__init__()
        self.config = config
        self.patch_embed = (
            ConvTokenizer(config.in_chans, config.embed_dim)
            if config.layout == "nat"
            else PatchEmbed(config.in_chans, config.embed_dim, config.patch_size)
        )
        self.pos_drop = nn.Dropout(config.drop_rate)
        stages = range(len(config.depths))
        trunk = (
            FlatStage(NATBlock(config, 0, block) for block in range(config.depths[0]))
            if config.flat
            else nn.ModuleList(NATStage(config, stage) for stage in stages)
        )
        self.add_module(config.trunk_name, trunk)
        if config.features_only:
            for stage in stages:
                self.add_module(f"norm{stage}", nn.LayerNorm(config.width(stage)))
        else:
            width = config.width(stages[-1])
            self.norm = nn.LayerNorm(width)
            self.head = nn.Linear(width, config.num_classes) if config.num_classes else nn.Identity()
        if config.layout == "vit_rpb":
            self.register_load_state_dict_pre_hook(_drop_relative_position_index)
        self.apply(_initialize)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        if x.dim() != 4 or x.shape[1] != self.config.in_chans:
            raise ValueError(
                f"images have shape {tuple(x.shape)}; expected [batch, {self.config.in_chans}, height, width]."
            )
        if not torch.compiler.is_compiling():
            ahead.prepare(self.config, self.patch_embed.norm.weight, x)
        x = self.pos_drop(self.patch_embed(x))
        maps: list[Tensor] = []
        for stage in range(len(self.config.depths)):
            before, x = with_cast_weights(self.get_submodule(self.config.stage_name(stage)), x)
            if self.config.features_only:
                norm = self.get_submodule(f"norm{stage}")
                maps.append(norm(before).permute(0, 3, 1, 2).contiguous())
        return maps if self.config.features_only else self.head(self.norm(x).mean(dim=(1, 2)))


def relative_position_index(side: int) -> Tensor:
    """ViT-rpb's published buffer ``[side**2, side**2]``: the place in a flat table of query i's bias for key j.

    It is the rule of every bias table here: key minus query, plus side - 1, per axis.
    """
    row, column = (at.flatten() for at in torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"))
    rows, columns = (at[None, :] - at[:, None] + side - 1 for at in (row, column))
    return rows * (2 * side - 1) + columns


def _drop_relative_position_index(module: nn.Module, state: dict, prefix: str, *args: object) -> None:
    """A load_state_dict pre-hook. Raises ValueError for an index by which the tables would mean something else."""
    config: NATConfig = module.config  # type: ignore[assignment]
    for block in range(config.depths[0]):
        name = f"{prefix}{config.block_name(0, block)}.attn.relative_position_index"
        if name not in state:
            continue
        index, expected = state.pop(name), relative_position_index(config.kernel_size)
        if not torch.equal(index.cpu(), expected):
            raise ValueError(
                f"{name} {tuple(index.shape)} is not key minus query on a map of {config.kernel_size} x "
                f"{config.kernel_size} {tuple(expected.shape)}: its tables do not fit this model."
            )


def _initialize(module: nn.Module) -> None:
    """Linear layers: truncated normal of std 0.02, bias 0. Norms and convolutions keep torch's defaults."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def create_model(name: str, **changes: object) -> NAT:
    """A published variant by name (`natcore.models.MODELS`: nat_tiny, dinat_s_base, ...), freshly initialised.

    ``changes`` are fields of `natcore.models.NATConfig`: ``num_classes`` (0: pooled features),
    ``features_only``, ``drop_path_rate``, and so on. Raises ValueError for an unknown name.
    """
    return NAT(model_config(name, **changes))
