"""The parts of NAT for transformers, with the parameter names of transformers 4. Maps are channels last.

Source: Hassani et al., "Neighborhood Attention Transformer" (CVPR 2023).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from torch_nat.compat import dinat
from torch_nat.hf.configuration import NatConfig
from torch_nat.layers import DropPath
from torch_nat.models import ConvDownsampler

Maps = tuple[Tensor, ...]


class NatPatchEmbeddings(nn.Module):
    """Two 3x3 convolutions of stride 2: images ``[B, C, H, W]`` to maps ``[B, ~H/4, ~W/4, embed_dim]``."""

    def __init__(self, config: NatConfig):
        super().__init__()
        self.num_channels, half = config.num_channels, config.embed_dim // 2
        self.projection = nn.Sequential(
            nn.Conv2d(config.num_channels, half, kernel_size=3, stride=2, padding=1),
            nn.Conv2d(half, config.embed_dim, kernel_size=3, stride=2, padding=1),
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        if pixel_values.dim() != 4 or pixel_values.shape[1] != self.num_channels:
            raise ValueError(
                f"pixel_values is {tuple(pixel_values.shape)}; expected [batch, {self.num_channels}, H, W]."
            )
        return self.projection(pixel_values).permute(0, 2, 3, 1)


class NatEmbeddings(nn.Module):
    """Patches, norm, dropout."""

    def __init__(self, config: NatConfig):
        super().__init__()
        self.patch_embeddings = NatPatchEmbeddings(config)
        self.norm = nn.LayerNorm(config.embed_dim)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.dropout(self.norm(self.patch_embeddings(pixel_values)))


class NatSelfAttention(nn.Module):
    """Neighbourhood attention between three projections."""

    def __init__(self, config: NatConfig, dim: int, num_heads: int):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"width {dim} is not divisible by {num_heads} heads.")
        self.num_attention_heads, self.attention_head_size = num_heads, dim // num_heads
        self.kernel_size, self.dilation = config.kernel_size, 1
        self.rpb = nn.Parameter(torch.zeros(num_heads, 2 * self.kernel_size - 1, 2 * self.kernel_size - 1))
        self.query, self.key, self.value = (nn.Linear(dim, dim, bias=config.qkv_bias) for _ in range(3))
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def forward(self, hidden_states: Tensor, output_attentions: bool = False) -> tuple[Tensor, ...]:
        return dinat.forward(self, hidden_states, output_attentions)


class NatProjection(nn.Module):
    """A linear layer and dropout."""

    def __init__(self, inputs: int, outputs: int, dropout: float):
        super().__init__()
        self.dense = nn.Linear(inputs, outputs)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.dense(x))


class NatAttention(nn.Module):
    """Self attention and the output projection."""

    def __init__(self, config: NatConfig, dim: int, num_heads: int):
        super().__init__()
        self.self = NatSelfAttention(config, dim, num_heads)
        self.output = NatProjection(dim, dim, config.attention_probs_dropout_prob)

    def forward(self, x: Tensor, output_attentions: bool) -> tuple[Tensor, Tensor | None]:
        out, *weights = self.self(x, output_attentions)
        return self.output(out), weights[0] if weights else None


class NatIntermediate(nn.Module):
    """The first half of the MLP."""

    def __init__(self, config: NatConfig, dim: int):
        super().__init__()
        self.dense = nn.Linear(dim, int(dim * config.mlp_ratio))
        self.intermediate_act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.intermediate_act_fn(self.dense(x))


class NatLayer(nn.Module):
    """x += scale * attention(norm(x)); x += scale * mlp(norm(x)).

    A map that is smaller than the window is padded with zeros after the norm, right and bottom.
    """

    def __init__(self, config: NatConfig, dim: int, num_heads: int, drop_path: float):
        super().__init__()
        self.kernel_size = config.kernel_size
        self.layernorm_before = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.attention = NatAttention(config, dim, num_heads)
        self.drop_path = DropPath(drop_path)
        self.layernorm_after = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.intermediate = NatIntermediate(config, dim)
        self.output = NatProjection(int(dim * config.mlp_ratio), dim, config.hidden_dropout_prob)
        self.layer_scale_parameters = None
        if config.layer_scale_init_value > 0:
            self.layer_scale_parameters = nn.Parameter(torch.full((2, dim), config.layer_scale_init_value))

    def forward(self, x: Tensor, output_attentions: bool) -> tuple[Tensor, Tensor | None]:
        height, width = x.shape[1:3]
        bottom, right = (max(self.kernel_size - extent, 0) for extent in (height, width))
        normed = F.pad(self.layernorm_before(x), (0, 0, 0, right, 0, bottom))
        attended, weights = self.attention(normed, output_attentions)
        x = x + self.drop_path(self._scaled(0, attended[:, :height, :width]))
        mlp = self.output(self.intermediate(self.layernorm_after(x)))
        return x + self.drop_path(self._scaled(1, mlp)), weights

    def _scaled(self, branch: int, x: Tensor) -> Tensor:
        return x if self.layer_scale_parameters is None else self.layer_scale_parameters[branch] * x


class NatStage(nn.Module):
    """Blocks at one resolution and, but for the last stage, the way to the next."""

    def __init__(self, config: NatConfig, stage: int):
        super().__init__()
        dim, first, total = config.embed_dim * 2**stage, sum(config.depths[:stage]), sum(config.depths)
        rates = [config.drop_path_rate * (first + i) / max(total - 1, 1) for i in range(config.depths[stage])]
        self.layers = nn.ModuleList(NatLayer(config, dim, config.num_heads[stage], rate) for rate in rates)
        self.downsample = ConvDownsampler(dim) if stage < len(config.depths) - 1 else None

    def forward(self, x: Tensor, output_attentions: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """The next stage's input, the map before downsampling, the last block's weights."""
        weights = None
        for at, layer in enumerate(self.layers):
            x, weights = layer(x, output_attentions and at == len(self.layers) - 1)
        return x if self.downsample is None else self.downsample(x), x, weights


class NatEncoder(nn.Module):
    """All stages."""

    def __init__(self, config: NatConfig):
        super().__init__()
        self.levels = nn.ModuleList(NatStage(config, stage) for stage in range(len(config.depths)))

    def forward(self, x: Tensor, output_attentions: bool) -> tuple[Tensor, Maps, Maps, Maps]:
        """The last map; the embedding with each stage's output, and with each map before downsampling; weights."""
        after, before, attentions = [x], [x], []
        for level in self.levels:
            x, undownsampled, weights = level(x, output_attentions)
            after.append(x)
            before.append(undownsampled)
            attentions.append(weights)
        return x, tuple(after), tuple(before), tuple(attentions)
