"""torch.vmap, torch.func and torch.autocast for the operations of ops.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from natcore.planning import Config
from natcore.problem import Window
from torch_nat import ops
from torch_nat.ops import LIBRARY

# Where the batch and the heads of each tensor argument are. A table of biases has no batch.
MAP, _LSE, RPB = (0, -2), (0, -1), (None, 0)
_EXTRAS, _SEED = (RPB, MAP, MAP), (None, None)
_FORWARD = (MAP, _LSE)
#: Per operation: the axes of its tensor arguments and of its results.
_AXES = {
    "attention": ((MAP, MAP, MAP, *_EXTRAS, _SEED), _FORWARD),
    "attention_packed": ((MAP, *_EXTRAS, _SEED), _FORWARD),
    "attention_backward": ((MAP,) * 5 + (_LSE, _LSE, *_EXTRAS, _SEED), (MAP, MAP, MAP, *_EXTRAS)),
    "attention_packed_backward": ((MAP,) * 3 + (_LSE, _LSE, *_EXTRAS, _SEED), (MAP, *_EXTRAS)),
}


def _vmap(name: str) -> Callable:
    """A rule that folds the mapped axis into the batch, or into the heads where biases differ along it.

    So do the gradients of a bias that was shared: each slice must get its own, and not their sum.
    Heads fold with the mapped axis in front, which keeps the groups of GQA together. With dropout nothing
    is folded, since what a seed drops depends on the shape.
    """
    operation, (axes, result_axes) = getattr(torch.ops.natcore, name), _AXES[name]
    rpb_at = axes.index(RPB)

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Sequence[Tensor], int]:
        size, tensors, rest = info.batch_size, args[: len(axes)], args[len(axes) :]
        if rest[-1] > 0:
            return _one_by_one(operation, size, in_dims, args)
        by_heads = tensors[rpb_at] is not None and (in_dims[rpb_at] is not None or name.endswith("backward"))
        folded = [
            None if tensor is None else fold(tensor, dim, heads if by_heads else batch, size)
            for tensor, dim, (batch, heads) in zip(tensors, in_dims, axes, strict=False)
        ]
        results = operation(*folded, *rest)
        found = result_axes
        if name.endswith("backward"):
            extras = tensors[rpb_at : rpb_at + len(_EXTRAS)]
            given = *(True for _ in result_axes[: -len(_EXTRAS)]), *(tensor is not None for tensor in extras)
            found = compress(result_axes, given)
        unfolded = (
            unfold(result, heads if by_heads else batch, size)
            for result, (batch, heads) in zip(results, found, strict=True)
        )
        return type(results)(unfolded), 0

    return rule


def _one_by_one(
    operation: Callable, size: int, in_dims: tuple[int | None, ...], args: tuple
) -> tuple[Sequence[Tensor], int]:
    """The operation on each slice."""
    slices = [
        operation(*(x.select(dim, i) if isinstance(dim, int) else x for x, dim in zip(args, in_dims, strict=True)))
        for i in range(size)
    ]
    return type(slices[0])(torch.stack(each) for each in zip(*slices, strict=True)), 0


def fold(tensor: Tensor, dim: int | None, axis: int | None, size: int) -> Tensor:
    """The mapped axis ``dim`` merged into ``axis`` of what remains; None: there is nothing to merge into."""
    if axis is None:
        return tensor  # a bias that is shared by the whole batch
    rank = tensor.dim() - (dim is not None)
    at = axis % rank
    if dim is None:
        tensor = tensor.unsqueeze(at).expand(*tensor.shape[:at], size, *tensor.shape[at:])
    else:
        tensor = tensor.movedim(dim, at)
    tensor = tensor.flatten(at, at + 1)
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def unfold(tensor: Tensor, axis: int | None, size: int) -> Tensor:
    """Inverse of `fold`, with the mapped axis in front."""
    assert axis is not None  # gradients of a bias are folded by heads
    at = axis % tensor.dim()
    return tensor.unflatten(at, (size, tensor.shape[at] // size)).movedim(at, 0)


def _autocast(name: str, device_type: str) -> Callable:
    operation = getattr(torch.ops.natcore, name)
    key = getattr(torch._C.DispatchKey, f"Autocast{device_type.upper()}")
    rpb_at = _AXES[name][0].index(RPB)

    def kernel(*args: Any) -> tuple[Tensor, Tensor]:
        cast = cast_operands(args, rpb_at, device_type)
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return operation(*cast)

    return kernel


def cast_operands(operands: tuple, rpb_at: int, device_type: str) -> tuple:
    """As scaled_dot_product_attention does: float32 and 16-bit tensors become the autocast dtype.

    float64 is left alone, and so is a float32 table of biases, which goes with every dtype.
    """
    dtype = torch.get_autocast_dtype(device_type)

    def cast(at: int, x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.device.type != device_type:
            return x
        keep = x.dtype == torch.float64 or (at == rpb_at and x.dtype == torch.float32)
        return x if keep else x.to(dtype)

    return tuple(cast(at, x) for at, x in enumerate(operands))


class Transformed(torch.autograd.Function):
    """The gradient under torch.func, which asks for a Function where register_autograd's does not serve.

    Its parts are the dispatcher's operations, from which it also draws its vmap rule.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(window: Window, scale: float | None, config: Config | None, dropout_p: float, *tensors: Tensor | None):
        return ops.forward_of(len(tensors) - 4)(*tensors, *ops.call_arguments(window, scale, config, dropout_p))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        ops.setup_context(ctx, (*inputs[4:], *ops.call_arguments(*inputs[:4])), output)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        leading = len(ctx.saved_tensors) - 6  # without rpb, additional keys and values, seed, out, lse
        gradients = ops.formula(partial(_TransformedBackward.apply, leading), leading)(ctx, d_out, d_lse)
        return None, None, None, None, *gradients[: leading + 4]


class _TransformedBackward(torch.autograd.Function):
    """Only there to refuse: torch.func records the backward too, whether or not it is differentiated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(leading: int, *arguments: Any) -> tuple[Tensor, ...]:
        return tuple(ops.backward_of(leading)(*arguments))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> None:
        raise NotImplementedError(ops.DOUBLE_BACKWARD)


def _register() -> None:
    for name in _AXES:
        torch.library.register_vmap(f"natcore::{name}", _vmap(name), lib=LIBRARY)
    for name in ("attention", "attention_packed"):
        for device_type in ("cpu", "cuda"):
            LIBRARY.impl(name, _autocast(name, device_type), f"Autocast{device_type.upper()}")


_register()
