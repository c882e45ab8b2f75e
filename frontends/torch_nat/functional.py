"""na1d, na2d, na3d and their packed forms, on torch tensors.

Two ways lead to the kernels. Plain eager calls go there directly (`eager`): microseconds count. Whenever
something looks on that must see an operation (compilation, tracing, functorch, a mode, a tensor subclass,
autocast), the call goes through the dispatcher (`ops`). Both have the same numbers and the same errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from natcore.planning import Config
from natcore.window import window_of
from torch_nat import eager, launch, ops, transforms

PerAxis = int | Sequence[int]
PerAxisFlag = bool | Sequence[bool]


def na2d(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: PerAxis,
    *,
    stride: PerAxis = 1,
    dilation: PerAxis = 1,
    is_causal: PerAxisFlag = False,
    scale: float | None = None,
    rpb: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: bool = False,
    dropout_p: float = 0,
    config: Config | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """2-D neighbourhood attention (Hassani et al., CVPR 2023; dilation: arXiv 2209.15001).

    Args:
        q: ``[batch, height, width, heads, head_dim]``; float64, float32, float16 or bfloat16. Any
            strides with a contiguous last axis are read in place.
        k: ``[batch, height, width, heads_kv, head_dim]``; heads must be a multiple of heads_kv.
        v: ``[batch, height, width, heads_kv, head_dim_v]``.
        kernel_size: window size, an int or one per axis; kernel_size * dilation <= extent.
        stride: neighbouring queries that share a window; at most kernel_size.
        dilation: distance between neighbouring keys of a window.
        is_causal: per axis, whether keys after the query are hidden.
        scale: of q . k; head_dim ** -0.5 by default.
        rpb: relative positional bias ``[heads, 2 * k0 - 1, 2 * k1 - 1]``, float32 or q's dtype, added
            unscaled.
        additional_keys: ``[batch, extra, heads_kv, head_dim]``, seen by every query.
        additional_values: ``[batch, extra, heads_kv, head_dim_v]``.
        return_lse: also return the log-sum-exp of the scores; gradients flow through it.
        dropout_p: probability with which an attention weight becomes 0 (the others are divided by
            1 - dropout_p; the LSE is that of all). The seed comes from torch's default generator of q's
            device, without a synchronisation, so `torch.manual_seed` makes it reproducible.
        config: an explicit kernel choice; the planner's own by default.

    Returns:
        ``[batch, height, width, heads, head_dim_v]`` in q's dtype and, if asked for, the LSE
        ``[batch, height, width, heads]`` in float32 (float64 for float64). Differentiable once with
        respect to every tensor.

    Raises:
        ValueError: for anything that is not a valid problem, with the numbers.
        NotImplementedError: for what the device cannot run, and for derivatives of derivatives.
    """
    window = (kernel_size, stride, dilation, is_causal)
    return _call(2, (q, k, v), (rpb, additional_keys, additional_values), window, scale, return_lse, config, dropout_p)


def na1d(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: PerAxis,
    *,
    stride: PerAxis = 1,
    dilation: PerAxis = 1,
    is_causal: PerAxisFlag = False,
    scale: float | None = None,
    rpb: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: bool = False,
    dropout_p: float = 0,
    config: Config | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """1-D neighbourhood attention on ``[batch, length, heads, head_dim]``; otherwise as `na2d`."""
    window = (kernel_size, stride, dilation, is_causal)
    return _call(1, (q, k, v), (rpb, additional_keys, additional_values), window, scale, return_lse, config, dropout_p)


def na3d(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: PerAxis,
    *,
    stride: PerAxis = 1,
    dilation: PerAxis = 1,
    is_causal: PerAxisFlag = False,
    scale: float | None = None,
    rpb: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: bool = False,
    dropout_p: float = 0,
    config: Config | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """3-D neighbourhood attention on ``[batch, depth, height, width, heads, head_dim]``; otherwise as `na2d`."""
    window = (kernel_size, stride, dilation, is_causal)
    return _call(3, (q, k, v), (rpb, additional_keys, additional_values), window, scale, return_lse, config, dropout_p)


def na2d_qkvpacked(
    qkv: Tensor,
    kernel_size: PerAxis,
    *,
    stride: PerAxis = 1,
    dilation: PerAxis = 1,
    is_causal: PerAxisFlag = False,
    scale: float | None = None,
    rpb: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: bool = False,
    dropout_p: float = 0,
    config: Config | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`na2d` on one ``[batch, height, width, 3, heads, head_dim]``, as a linear layer makes it.

    Nothing is copied on the way in, and the gradient is written directly as one tensor of this shape.
    """
    window = (kernel_size, stride, dilation, is_causal)
    return _call(2, (qkv,), (rpb, additional_keys, additional_values), window, scale, return_lse, config, dropout_p)


def na1d_qkvpacked(
    qkv: Tensor,
    kernel_size: PerAxis,
    *,
    stride: PerAxis = 1,
    dilation: PerAxis = 1,
    is_causal: PerAxisFlag = False,
    scale: float | None = None,
    rpb: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: bool = False,
    dropout_p: float = 0,
    config: Config | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`na1d` on one ``[batch, length, 3, heads, head_dim]``; otherwise as `na2d_qkvpacked`."""
    window = (kernel_size, stride, dilation, is_causal)
    return _call(1, (qkv,), (rpb, additional_keys, additional_values), window, scale, return_lse, config, dropout_p)


def na3d_qkvpacked(
    qkv: Tensor,
    kernel_size: PerAxis,
    *,
    stride: PerAxis = 1,
    dilation: PerAxis = 1,
    is_causal: PerAxisFlag = False,
    scale: float | None = None,
    rpb: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: bool = False,
    dropout_p: float = 0,
    config: Config | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`na3d` on one ``[batch, depth, height, width, 3, heads, head_dim]``; otherwise as `na2d_qkvpacked`."""
    window = (kernel_size, stride, dilation, is_causal)
    return _call(3, (qkv,), (rpb, additional_keys, additional_values), window, scale, return_lse, config, dropout_p)


def _call(
    rank: int,
    leading: tuple[Tensor, ...],
    extras: tuple[Tensor | None, ...],
    window_arguments: tuple[PerAxis, PerAxis, PerAxis, PerAxisFlag],
    scale: float | None,
    return_lse: bool,
    config: Config | None,
    dropout_p: float,
) -> Any:
    """Shared by all six: ``leading`` is (q, k, v) or (qkv,), ``extras`` what may be None."""
    # The default 0 is an int because compilers may treat a float as a variable, which this `if` then undoes.
    tensors = (*leading, *extras, None if dropout_p == 0 else _draw_seed(leading[0]))
    if torch.compiler.is_compiling():
        window = ops.encode_window(*[ops.per_axis(rank, argument) for argument in window_arguments])
        out, lse = ops.forward_of(len(leading))(*tensors, window, scale, ops.encode_config(config), dropout_p)
        return (out, lse) if return_lse else out
    results = eager.attend(rank, window_arguments, scale, return_lse, config, dropout_p, tensors)
    if results is None:
        window = window_of(rank, *window_arguments)
        results = _dispatched(window, scale, config, dropout_p, leading, extras, tensors)
    return (results[0], results[1]) if return_lse else results[0]


def _dispatched(window, scale, config, dropout_p, leading, extras, tensors) -> tuple[Tensor, Tensor]:
    """Through the dispatcher, or whatever else looks on."""
    _check_tensors(leading, extras)
    if not torch._C._are_functorch_transforms_active():
        return ops.forward_of(len(leading))(*tensors, *ops.call_arguments(window, scale, config, dropout_p))
    if torch.is_autocast_enabled(leading[0].device.type):
        tensors = transforms.cast_operands(tensors, len(leading), leading[0].device.type)
    return transforms.Transformed.apply(window, scale, config, dropout_p, *tensors)


def _draw_seed(like: Any) -> Tensor | None:
    """32 random bits where the tensors are, so that nobody waits for them and graphs draw anew."""
    if not isinstance(like, Tensor):
        return None
    return torch.randint(-(1 << 31), 1 << 31, (1,), dtype=torch.int32, device=like.device)


def _check_tensors(leading: tuple, extras: tuple) -> None:
    """Raises TypeError for what is no tensor, NotImplementedError for forward-mode differentiation."""
    names = ("q", "k", "v") if len(leading) == 3 else ("qkv",)
    given = zip((*names, "rpb", "additional_keys", "additional_values"), (*leading, *extras), strict=True)
    for name, tensor in given:
        if tensor is None and name not in names:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(launch.NO_TENSOR.format(name, type(tensor).__name__))
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                f"{name} carries a tangent: forward-mode differentiation is not supported; use reverse mode."
            )
