"""The weights of many linear layers in autocast's dtype, by one conversion.

Under autocast every linear layer casts its weight and its bias, and the backward pass casts their gradients back:
in a compiled graph a kernel each, which take longer to launch than to run. Here they lie in one tensor, of which
every layer gets its part; so do the gradients on their way back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from torch_nat.ops import LIBRARY
from torch_nat.recomputation import is_exporting
from torch_nat.token_sums import tables_of

_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

#: The elements of all tensors, which have one dtype, one after the other in another; none has 0 axes. They come in
#: runs of these lengths, of tensors that have all but the first axis alike.
LIBRARY.define("cast_flat(Tensor[] tensors, int[] runs, ScalarType dtype) -> Tensor", tags=_TAGS)

#: All tensors in another dtype, as parts of one. In a graph of operations it is `cast_flat` and views.
LIBRARY.define("cast(Tensor[] tensors, ScalarType dtype) -> Tensor[]", tags=_TAGS)


def _cast_flat(tensors: list[Tensor], runs: list[int], dtype: torch.dtype) -> Tensor:
    joined, start = [], 0
    for length in runs:  # torch.cat takes the host a third of the time that a copy of each takes
        joined.append(torch.cat(tensors[start : start + length]))
        start += length
    flat, start = _cast_flat_fake(joined, runs, dtype), 0
    for run in joined:
        flat[start : start + run.numel()].view_as(run).copy_(run)
        start += run.numel()
    return flat


def _cast_flat_fake(tensors: Sequence[Tensor], runs: list[int], dtype: torch.dtype) -> Tensor:
    return tensors[0].new_empty(sum(tensor.numel() for tensor in tensors), dtype=dtype)


def parts(flat: Tensor, shapes: Sequence[torch.Size]) -> Iterator[Tensor]:
    """Views of tensors that lie one after the other."""
    start = 0
    for shape in shapes:
        yield flat[start : start + prod(shape)].view(shape)
        start += prod(shape)


def _cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    runs = [len([*run]) for _, run in groupby(tensors, key=lambda tensor: tensor.shape[1:])]
    return [*parts(torch.ops.natcore.cast_flat(tensors, runs, dtype), [tensor.shape for tensor in tensors])]


def _cast_fake(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape, dtype=dtype) for tensor in tensors]


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.dtype = tensors[0].dtype
        ctx.set_materialize_grads(False)
        return tuple(_cast(tensors, dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = [g if needed else None for g, needed in zip(gradients, ctx.needs_input_grad[1:], strict=True)]
        given = [g for g in wanted if g is not None]
        cast = iter(_cast(given, ctx.dtype) if given else ())
        return None, *(None if g is None else next(cast) for g in wanted)


def _cast_autograd(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [*_Cast.apply(dtype, *tensors)]  # type: ignore[misc]


for _key in ("CPU", "CUDA"):
    LIBRARY.impl("cast_flat", _cast_flat, _key)
    LIBRARY.impl("cast", _cast, _key)
LIBRARY.impl("cast", _cast_autograd, "Autograd")
torch.library.register_fake("natcore::cast_flat", _cast_flat_fake, lib=LIBRARY)
torch.library.register_fake("natcore::cast", _cast_fake, lib=LIBRARY)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast gives to the linear layers that x goes through; None where it is off."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind) else None


def with_cast_weights(module: nn.Module, x: Tensor) -> Any:
    """module(x) on maps ``[batch, height, width, channels]``. Where that is compiled under autocast, its float32 linear
    weights are cast all at once, and in training its biases and norms get tables for their gradients (`token_sums`).

    The output is the same to the bit, and so are the gradients of weights. What is more than memory (subclasses of
    tensors, parametrized layers) is left to autocast.
    """
    dtype = autocast_dtype(x)
    if dtype is None or not torch.compiler.is_dynamo_compiling() or is_exporting():
        return module(x)
    found = [entry for layer in module.modules() if type(layer) is nn.Linear for entry in _castable(layer, x)]
    if not found:
        return module(x)
    found = sorted(found, key=lambda entry: tuple(entry[2].shape[1:]))
    cast = torch.ops.natcore.cast([weight for _, _, weight in found], dtype)
    replaced = {(layer, key): weight for (layer, key, _), weight in zip(found, cast, strict=True)}
    with _replaced(replaced | (tables_of(module, x) if torch.is_grad_enabled() else {})):
        return module(x)


def _castable(layer: nn.Linear, x: Tensor) -> list[tuple[nn.Module, str, Tensor]]:
    """The parameters that may lie in one tensor with others: those whose neighbours stay aligned to 16 bytes."""
    return [
        (layer, key, weight)
        for key, weight in layer.named_parameters(recurse=False)
        if type(weight) is nn.Parameter
        and weight.dtype == torch.float32
        and weight.device == x.device
        and weight.numel() % 8 == 0
    ]


@contextmanager
def _replaced(values: dict[tuple[nn.Module, str], Tensor]) -> Iterator[None]:
    """Other tensors in the place of parameters, while a compiler reads the forward pass. Names stay as they are: so in
    the end nothing has changed, and nothing has to be set when the compiled code runs."""
    before = [(layer, key, layer._parameters[key]) for layer, key in values]
    for (layer, key), value in values.items():
        layer._parameters[key] = value  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer, key, value in before:
            layer._parameters[key] = value  # type: ignore[assignment]
