"""What a layer keeps of its input for the backward pass, computed again there instead.

Chen et al., "Training Deep Nets with Sublinear Memory Cost" (arXiv 1604.06174), for one pointwise function. In eager
mode `torch.utils.checkpoint` would do, but takes more of the host's time than all the rest of an MLP.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

_T = TypeVar("_T")
_C = torch._C
_saving = torch._C._autograd  # type: ignore[attr-defined]


def recomputing(function: Callable[[Tensor], Tensor], layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """layer(function(x)), of which the backward pass keeps x but not function(x): it calls function once more.

    function has to be deterministic; layer may be anything, and keeps what else it needs. Values and gradients are
    those of layer(function(x)), to the bit. Where what is saved is somebody else's matter (functorch, torch.jit,
    torch.export, an outer checkpoint, saving to the host), this is that call and no more.
    """
    if not torch.is_grad_enabled():
        return layer(function(x))
    if torch.compiler.is_compiling():
        return layer(recomputed(function, x))
    y = function(x)
    if _is_saving_taken():
        return layer(y)
    with saved_tensors_hooks(partial(_pack, function, x.detach(), _place(y)), _unpack):  # autograd keeps the hooks
        return layer(y)


def recomputed(function: Callable[[Tensor], _T], x: Tensor) -> _T:
    """function(x), which a compiled backward pass computes again from x and does not keep."""
    if not torch.compiler.is_compiling() or is_exporting():
        return function(x)
    # What is outside of a checkpoint is all that the partitioner may keep.
    return checkpoint(function, x, use_reentrant=False)  # type: ignore[return-value]


def is_exporting() -> bool:
    """Asked when Python runs: some versions of Dynamo, tracing torch.compiler.is_exporting, take it for true."""
    return torch.compiler.is_exporting()


# As torch.compiler.assume_constant_result does, which would import Dynamo, and Triton where there is one.
is_exporting._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _is_saving_taken() -> bool:
    return (
        _C._are_functorch_transforms_active()
        or _C._get_tracing_state() is not None
        or not _saving._saved_tensors_hooks_is_enabled()
        or _saving._top_saved_tensors_default_hooks(True) is not None
    )


def _pack(function: Callable[[Tensor], Tensor], x: Tensor, place: tuple, saved: Tensor) -> Callable[[], Tensor]:
    """How the backward pass gets a tensor that layer saves: by function if it is function's output, reshaped or not."""
    if saved.is_contiguous() and _place(saved) == place:
        return partial(_again, function, x, saved.shape)
    return partial(_unchanged, saved, saved._version)


def _place(tensor: Tensor) -> tuple:
    """The elements that a contiguous tensor consists of."""
    return (
        tensor.untyped_storage()._cdata,
        tensor.storage_offset(),
        tensor.numel(),
        tensor.dtype,
        tensor.is_contiguous(),
    )


def _unpack(kept: Callable[[], Tensor]) -> Tensor:
    return kept()


def _again(function: Callable[[Tensor], Tensor], x: Tensor, shape: torch.Size) -> Tensor:
    return function(x).view(shape)


def _unchanged(saved: Tensor, version: int) -> Tensor:
    """Autograd itself does not look for changes where there are hooks."""
    if saved._version != version:
        raise RuntimeError(
            f"a tensor of shape {tuple(saved.shape)} that the backward pass needs was modified in place: it is at "
            f"version {saved._version}, and was at version {version}."
        )
    return saved
