"""Dinat's attention as it was meant: the repair that `torch_nat.compat.natten.install` applies.

In transformers 5 the attention hands q, k and v to NATTEN's functions in a layout that they do not have.
This module imports nothing of transformers.
"""

from __future__ import annotations

import inspect
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import torch_nat

_PARAMETERS = ["self", "hidden_states", "output_attentions"]


def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int,
    dilation: int,
    rpb: Tensor,
    dropout: nn.Dropout,
    output_attentions: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attention of ``[batch, height, width, heads, head_dim]``, and its weights where they are asked for.

    The weights are ``[batch, heads, height, width, kernel_size ** 2]``, after dropout, as transformers
    returns them; asking for them costs the memory to hold them.
    """
    if not output_attentions:
        dropout_p = dropout.p if dropout.training else 0.0
        out: Any = torch_nat.na2d(query, key, value, kernel_size, dilation=dilation, rpb=rpb, dropout_p=dropout_p)
        return out, None
    scale = query.shape[-1] ** -0.5
    scores = torch_nat.na2d_qk(query, key, kernel_size, dilation=dilation, scale=scale, rpb=rpb)
    weights = dropout(scores.softmax(-1))
    return torch_nat.na2d_av(weights, value, kernel_size, dilation=dilation), weights.movedim(-2, 1)


def forward(self: Any, hidden_states: Tensor, output_attentions: bool | None = False) -> tuple[Tensor, ...]:
    """NeighborhoodAttention.forward: ``[batch, height, width, dim]`` to the same, and perhaps the weights."""
    heads = (self.num_attention_heads, self.attention_head_size)
    query, key, value = (layer(hidden_states).unflatten(-1, heads) for layer in (self.query, self.key, self.value))
    window = (self.kernel_size, self.dilation, self.rpb, self.dropout)
    out, weights = neighborhood_attention(query, key, value, *window, bool(output_attentions))
    return (out.flatten(-2),) if weights is None else (out.flatten(-2), weights)


def repair(module: ModuleType) -> bool:
    """Replace the forward of modeling_dinat's NeighborhoodAttention where it is wrong; whether it was.

    Raises NotImplementedError for a NeighborhoodAttention whose forward takes other arguments.
    """
    attention = module.NeighborhoodAttention
    names = list(inspect.signature(attention.forward).parameters)
    if names != _PARAMETERS:
        raise NotImplementedError(
            f"{module.__name__}.NeighborhoodAttention.forward takes {names}, not {_PARAMETERS}: this version of "
            "transformers is not known. 5.0 to 5.23 are."
        )
    if _is_right(attention):
        return False
    attention.forward = forward
    return True


def _is_right(attention: Any) -> bool:
    """Whether it computes neighbourhood attention, on a map that is not square."""
    config = SimpleNamespace(qkv_bias=True, attention_probs_dropout_prob=0.0)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        layer = attention(config, dim=8, num_heads=2, kernel_size=3, dilation=1)
        nn.init.normal_(layer.rpb)
        x = torch.randn(1, 4, 5, 8)
        try:
            out = layer(x)[0]
        except (RuntimeError, ValueError, TypeError):
            return False
        expected = forward(layer, x)[0]
    return out.shape == expected.shape and torch.allclose(out, expected, atol=1e-5)
