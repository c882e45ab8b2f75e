"""NatConfig: model type "nat", as transformers had it until 4."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

try:
    from transformers.backbone_utils import BackboneConfigMixin
except ImportError:  # early 5.x
    from transformers.utils.backbone_utils import BackboneConfigMixin


class NatConfig(BackboneConfigMixin, PreTrainedConfig):  # pyright: ignore[reportGeneralTypeIssues]
    """Configuration of a NAT; the defaults are those of shi-labs/nat-mini-in1k-224.

    Args:
        patch_size: 4, the only one there is.
        num_channels: channels of the images.
        embed_dim: width of the first stage; each further one doubles it.
        depths: blocks per stage.
        num_heads: attention heads per stage.
        kernel_size: window size.
        mlp_ratio: hidden width of the MLPs, relative to the stage's.
        qkv_bias: whether query, key and value have biases.
        hidden_dropout_prob: dropout of embeddings and MLPs.
        attention_probs_dropout_prob: dropout of attention weights and of what attention returns.
        drop_path_rate: stochastic depth of the last block, linear from 0.
        hidden_act: activation of the MLPs.
        initializer_range: standard deviation of fresh weights.
        layer_norm_eps: of the blocks' norms and the last one.
        layer_scale_init_value: of the residual branches' scales; 0: none.
        out_features: stages whose maps a backbone returns, of "stem", "stage1", ...
        out_indices: the same by number.
    """

    model_type = "nat"
    attribute_map = {"num_attention_heads": "num_heads", "num_hidden_layers": "num_layers"}  # noqa: RUF012

    def __init__(
        self,
        patch_size: int = 4,
        num_channels: int = 3,
        embed_dim: int = 64,
        depths: Sequence[int] = (3, 4, 6, 5),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        kernel_size: int = 7,
        mlp_ratio: float = 3.0,
        qkv_bias: bool = True,
        hidden_dropout_prob: float = 0.0,
        attention_probs_dropout_prob: float = 0.0,
        drop_path_rate: float = 0.1,
        hidden_act: str = "gelu",
        initializer_range: float = 0.02,
        layer_norm_eps: float = 1e-5,
        layer_scale_init_value: float = 0.0,
        out_features: list[str] | None = None,
        out_indices: list[int] | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if patch_size != 4:
            raise ValueError(f"patch_size is {patch_size}; the embedding's two convolutions of stride 2 make it 4.")
        self.patch_size, self.num_channels, self.embed_dim = patch_size, num_channels, embed_dim
        self.depths, self.num_heads = list(depths), list(num_heads)
        self.num_layers, self.kernel_size, self.mlp_ratio = len(self.depths), kernel_size, mlp_ratio
        self.qkv_bias, self.hidden_act = qkv_bias, hidden_act
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.drop_path_rate, self.initializer_range = drop_path_rate, initializer_range
        self.layer_norm_eps, self.layer_scale_init_value = layer_norm_eps, layer_scale_init_value
        self.hidden_size = embed_dim * 2 ** (len(self.depths) - 1)  # what encoder-decoders look for
        self.stage_names = ["stem", *(f"stage{stage}" for stage in range(1, len(self.depths) + 1))]
        self._choose_outputs(out_features, out_indices)

    def _choose_outputs(self, out_features: list[str] | None, out_indices: list[int] | None) -> None:
        """Both lists from one of them; the last stage where neither is given."""
        if hasattr(self, "set_output_features_output_indices"):
            self.set_output_features_output_indices(out_features=out_features, out_indices=out_indices)
            return
        from transformers.utils import backbone_utils

        align = backbone_utils.get_aligned_output_features_output_indices  # pyright: ignore[reportAttributeAccessIssue]
        self._out_features, self._out_indices = align(
            out_features=out_features, out_indices=out_indices, stage_names=self.stage_names
        )
