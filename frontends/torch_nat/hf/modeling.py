"""NAT for transformers: model, classification, backbone, with the parameter names of transformers 4.

The published shi-labs/nat-* checkpoints load with from_pretrained. Source of the architecture: Hassani et
al., "Neighborhood Attention Transformer" (CVPR 2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BackboneOutput
from transformers.utils import ModelOutput

from torch_nat.hf.configuration import NatConfig
from torch_nat.hf.layers import Maps, NatEmbeddings, NatEncoder, NatLayer, NatSelfAttention

try:
    from transformers.backbone_utils import BackboneMixin
except ImportError:  # early 5.x
    from transformers.utils.backbone_utils import BackboneMixin


@dataclass
class NatModelOutput(ModelOutput):
    """``last_hidden_state`` ``[batch, height, width, dim]``, normed; the rest where it is asked for.

    ``hidden_states``: the embedding and each stage's output (a stage's last step is its downsampling),
    channels last; ``reshaped_hidden_states``: the same, channels first; ``attentions``: the weights
    of each stage's last block, ``[batch, heads, height, width, kernel_size ** 2]``.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: Maps | None = None
    attentions: Maps | None = None
    reshaped_hidden_states: Maps | None = None


@dataclass
class NatImageClassifierOutput(ModelOutput):
    """``loss`` where labels are given, ``logits`` ``[batch, num_labels]``, and `NatModelOutput`'s maps."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: Maps | None = None
    attentions: Maps | None = None
    reshaped_hidden_states: Maps | None = None


class NatPreTrainedModel(PreTrainedModel):
    """Initialisation, loading and saving."""

    config: NatConfig
    config_class = NatConfig
    base_model_prefix = "nat"
    main_input_name = "pixel_values"
    input_modalities = ["image"]  # noqa: RUF012

    def get_input_embeddings(self) -> nn.Module:
        model: Any = getattr(self, self.base_model_prefix, self)
        return model.embeddings.patch_embeddings

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, NatSelfAttention):
            init.trunc_normal_(module.rpb, std=self.config.initializer_range)
        elif isinstance(module, NatLayer) and module.layer_scale_parameters is not None:
            init.constant_(module.layer_scale_parameters, self.config.layer_scale_init_value)

    def _choice(self, name: str, given: bool | None) -> bool:
        """What the caller said, or else the configuration."""
        return bool(getattr(self.config, name) if given is None else given)


class NatModel(NatPreTrainedModel):
    """Images ``[batch, channels, H, W]`` to normed features and, with a pooling layer, their mean."""

    def __init__(self, config: NatConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.num_features = config.hidden_size
        self.embeddings, self.encoder = NatEmbeddings(config), NatEncoder(config)
        self.layernorm = nn.LayerNorm(self.num_features, eps=config.layer_norm_eps)
        self.add_pooling_layer = add_pooling_layer
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> NatModelOutput | tuple:
        output_attentions = self._choice("output_attentions", output_attentions)
        output_hidden_states = self._choice("output_hidden_states", output_hidden_states)
        x, maps, _before, attentions = self.encoder(self.embeddings(pixel_values), output_attentions)
        x = self.layernorm(x)
        output = NatModelOutput(
            last_hidden_state=x,
            pooler_output=x.mean(dim=(1, 2)) if self.add_pooling_layer else None,
            hidden_states=maps if output_hidden_states else None,
            attentions=attentions if output_attentions else None,
            reshaped_hidden_states=tuple(m.permute(0, 3, 1, 2) for m in maps) if output_hidden_states else None,
        )
        return output if self._choice("return_dict", return_dict) else output.to_tuple()


class NatForImageClassification(NatPreTrainedModel):
    """Logits ``[batch, num_labels]`` from the mean of the features; with labels, the loss."""

    def __init__(self, config: NatConfig):
        super().__init__(config)
        self.num_labels: int = config.num_labels or 0
        self.nat = NatModel(config)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels) if self.num_labels else nn.Identity()
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> NatImageClassifierOutput | tuple:
        features = self.nat(
            pixel_values,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits = self.classifier(features.pooler_output)
        output = NatImageClassifierOutput(
            loss=None if labels is None else self.loss_function(labels, logits, self.config),
            logits=logits,
            hidden_states=features.hidden_states,
            attentions=features.attentions,
            reshaped_hidden_states=features.reshaped_hidden_states,
        )
        return output if self._choice("return_dict", return_dict) else output.to_tuple()


class NatBackbone(BackboneMixin, NatPreTrainedModel):  # pyright: ignore[reportGeneralTypeIssues]
    """One normed map per stage of ``config.out_features``, ``[batch, channels, height, width]``."""

    def __init__(self, config: NatConfig):
        super().__init__(config)
        if hasattr(self, "_init_backbone"):  # early 5.x: the mixin has no constructor
            super()._init_backbone(config)
        self.embeddings, self.encoder = NatEmbeddings(config), NatEncoder(config)
        self.num_features = [config.embed_dim, *(config.embed_dim * 2**i for i in range(len(config.depths)))]
        norms = zip(self.out_features, self.channels, strict=True)
        self.hidden_states_norms = nn.ModuleDict({stage: nn.LayerNorm(channels) for stage, channels in norms})
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> BackboneOutput | tuple:
        output_attentions = self._choice("output_attentions", output_attentions)
        _last, _after, maps, attentions = self.encoder(self.embeddings(pixel_values), output_attentions)
        named = dict(zip(self.stage_names, maps, strict=True))
        output = BackboneOutput(
            feature_maps=tuple(
                self.hidden_states_norms[stage](named[stage]).permute(0, 3, 1, 2).contiguous()
                for stage in self.out_features
            ),
            hidden_states=maps if self._choice("output_hidden_states", output_hidden_states) else None,
            attentions=attentions if output_attentions else None,
        )
        return output if self._choice("return_dict", return_dict) else output.to_tuple()
