"""The NAT family in flax.nnx: the same models, number for number, as torch_nat's.

Sources: Hassani et al., "Neighborhood Attention Transformer" (CVPR 2023); Hassani and Shi, "Dilated
Neighborhood Attention Transformer" (arXiv 2209.15001); their published code.
Everything is channels-last. Attribute names are the published parameter names, so that files need no
table of names. Where flax's defaults differ from the published model (epsilon and variance of norms,
padding of convolutions, GELU, initialisation), the published model is followed.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jax_nat.layers import NeighborhoodAttention2D, dropout, published_init
from natcore.models import NATConfig, model_config

_conv_init = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # torch's: U(+-fan_in ** -0.5)


def _conv_bias_init(fan_in: int) -> Any:
    def init(key: jax.Array, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None) -> jax.Array:
        bound = fan_in**-0.5
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def _norm(width: int, dtype: Any, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(width, epsilon=1e-5, use_fast_variance=False, dtype=dtype, rngs=rngs)


def _conv(inputs: int, outputs: int, use_bias: bool, dtype: Any, rngs: nnx.Rngs, patch: int = 0) -> nnx.Conv:
    """3x3, stride 2, one pixel of padding on every side (SAME would pad even sizes on one side only).

    With ``patch``, over patches of that side that do not overlap.
    """
    side = patch or 3
    return nnx.Conv(
        inputs,
        outputs,
        (side, side),
        strides=patch or 2,
        padding="VALID" if patch else ((1, 1), (1, 1)),
        use_bias=use_bias,
        kernel_init=_conv_init,
        bias_init=_conv_bias_init(side * side * inputs),
        dtype=dtype,
        rngs=rngs,
    )


class ConvTokenizer(nnx.Module):
    """Two 3x3 convolutions of stride 2: images ``[B, H, W, in_chans]`` to maps ``[B, ~H/4, ~W/4, C]``."""

    def __init__(self, in_chans: int, embed_dim: int, dtype: Any, rngs: nnx.Rngs) -> None:
        self.proj = nnx.List(
            [_conv(in_chans, embed_dim // 2, True, dtype, rngs), _conv(embed_dim // 2, embed_dim, True, dtype, rngs)]
        )
        self.norm = _norm(embed_dim, dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for conv in self.proj:
            x = conv(x)
        return self.norm(x)


class ConvDownsampler(nnx.Module):
    """One 3x3 convolution of stride 2, without bias: ``[B, H, W, C]`` to ``[B, ~H/2, ~W/2, 2C]``."""

    def __init__(self, width: int, dtype: Any, rngs: nnx.Rngs) -> None:
        self.reduction = _conv(width, 2 * width, False, dtype, rngs)
        self.norm = _norm(2 * width, dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(self.reduction(x))


class PatchEmbed(nnx.Module):
    """One convolution over patches that do not overlap: images ``[B, H, W, in_chans]`` to ``[B, H/p, W/p, C]``.

    Images that are no multiple of the patch get zeros, right and bottom.
    """

    def __init__(self, in_chans: int, embed_dim: int, patch_size: int, dtype: Any, rngs: nnx.Rngs) -> None:
        self.patch_size = patch_size
        self.proj = _conv(in_chans, embed_dim, True, dtype, rngs, patch=patch_size)
        self.norm = _norm(embed_dim, dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        bottom, right = (-extent % self.patch_size for extent in x.shape[1:3])
        return self.norm(self.proj(_padded(x, bottom, right)))


class PatchMerging(nnx.Module):
    """Swin's: 2x2 tokens side by side in one, norm, linear: ``[B, H, W, C]`` to ``[B, H/2, W/2, 2C]``.

    Odd maps get zeros, right and bottom. Channels come in the order (0, 0), (1, 0), (0, 1), (1, 1) of
    (row, column).
    """

    def __init__(self, width: int, dtype: Any, rngs: nnx.Rngs) -> None:
        self.reduction = nnx.Linear(
            4 * width, 2 * width, use_bias=False, kernel_init=published_init, dtype=dtype, rngs=rngs
        )
        self.norm = _norm(4 * width, dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = _padded(x, *(extent % 2 for extent in x.shape[1:3]))
        batch, height, width, channels = x.shape
        x = x.reshape(batch, height // 2, 2, width // 2, 2, channels).transpose(0, 1, 3, 4, 2, 5)
        return self.reduction(self.norm(x.reshape(batch, height // 2, width // 2, 4 * channels)))


def _padded(x: jax.Array, bottom: int, right: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, bottom), (0, right), (0, 0))) if bottom or right else x


def _gelu(x: jax.Array) -> jax.Array:
    """The exact GELU, x / 2 * (1 + erf(x / sqrt 2)), rounded to x's dtype once, at the end.

    As torch computes it. `jax.nn.gelu` goes through erfc, of which XLA makes a long polynomial with divisions, and
    rounds erfc's argument to x's dtype, on a GPU in a kernel of its own.
    """
    y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (0.5 * y * (1 + jax.lax.erf(y * 0.5**0.5))).astype(x.dtype)


class Mlp(nnx.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, width: int, hidden: int, drop: float, dtype: Any, rngs: nnx.Rngs) -> None:
        linear = partial(nnx.Linear, kernel_init=published_init, dtype=dtype, rngs=rngs)
        self.fc1 = linear(width, hidden)
        self.fc2 = linear(hidden, width)
        self.drop = dropout(drop, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.drop(self.fc2(self.drop(_gelu(self.fc1(x)))))


class NATBlock(nnx.Module):
    """x += drop_path(gamma1 * attention(norm1(x))); x += drop_path(gamma2 * mlp(norm2(x)))."""

    def __init__(self, config: NATConfig, stage: int, block: int, dtype: Any, rngs: nnx.Rngs) -> None:
        width = config.width(stage)
        self.config = config
        self.norm1 = _norm(width, dtype, rngs)
        self.attn = NeighborhoodAttention2D(
            width,
            config.num_heads[stage],
            config.kernel_size,
            dilation=config.dilation(stage, block),
            rel_pos_bias=config.rel_pos_bias,
            qkv_bias=config.qkv_bias,
            proj_drop=config.drop_rate,
            dtype=dtype,
            rngs=rngs,
        )
        self.norm2 = _norm(width, dtype, rngs)
        self.mlp = Mlp(width, int(width * config.mlp_ratio), config.drop_rate, dtype, rngs)
        # Stochastic depth (Huang et al., 2016): one draw for all of a sample's branch.
        self.drop_path = dropout(config.drop_path(stage, block), rngs, broadcast_dims=(1, 2, 3))
        scale = config.layer_scale
        self.gamma1, self.gamma2 = (
            None if scale is None else nnx.Param(jnp.full((width,), scale, jnp.float32)) for _ in range(2)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.drop_path(_scaled(self._attend(self.norm1(x)), self.gamma1))
        return x + self.drop_path(_scaled(self.mlp(self.norm2(x)), self.gamma2))

    def _attend(self, x: jax.Array) -> jax.Array:
        """The published models pad a map that is smaller than the window with zeros, right and bottom.

        The padding comes after the norm and before the qkv projection, is attended to like any other
        token (its keys are the projection's bias), and is cut off afterwards.
        """
        height, width = x.shape[1:3]
        bottom, right = (self.config.padding(n, self.attn.window.dilation[0]) for n in (height, width))
        return self.attn(_padded(x, bottom, right))[:, :height, :width]


def _scaled(x: jax.Array, gamma: nnx.Param | None) -> jax.Array:
    return x if gamma is None else gamma[...].astype(x.dtype) * x


class NATStage(nnx.Module):
    """Blocks at one resolution and, but for the last stage, the way to the next."""

    def __init__(self, config: NATConfig, stage: int, dtype: Any, rngs: nnx.Rngs) -> None:
        self.blocks = nnx.List([NATBlock(config, stage, block, dtype, rngs) for block in range(config.depths[stage])])
        last = stage == len(config.depths) - 1
        downsampler = ConvDownsampler if config.layout == "nat" else PatchMerging
        self.downsample = None if last else downsampler(config.width(stage), dtype, rngs)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The map before downsampling, and the next stage's input (the same for the last stage)."""
        for block in self.blocks:
            x = block(x)
        return x, x if self.downsample is None else self.downsample(x)


class NAT(nnx.Module):
    """A model of the NAT family for images ``[batch, height, width, in_chans]``.

    Returns logits ``[batch, num_classes]``; with ``num_classes=0`` the pooled features
    ``[batch, width of the last stage]``; with ``features_only`` one normed map per stage,
    ``[batch, ~height / (p * 2**i), ~width / (p * 2**i), embed_dim * 2**i]``, p the config's patch_size.

    ``dtype`` is that of the computation (parameters are float32); by default, the promoted dtype of
    images and parameters.
    """

    def __init__(self, config: NATConfig, *, dtype: Any = None, rngs: nnx.Rngs) -> None:
        self.config = config
        stages = len(config.depths)
        self.patch_embed = (
            ConvTokenizer(config.in_chans, config.embed_dim, dtype, rngs)
            if config.layout == "nat"
            else PatchEmbed(config.in_chans, config.embed_dim, config.patch_size, dtype, rngs)
        )
        self.pos_drop = dropout(config.drop_rate, rngs)
        trunk = (
            [NATBlock(config, 0, block, dtype, rngs) for block in range(config.depths[0])]
            if config.flat
            else [NATStage(config, stage, dtype, rngs) for stage in range(stages)]
        )
        setattr(self, config.trunk_name, nnx.List(trunk))
        if config.features_only:
            for stage in range(stages):
                setattr(self, f"norm{stage}", _norm(config.width(stage), dtype, rngs))
            return
        width = config.width(stages - 1)
        self.norm = _norm(width, dtype, rngs)
        head = partial(nnx.Linear, kernel_init=published_init, dtype=dtype, rngs=rngs)
        self.head = head(width, config.num_classes) if config.num_classes else None

    def __call__(self, images: jax.Array) -> jax.Array | list[jax.Array]:
        if images.ndim != 4 or images.shape[-1] != self.config.in_chans:
            raise ValueError(
                f"images have shape {images.shape}; expected [batch, height, width, {self.config.in_chans}]."
            )
        x = self.pos_drop(self.patch_embed(images))
        maps = []
        for stage in range(len(self.config.depths)):
            before, x = self._stage(stage, x)
            if self.config.features_only:
                maps.append(getattr(self, f"norm{stage}")(before))
        if self.config.features_only:
            return maps
        pooled = self.norm(x).mean(axis=(1, 2))
        return pooled if self.head is None else self.head(pooled)

    def _stage(self, stage: int, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The map before downsampling, and the next stage's input."""
        trunk = getattr(self, self.config.trunk_name)
        if not self.config.flat:
            return trunk[stage](x)
        for block in trunk:
            x = block(x)
        return x, x


def create_model(name: str, *, dtype: Any = None, rngs: nnx.Rngs, **changes: object) -> NAT:
    """A published variant by name (`natcore.models.MODELS`: nat_tiny, dinat_s_base, ...), freshly initialised.

    ``changes`` are fields of `natcore.models.NATConfig`: ``num_classes`` (0: pooled features),
    ``features_only``, ``drop_path_rate``, and so on. Raises ValueError for an unknown name.
    """
    return NAT(model_config(name, **changes), dtype=dtype, rngs=rngs)
