"""torch.vmap and torch.autocast for the operations of ops.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_nat.ops import LIBRARY

# Where the batch and the heads of each tensor argument are. A table of biases has no batch.
_MAP, _LSE, _RPB = (0, -2), (0, -1), (None, 0)
_EXTRAS = (_RPB, _MAP, _MAP)
_FORWARD = (_MAP, _LSE)
#: Per operation: the axes of its tensor arguments and of its results.
_AXES = {
    "attention": ((_MAP, _MAP, _MAP, *_EXTRAS), _FORWARD),
    "attention_packed": ((_MAP, *_EXTRAS), _FORWARD),
    "attention_backward": ((_MAP,) * 5 + (_LSE, _LSE, *_EXTRAS), (_MAP, _MAP, _MAP, *_EXTRAS)),
    "attention_packed_backward": ((_MAP,) * 3 + (_LSE, _LSE, *_EXTRAS), (_MAP, *_EXTRAS)),
}


def _vmap(name: str) -> Callable:
    """A rule that folds the mapped axis into the batch, or into the heads where biases differ along it.

    So do the gradients of a bias that was shared: each slice must get its own, and not their sum.
    Heads fold with the mapped axis in front, which keeps the groups of GQA together.
    """
    operation, (axes, result_axes) = getattr(torch.ops.natcore, name), _AXES[name]
    rpb_at = axes.index(_RPB)

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[tuple, tuple]:
        size, tensors, rest = info.batch_size, args[: len(axes)], args[len(axes) :]
        by_heads = tensors[rpb_at] is not None and (in_dims[rpb_at] is not None or name.endswith("backward"))
        folded = [
            None if tensor is None else _fold(tensor, dim, heads if by_heads else batch, size)
            for tensor, dim, (batch, heads) in zip(tensors, in_dims, axes, strict=False)
        ]
        results = operation(*folded, *rest)
        present = [tensor is not None for tensor in tensors[rpb_at:]]
        present = [True] * (len(result_axes) - len(present)) + present if name.endswith("backward") else [True, True]
        return (
            tuple(
                _unfold(result, heads if by_heads else batch, size) if is_present else result
                for result, is_present, (batch, heads) in zip(results, present, result_axes, strict=True)
            ),
            tuple(0 if is_present else None for is_present in present),
        )

    return rule


def _fold(tensor: Tensor, dim: int | None, axis: int | None, size: int) -> Tensor:
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


def _unfold(tensor: Tensor, axis: int | None, size: int) -> Tensor:
    """Inverse of `_fold`, with the mapped axis in front."""
    assert axis is not None  # gradients of a bias are folded by heads
    at = axis % tensor.dim()
    return tensor.unflatten(at, (size, tensor.shape[at] // size)).movedim(at, 0)


def _autocast(name: str, device_type: str) -> Callable:
    """As scaled_dot_product_attention does: float32 and 16-bit inputs become the autocast dtype.

    float64 is left alone, and so is a float32 table of biases, which goes with every dtype.
    """
    operation = getattr(torch.ops.natcore, name)
    key = getattr(torch._C.DispatchKey, f"Autocast{device_type.upper()}")
    rpb_at = _AXES[name][0].index(_RPB)

    def kernel(*args: Any) -> tuple[Tensor, Tensor]:
        dtype = torch.get_autocast_dtype(device_type)
        cast = [_cast(x, dtype, device_type) if isinstance(x, Tensor) else x for x in args]
        rpb = args[rpb_at]
        if rpb is not None and rpb.dtype == torch.float32:
            cast[rpb_at] = rpb
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return operation(*cast)

    return kernel


def _cast(tensor: Tensor, dtype: torch.dtype, device_type: str) -> Tensor:
    eligible = tensor.is_floating_point() and tensor.dtype != torch.float64 and tensor.device.type == device_type
    return tensor.to(dtype) if eligible else tensor


def _register() -> None:
    for name in _AXES:
        torch.library.register_vmap(f"natcore::{name}", _vmap(name), lib=LIBRARY)
    for name in ("attention", "attention_packed"):
        for device_type in ("cpu", "cuda"):
            LIBRARY.impl(name, _autocast(name, device_type), f"Autocast{device_type.upper()}")


_register()
