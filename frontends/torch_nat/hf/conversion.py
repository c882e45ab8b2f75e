"""Between torch_nat's NAT and the Nat and Dinat of transformers, bit by bit, in both directions."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from natcore.models import NATConfig
from torch_nat.hf.configuration import NatConfig
from torch_nat.models import NAT

#: Published names and transformers' names of what a block holds one to one.
_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.rpb": "attention.self.rpb",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_STEM = {"patch_embed.proj": "embeddings.patch_embeddings.projection", "patch_embed.norm": "embeddings.norm"}
_QKV = ("query", "key", "value")
#: What transformers' Nat and Dinat can express; any other field must have its default.
_SHARED = ("embed_dim", "depths", "num_heads", "mlp_ratio", "drop_path_rate", "layer_scale", "kernel_size")
_SHARED += ("dilations", "qkv_bias", "in_chans", "num_classes", "features_only")


def parameters_to_huggingface(parameters: Mapping[str, Tensor], prefix: str = "nat") -> dict[str, Tensor]:
    """Published names to transformers' names: qkv is split, gamma1 and gamma2 are stacked.

    ``prefix``: "nat" or "dinat" for classification; "" for a backbone or a bare model.
    """
    body = f"{prefix}." if prefix else ""
    renamed: dict[str, Tensor] = {}
    for name, tensor in parameters.items():
        block = re.fullmatch(r"levels\.(\d+)\.blocks\.(\d+)\.(.+)", name)
        if block:
            stage, layer, rest = block.groups()
            place = f"{body}encoder.levels.{stage}.layers.{layer}."
            renamed |= {place + part: t for part, t in _block_to_huggingface(name, rest, tensor, parameters).items()}
        elif name.startswith("head."):
            renamed[name.replace("head", "classifier")] = tensor
        else:
            renamed[body + _outside_to_huggingface(name)] = tensor
    return renamed


def _block_to_huggingface(name: str, rest: str, tensor: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if rest.startswith("attn.qkv."):
        kind = rest.removeprefix("attn.qkv.")
        thirds = tensor.chunk(3)
        return {f"attention.self.{part}.{kind}": third.clone() for part, third in zip(_QKV, thirds, strict=True)}
    if rest == "gamma1":
        return {"layer_scale_parameters": torch.stack([tensor, parameters[name[:-1] + "2"]])}
    if rest == "gamma2":
        return {}
    for ours, theirs in _BLOCK.items():
        if rest == ours or rest.startswith(ours + "."):
            return {theirs + rest.removeprefix(ours): tensor}
    raise ValueError(f"{name} is no parameter of a NAT.")


def _outside_to_huggingface(name: str) -> str:
    for ours, theirs in _STEM.items():
        if name.startswith(ours + "."):
            return theirs + name.removeprefix(ours)
    if re.fullmatch(r"levels\.\d+\.downsample\..+", name):
        return "encoder." + name
    if re.fullmatch(r"norm\d+\..+", name):  # of a backbone's stages, which transformers counts from 1
        stage, _, kind = name.removeprefix("norm").partition(".")
        return f"hidden_states_norms.stage{int(stage) + 1}.{kind}"
    if name.startswith("norm."):
        return "layernorm." + name.removeprefix("norm.")
    raise ValueError(f"{name} is no parameter of a NAT.")


def parameters_from_huggingface(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Transformers' names, with or without a prefix, to the published ones: the inverse, bit by bit."""
    bare = {re.sub(r"^(nat|dinat)\.", "", name): tensor for name, tensor in parameters.items()}
    renamed: dict[str, Tensor] = {}
    for name, tensor in bare.items():
        block = re.fullmatch(r"encoder\.levels\.(\d+)\.layers\.(\d+)\.(.+)", name)
        if block:
            stage, layer, rest = block.groups()
            place = f"levels.{stage}.blocks.{layer}."
            renamed |= {place + part: t for part, t in _block_from_huggingface(name, rest, tensor, bare).items()}
        else:
            renamed[_outside_from_huggingface(name)] = tensor
    return renamed


def _block_from_huggingface(
    name: str, rest: str, tensor: Tensor, parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    part = re.fullmatch(r"attention\.self\.(query|key|value)\.(weight|bias)", rest)
    if part:
        if part[1] != "query":
            return {}
        three = [parameters[name.replace(".query.", f".{which}.")] for which in _QKV]
        return {f"attn.qkv.{part[2]}": torch.cat(three)}
    if rest == "layer_scale_parameters":
        return {f"gamma{branch}": row.clone() for branch, row in enumerate(tensor, 1)}
    for ours, theirs in _BLOCK.items():
        if rest == theirs or rest.startswith(theirs + "."):
            return {ours + rest.removeprefix(theirs): tensor}
    raise ValueError(f"{name} is no parameter of a Nat or Dinat.")


def _outside_from_huggingface(name: str) -> str:
    for ours, theirs in _STEM.items():
        if name.startswith(theirs + "."):
            return ours + name.removeprefix(theirs)
    if re.fullmatch(r"encoder\.levels\.\d+\.downsample\..+", name):
        return name.removeprefix("encoder.")
    stage = re.fullmatch(r"hidden_states_norms\.stage(\d+)\.(.+)", name)
    if stage:
        return f"norm{int(stage[1]) - 1}.{stage[2]}"
    if name.startswith("layernorm."):
        return "norm." + name.removeprefix("layernorm.")
    if name.startswith("classifier."):
        return name.replace("classifier", "head")
    raise ValueError(f"{name} is no parameter of a Nat or Dinat.")


def config_to_huggingface(config: NATConfig) -> PreTrainedConfig:
    """A NatConfig or, with dilations, transformers' DinatConfig.

    Raises NotImplementedError for what these cannot express (no bias, dropout).
    """
    plain = NATConfig(config.embed_dim, config.depths, config.num_heads, config.mlp_ratio)
    for field in fields(config):
        if field.name not in _SHARED and getattr(config, field.name) != getattr(plain, field.name):
            raise NotImplementedError(
                f"{field.name} = {getattr(config, field.name)!r}: transformers' Nat and Dinat only have "
                f"{getattr(plain, field.name)!r}."
            )
    common: dict[str, Any] = dict(
        num_channels=config.in_chans,
        embed_dim=config.embed_dim,
        depths=list(config.depths),
        num_heads=list(config.num_heads),
        kernel_size=config.kernel_size,
        mlp_ratio=float(config.mlp_ratio),
        qkv_bias=config.qkv_bias,
        drop_path_rate=float(config.drop_path_rate),
        layer_scale_init_value=config.layer_scale or 0.0,
        num_labels=config.num_classes,
    )
    if config.features_only:
        common["out_features"] = [f"stage{stage}" for stage in range(1, len(config.depths) + 1)]
    if config.dilations is None:
        return NatConfig(**common)
    from transformers import DinatConfig

    return DinatConfig(**common, dilations=[list(stage) for stage in config.dilations])


def config_from_huggingface(config: PreTrainedConfig, features_only: bool = False) -> NATConfig:
    """Of a NatConfig or a DinatConfig.

    Raises NotImplementedError for what a NATConfig cannot express (dropout, another activation).
    """
    for name, plain in (
        *(("hidden_dropout_prob", 0), ("attention_probs_dropout_prob", 0)),
        *(("hidden_act", "gelu"), ("layer_norm_eps", 1e-5), ("patch_size", 4)),
    ):
        if getattr(config, name) != plain:
            raise NotImplementedError(f"{name} = {getattr(config, name)!r}: torch_nat's NAT has {plain!r}.")
    dilations = getattr(config, "dilations", None)
    return NATConfig(
        embed_dim=config.embed_dim,
        depths=tuple(config.depths),
        num_heads=tuple(config.num_heads),
        mlp_ratio=config.mlp_ratio,
        drop_path_rate=config.drop_path_rate,
        layer_scale=config.layer_scale_init_value or None,
        kernel_size=config.kernel_size,
        dilations=None if dilations is None else tuple(tuple(stage) for stage in dilations),
        qkv_bias=config.qkv_bias,
        in_chans=config.num_channels,
        num_classes=config.num_labels or 0,
        features_only=features_only,
    )


def to_huggingface(model: NAT) -> PreTrainedModel:
    """The same model for transformers: Nat or, with dilations, Dinat; a backbone for ``features_only``.

    Dinat needs `torch_nat.compat.natten.install` before. Raises NotImplementedError for what transformers
    cannot express.
    """
    config = config_to_huggingface(model.config)
    build, prefix = _class_of(config, model.config.features_only)
    converted: Any = build(config)
    converted.load_state_dict(parameters_to_huggingface(model.state_dict(), prefix), strict=True)
    return converted.to(dtype=next(model.parameters()).dtype).train(model.training)


def from_huggingface(model: PreTrainedModel) -> NAT:
    """The same model for torch_nat, of a Nat or Dinat for image classification, or of a backbone of all stages.

    Raises NotImplementedError for what a NAT cannot express, and for other classes.
    """
    name = type(model).__name__
    if not name.endswith(("ForImageClassification", "Backbone")):
        raise NotImplementedError(f"{name} has no counterpart; ...ForImageClassification and ...Backbone have.")
    config = config_from_huggingface(model.config, features_only=name.endswith("Backbone"))
    stages = [f"stage{stage}" for stage in range(1, len(config.depths) + 1)]
    if config.features_only and list(model.config.out_features) != stages:
        raise NotImplementedError(f"out_features = {model.config.out_features}: a NAT returns all of {stages}.")
    converted = NAT(config)
    converted.load_state_dict(parameters_from_huggingface(model.state_dict()), strict=True)
    return converted.to(dtype=next(model.parameters()).dtype).train(model.training)


def _class_of(config: PreTrainedConfig, features_only: bool) -> tuple[Callable[..., PreTrainedModel], str]:
    """The class to build, and the prefix of its parameters."""
    if config.model_type == "dinat":
        from transformers import DinatBackbone, DinatForImageClassification

        return (DinatBackbone, "") if features_only else (DinatForImageClassification, "dinat")
    from torch_nat.hf.modeling import NatBackbone, NatForImageClassification

    return (NatBackbone, "") if features_only else (NatForImageClassification, "nat")
