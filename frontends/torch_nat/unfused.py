"""na1d_qk, na1d_av, ...: attention in two steps, with whatever comes between them; and merging attentions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from natcore.merging import check_mergeable, combine
from natcore.planning import Config
from natcore.problem import Direction
from natcore.window import window_of
from torch_nat import ops, unfused_ops
from torch_nat.functional import PerAxis, PerAxisFlag


def na2d_qk(
    q: Tensor,
    k: Tensor,
    kernel_size: PerAxis,
    *,
    stride: PerAxis = 1,
    dilation: PerAxis = 1,
    is_causal: PerAxisFlag = False,
    scale: float = 1.0,
    rpb: Tensor | None = None,
    additional_keys: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """The scores of 2-D neighbourhood attention, before the softmax.

    ``na2d_av(na2d_qk(q, k, n, scale=q.shape[-1] ** -0.5).softmax(-1), v, n)`` is ``na2d(q, k, v, n)``, but
    holds all scores in memory: use it only for what must happen between the two steps.

    Args:
        q: ``[batch, height, width, heads, head_dim]``; float64, float32, float16 or bfloat16. Any
            strides with a contiguous last axis are read in place.
        k: ``[batch, height, width, heads_kv, head_dim]``; heads must be a multiple of heads_kv.
        kernel_size: window size, an int or one per axis; kernel_size * dilation <= extent.
        stride: neighbouring queries that share a window; at most kernel_size.
        dilation: distance between neighbouring keys of a window.
        is_causal: per axis, whether keys after the query are hidden.
        scale: of q . k; 1 by default, since callers of the unfused form scale q themselves.
        rpb: relative positional bias ``[heads, 2 * k0 - 1, 2 * k1 - 1]``, float32 or q's dtype, added
            unscaled.
        additional_keys: ``[batch, extra, heads_kv, head_dim]``, seen by every query.
        config: an explicit kernel choice; the planner's own by default.

    Returns:
        ``[batch, height, width, heads, k0 * k1 + extra]`` in q's dtype, from sums in float32 or better:
        row-major over the window, from the first key that the query sees on each axis, then the
        additional keys. A causal query sees fewer keys; its last places on that axis are -infinity.
        Differentiable any number of times with respect to every tensor.

    Raises:
        ValueError: for anything that is not a valid problem, with the numbers.
        NotImplementedError: for what the device cannot run.
    """
    return _qk(2, q, k, (kernel_size, stride, dilation, is_causal), scale, rpb, additional_keys, config)


def na1d_qk(
    q: Tensor,
    k: Tensor,
    kernel_size: PerAxis,
    *,
    stride: PerAxis = 1,
    dilation: PerAxis = 1,
    is_causal: PerAxisFlag = False,
    scale: float = 1.0,
    rpb: Tensor | None = None,
    additional_keys: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """The scores of 1-D neighbourhood attention on ``[batch, length, heads, head_dim]``; otherwise as `na2d_qk`."""
    return _qk(1, q, k, (kernel_size, stride, dilation, is_causal), scale, rpb, additional_keys, config)


def na3d_qk(
    q: Tensor,
    k: Tensor,
    kernel_size: PerAxis,
    *,
    stride: PerAxis = 1,
    dilation: PerAxis = 1,
    is_causal: PerAxisFlag = False,
    scale: float = 1.0,
    rpb: Tensor | None = None,
    additional_keys: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """The scores on ``[batch, depth, height, width, heads, head_dim]``; otherwise as `na2d_qk`."""
    return _qk(3, q, k, (kernel_size, stride, dilation, is_causal), scale, rpb, additional_keys, config)


def na2d_av(
    weights: Tensor,
    v: Tensor,
    kernel_size: PerAxis,
    *,
    stride: PerAxis = 1,
    dilation: PerAxis = 1,
    is_causal: PerAxisFlag = False,
    additional_values: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """Sums over 2-D neighbourhoods: the second step of attention (see `na2d_qk`).

    Args:
        weights: ``[batch, height, width, heads, k0 * k1 + extra]``, in the order of `na2d_qk`'s scores.
            What lies where a causal query sees no key is ignored.
        v: ``[batch, height, width, heads_kv, head_dim]`` in the dtype of the weights.
        kernel_size, stride, dilation, is_causal, config: as in `na2d_qk`.
        additional_values: ``[batch, extra, heads_kv, head_dim]``.

    Returns:
        ``[batch, height, width, heads, head_dim]``. Differentiable any number of times with respect to
        every tensor. Raises as `na2d_qk`.
    """
    return _av(2, weights, v, (kernel_size, stride, dilation, is_causal), additional_values, config)


def na1d_av(
    weights: Tensor,
    v: Tensor,
    kernel_size: PerAxis,
    *,
    stride: PerAxis = 1,
    dilation: PerAxis = 1,
    is_causal: PerAxisFlag = False,
    additional_values: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """Sums over 1-D neighbourhoods, of v ``[batch, length, heads_kv, head_dim]``; otherwise as `na2d_av`."""
    return _av(1, weights, v, (kernel_size, stride, dilation, is_causal), additional_values, config)


def na3d_av(
    weights: Tensor,
    v: Tensor,
    kernel_size: PerAxis,
    *,
    stride: PerAxis = 1,
    dilation: PerAxis = 1,
    is_causal: PerAxisFlag = False,
    additional_values: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """Sums over 3-D neighbourhoods, of v ``[batch, depth, height, width, heads_kv, head_dim]``; as `na2d_av`."""
    return _av(3, weights, v, (kernel_size, stride, dilation, is_causal), additional_values, config)


def merge_attentions(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint key sets, from attention over each of them.

    Args:
        outs: tensors of one shape ``[..., heads, head_dim]`` and dtype.
        lses: their log-sum-exps ``[..., heads]``, natural log; -infinity stands for no keys at all.

    Returns:
        (out, lse) of that shape and dtype, computed in the dtype of the LSEs; differentiable with
        respect to every tensor (the gradients of LSEs are what `na2d`'s backward expects). Nothing is
        changed in place.

    Raises:
        ValueError: for tensors that do not fit, with the numbers.
    """
    check_mergeable(outs, lses)
    return combine(torch, outs, lses, Tensor.detach)


def _qk(
    rank: int, q: Any, k: Any, window: tuple, scale: float, rpb: Any, additional_keys: Any, config: Config | None
) -> Tensor:
    return _call("qk", rank, (q, k, rpb, additional_keys), window, (float(scale), ops.encode_config(config)))


def _av(rank: int, weights: Any, v: Any, window: tuple, additional_values: Any, config: Config | None) -> Tensor:
    return _call("av", rank, (weights, v, additional_values), window, (ops.encode_config(config),))


def _call(direction: Direction, rank: int, tensors: tuple, window_arguments: tuple, rest: tuple) -> Tensor:
    if torch.compiler.is_compiling():
        text = ops.encode_window(*[ops.per_axis(rank, argument) for argument in window_arguments])
        return getattr(torch.ops.natcore, direction)(*tensors, text, *rest)
    for name, tensor in zip(unfused_ops.inputs_of(direction), tensors, strict=True):
        optional = name == "rpb" or name.startswith("additional")
        if not isinstance(tensor, Tensor) and not (optional and tensor is None):
            raise TypeError(f"{name} is {type(tensor).__name__}; torch_nat takes torch tensors, natcore other arrays.")
    text = ops.encoded(window_of(rank, *window_arguments))
    if not torch._C._are_functorch_transforms_active():
        return getattr(torch.ops.natcore, direction)(*tensors, text, *rest)
    if torch.is_autocast_enabled(tensors[0].device.type):
        tensors = unfused_ops.cast(direction, tensors, tensors[0].device.type)
    return getattr(unfused_ops.Functions, direction)(*tensors, text, *rest)
