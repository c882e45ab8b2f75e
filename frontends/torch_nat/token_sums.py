"""Sums over all tokens, the gradients of biases and norms, in two steps of which the second is one for many layers.

A sum over the tokens of a batch takes two kernels: groups of tokens are added first, then their sums. A compiled
backward pass does both for every parameter, and the second step takes longer to launch than to run. So parameters are
given to the layers once more as tables, ``[groups, channels]``, that nobody reads: the gradient of a table is what the
first step makes, and the sums of all tables' columns are taken together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_nat.ops import LIBRARY

_C = torch._C
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

#: Names beside a layer's parameters, where a table is while a compiler reads the forward pass, and None otherwise.
TABLES = {"weight": "weight_table", "bias": "bias_table"}

#: Tokens that the first step adds, at most, unless a row has more: few, so that many threads share the work.
_GROUP = 256


# tables: [groups, *parameter.shape] for each parameter, without values. column_sums: of tables with as many rows, one
# after the other. linear, layer_norm: torch's, with the gradients of bias and norm in tables.
for _schema in (
    "tables(Tensor[] parameters, SymInt groups) -> Tensor[]",
    "column_sums(Tensor[] tables) -> Tensor",
    "linear(Tensor x, Tensor weight, Tensor bias, Tensor bias_table) -> Tensor",
    "layer_norm(Tensor x, Tensor weight, Tensor bias, Tensor weight_table, Tensor bias_table, float eps) -> Tensor",
):
    LIBRARY.define(_schema, tags=_TAGS)


_Layer = TypeVar("_Layer", nn.Linear, nn.LayerNorm)


def with_tables(layer: _Layer) -> _Layer:
    """The layer, which may get tables. It has to be called by `apply_linear` or `apply_norm`."""
    for key in ("bias",) if isinstance(layer, nn.Linear) else TABLES:
        layer.register_parameter(TABLES[key], None)
    return layer


def tables_of(module: nn.Module, x: Tensor) -> dict[tuple[nn.Module, str], Tensor]:
    """Tables for the biases of linear layers and for norms, by layer and name, where module gets the map x."""
    wanted = [
        (layer, key)
        for layer in module.modules()
        if type(layer) in (nn.Linear, nn.LayerNorm) and not _is_hooked(layer)
        for key, name in TABLES.items()
        if name in layer._parameters and _is_trained(layer._parameters.get(key), x)
    ]
    if not wanted or x.dim() != 4:
        return {}
    groups = x.shape[0] * _groups(*x.shape[1:3])
    tables = torch.ops.natcore.tables([layer._parameters[key] for layer, key in wanted], groups)
    return {(layer, TABLES[key]): table for (layer, key), table in zip(wanted, tables, strict=True)}


def _groups(height: int, width: int) -> int:
    """How many groups of as many whole rows there are in a map."""
    return next(n for n in range(1, height + 1) if height % n == 0 and (height // n * width <= _GROUP or n == height))


def _is_trained(parameter: nn.Parameter | None, x: Tensor) -> bool:
    if type(parameter) is not nn.Parameter or not parameter.requires_grad:
        return False
    return parameter.dtype == torch.float32 and parameter.device == x.device and parameter.dim() == 1


def _is_hooked(layer: nn.Module) -> bool:
    return any((layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks))


def apply_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """layer(x), with a table for the bias's gradient if there is one whose groups the tokens of x can form."""
    table = _bias_table(layer)
    if table is None or not _fits(table, x) or layer.weight.dtype != layer.bias.dtype:
        return layer(x)
    return torch.ops.natcore.linear(x.to(layer.weight.dtype), layer.weight, layer.bias, table)


def apply_norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    """layer(x), with tables for the gradients of weight and bias if there are such, and x is in float32."""
    names = TABLES.values() if torch.compiler.is_dynamo_compiling() else ()
    tables = [table for table in map(layer._parameters.get, names) if table is not None]
    if len(tables) < 2 or not _fits(tables[0], x) or x.dtype != torch.float32:
        return layer(x)
    return torch.ops.natcore.layer_norm(x, layer.weight, layer.bias, *tables, layer.eps)


def _bias_table(layer: nn.Linear) -> Tensor | None:
    return layer._parameters.get("bias_table") if torch.compiler.is_dynamo_compiling() else None


def _fits(table: Tensor, x: Tensor) -> bool:
    return x.shape[:-1].numel() % table.shape[0] == 0


# Autograd. What is called forward is in a graph of operations as torch's own operations.


def _table(gradients: Tensor, groups: int) -> Tensor:
    """The first step, in float32: ``[..., channels]`` to ``[groups, channels]``. Axes are left as they are where they
    can be: a compiler joins kernels over the same axes."""
    samples, rows = gradients.shape[:2]
    if groups == samples:
        return gradients.sum(tuple(range(1, gradients.dim() - 1)), dtype=torch.float32)
    if groups % samples == 0 and rows % (groups // samples) == 0:
        grouped = gradients.unflatten(1, (groups // samples, -1))
        return grouped.sum(tuple(range(2, grouped.dim() - 1)), dtype=torch.float32).flatten(0, 1)
    return gradients.reshape(groups, -1, gradients.shape[-1]).sum(1, dtype=torch.float32)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.groups = table.shape[0]
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        tokens = d_out.flatten(0, -2)
        dx = (tokens @ weight).view(x.shape) if ctx.needs_input_grad[0] else None
        d_weight = tokens.t() @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return dx, d_weight, None, _table(d_out, ctx.groups) if ctx.needs_input_grad[3] else None


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, *tables_and_eps: Any) -> Tensor:
        out, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], weight, bias, tables_and_eps[-1])
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        ctx.groups = tables_and_eps[0].shape[0]
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, weight, bias = ctx.saved_tensors
        dx = torch.ops.aten.native_layer_norm_backward(
            d_out, x, x.shape[-1:], mean, rstd, weight, bias, [True, False, False]
        )[0]
        normed = (x - mean) * rstd
        return dx, None, None, _table(d_out * normed, ctx.groups), _table(d_out, ctx.groups), None


class _Tables(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, groups: int, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(_tables(parameters, groups))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [g for g in gradients if g is not None]
        sums = iter(torch.ops.natcore.column_sums(given).split([g.shape[1] for g in given]) if given else ())
        return None, *(None if g is None else next(sums) for g in gradients)


def _tables(parameters: Sequence[Tensor], groups: int) -> list[Tensor]:
    return [parameter.new_empty(groups, *parameter.shape) for parameter in parameters]


def _column_sums(tables: Sequence[Tensor]) -> Tensor:
    return torch.cat([*tables], 1).sum(0)


def _linear(x: Tensor, weight: Tensor, bias: Tensor, table: Tensor) -> Tensor:
    return F.linear(x, weight, bias)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *tables_and_eps: Any) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, tables_and_eps[-1])


def _recorded(function: type[torch.autograd.Function], plain: Callable) -> Callable:
    def autograd(*arguments: Any) -> Any:
        needed = torch.is_grad_enabled() and _C._any_requires_grad(*arguments)
        return function.apply(*arguments) if needed else plain(*arguments)

    return autograd


def _tables_autograd(parameters: Sequence[Tensor], groups: int) -> list[Tensor]:
    return [*_Tables.apply(groups, *parameters)]  # type: ignore[misc]


def _register() -> None:
    plain = {"tables": _tables, "column_sums": _column_sums, "linear": _linear, "layer_norm": _layer_norm}
    for name, function in plain.items():
        for key in ("CPU", "CUDA"):
            LIBRARY.impl(name, function, key)
        torch.library.register_fake(f"natcore::{name}", function, lib=LIBRARY)
    LIBRARY.impl("tables", _tables_autograd, "Autograd")
    LIBRARY.impl("linear", _recorded(_Linear, _linear), "Autograd")
    LIBRARY.impl("layer_norm", _recorded(_Norm, _layer_norm), "Autograd")


_register()
