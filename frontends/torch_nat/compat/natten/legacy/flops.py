"""Multiply-accumulates of neighbourhood attention, for fvcore's FlopCountAnalysis."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch

from torch_nat.ops import decode_window

Handle = Callable[[list, list], int]


def handles(count_bias: bool) -> dict[str, Handle]:
    """What to give to fvcore's set_op_handle: a counter for each of torch_nat's operations.

    q . k and the weighted sum are one multiply-accumulate each per head_dim and key; with ``count_bias``
    (until 0.15, whether or not there is a bias) one more per key.
    """
    fused = {"natcore::attention": _fused(count_bias), "natcore::attention_packed": _fused(count_bias)}
    return {**fused, "natcore::qk": _scores(count_bias), "natcore::av": _weighted_sums}


def add_handles(flop_ctr: Any, count_bias: bool) -> Any:
    return flop_ctr.set_op_handle(**handles(count_bias))


def total(model: torch.nn.Module, inputs: Any, disable_warnings: bool, count_bias: bool) -> int:
    """Counted by fvcore. Raises ImportError where it is not installed."""
    try:
        from fvcore.nn import FlopCountAnalysis
    except ImportError as error:
        raise ImportError("get_flops counts with fvcore: pip install fvcore") from error
    counter = add_handles(FlopCountAnalysis(model, inputs), count_bias)
    return (counter.unsupported_ops_warnings(False) if disable_warnings else counter).total()


def _shape(value: Any) -> tuple[int, ...]:
    """Of a traced value; () for one that is no tensor (an absent operand)."""
    return tuple(value.type().sizes()) if value.type().kind() == "TensorType" else ()


def _arguments(operation: Any, inputs: list) -> dict[str, Any]:
    return dict(zip((argument.name for argument in operation.default._schema.arguments), inputs, strict=False))


def _keys(arguments: dict[str, Any], additional: str) -> int:
    """Keys that a query sees: the window and the additional ones."""
    window, extra = decode_window(arguments["window"].toIValue()), _shape(arguments[additional])
    return prod(window.kernel_size) + (extra[1] if extra else 0)


def _fused(count_bias: bool) -> Handle:
    def count(inputs: list, outputs: list) -> int:
        packed = len(inputs) < len(torch.ops.natcore.attention.default._schema.arguments)
        operation = torch.ops.natcore.attention_packed if packed else torch.ops.natcore.attention
        arguments = _arguments(operation, inputs)
        if packed:
            *lead, _, heads, head_dim = _shape(arguments["qkv"])
            head_dim_v = head_dim
        else:
            *lead, heads, head_dim = _shape(arguments["q"])
            head_dim_v = _shape(arguments["v"])[-1]
        return prod(lead) * heads * _keys(arguments, "additional_keys") * (head_dim + head_dim_v + count_bias)

    return count


def _scores(count_bias: bool) -> Handle:
    def count(inputs: list, outputs: list) -> int:
        arguments = _arguments(torch.ops.natcore.qk, inputs)
        *queries, head_dim = _shape(arguments["q"])
        return prod(queries) * _keys(arguments, "additional_keys") * (head_dim + count_bias)

    return count


def _weighted_sums(inputs: list, outputs: list) -> int:
    arguments = _arguments(torch.ops.natcore.av, inputs)
    return prod(_shape(arguments["weights"])) * _shape(arguments["v"])[-1]
