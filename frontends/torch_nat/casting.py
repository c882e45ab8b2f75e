"""The weights of many linear layers in autocast's dtype, by one conversion.

Under autocast every linear layer casts its weight and its bias, and the backward pass casts their gradients back:
in a compiled graph a kernel each, which take longer to launch than to run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from torch_nat.ops import LIBRARY
from torch_nat.recomputation import is_exporting

#: All tensors in another dtype; they have one and the same.
LIBRARY.define(
    "cast(Tensor[] tensors, ScalarType dtype) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)


def _cast_fake(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]


def _cast(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    results = _cast_fake(tensors, dtype)
    torch._foreach_copy_(results, tensors)
    return results


def _setup_context(ctx: Any, inputs: tuple[Sequence[Tensor], torch.dtype], output: list[Tensor]) -> None:
    ctx.dtype = inputs[0][0].dtype
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, gradients: Sequence[Tensor | None]) -> tuple[list[Tensor | None], None]:
    wanted = [g if needed else None for g, needed in zip(gradients, ctx.needs_input_grad[0], strict=True)]
    cast = iter(torch.ops.natcore.cast([g for g in wanted if g is not None], ctx.dtype))
    return [None if g is None else next(cast) for g in wanted], None


for _key in ("CPU", "CUDA"):
    LIBRARY.impl("cast", _cast, _key)
torch.library.register_fake("natcore::cast", _cast_fake, lib=LIBRARY)
torch.library.register_autograd("natcore::cast", _backward, setup_context=_setup_context, lib=LIBRARY)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast gives to the linear layers that x goes through; None where it is off."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind) else None


def with_cast_weights(module: nn.Module, x: Tensor) -> Any:
    """module(x), to the bit. Where that is compiled under autocast, its float32 linear weights are cast all at once.

    Weights that are more than memory (subclasses of tensors, parametrized layers) are left to autocast.
    """
    dtype = autocast_dtype(x)
    if dtype is None or not torch.compiler.is_dynamo_compiling() or is_exporting():
        return module(x)
    weights = {
        f"{name}.{key}": weight
        for name, layer in module.named_modules()
        if type(layer) is nn.Linear
        for key, weight in layer.named_parameters(recurse=False)
        if type(weight) is nn.Parameter and weight.dtype == torch.float32 and weight.device == x.device
    }
    if not weights:
        return module(x)
    cast = torch.ops.natcore.cast(list(weights.values()), dtype)
    return functional_call(module, dict(zip(weights, cast, strict=True)), (x,))
