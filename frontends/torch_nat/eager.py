"""Plain eager calls: straight to `launch`, recorded by an autograd.Function where a gradient is needed.

Everything here runs once per call, and the host's microseconds are counted (benchmarks/latency.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from torch_nat import launch, ops

_C = torch._C
_PLAIN_TYPES = (Tensor, torch.nn.Parameter)


def is_looked_on() -> bool:
    """Whether somebody but autograd looks on in this thread, so that the dispatcher may not be left out."""
    return bool(
        _C._len_torch_dispatch_stack()
        or _C._len_torch_function_stack()
        or _C._are_functorch_transforms_active()
        or _C._is_any_autocast_enabled()
        or _C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )


def _is_plain(tensor: Any) -> bool:
    """Whether a tensor's memory, on whatever device, is all there is to it."""
    return type(tensor) in _PLAIN_TYPES and not tensor.is_neg()


def attend(call: launch.Call, with_lse: bool, tensors: tuple[Any, ...]) -> tuple[Tensor, Tensor | None] | None:
    """out, and lse where asked for, of q, k, v or qkv, and the extras (see `launch.forward`).

    None if the dispatcher is needed.
    """
    if is_looked_on():
        return None
    described = [  # launch.describe written out: microseconds count
        None
        if t is None
        else (t.shape, t.is_contiguous() or t.stride(), t.dtype, t.device)
        if type(t) in _PLAIN_TYPES and not t.is_neg()
        else ()
        for t in tensors
    ]
    with_grad = torch.is_grad_enabled() and True in [getattr(t, "requires_grad", False) for t in tensors]
    prepared = launch.prepare_forward(call[0], call[2], call[3], with_lse or with_grad, *described)
    if prepared is None:
        return None
    return _Attention.apply(call, prepared, *tensors) if with_grad else launch.forward(prepared, call[1], tensors)


class _Attention(torch.autograd.Function):
    """The gradient of a plain eager call; the dispatcher's counterpart is in `ops`."""

    @staticmethod
    def forward(ctx: Any, call: launch.Call, prepared: launch.Prepared, *tensors: Any):
        ctx.call = call
        ctx.set_materialize_grads(False)
        out, lse = launch.forward(prepared, call[1], tensors)
        ctx.save_for_backward(*tensors, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None):
        # What marks the gradients as not differentiable takes its time, and is needed only under create_graph.
        return _gradients_once(ctx, d_out, d_lse) if torch.is_grad_enabled() else _gradients(ctx, d_out, d_lse)


def _gradients(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of the call and its preparation (None), and of every tensor."""
    *tensors, out, lse = ctx.saved_tensors
    if d_out is None:
        d_out = torch.zeros_like(out)
    looked_on = torch.compiler.is_compiling() or is_looked_on()
    if not looked_on and _is_plain(d_out) and (d_lse is None or _is_plain(d_lse)):
        return None, None, *launch.backward(ctx.call, (d_out, out, lse, d_lse), tensors), None
    leading = len(tensors) - launch.EXTRAS
    arguments = ops.window_arguments(*ctx.call)
    gradients = ops.backward_of(leading)(d_out, *tensors[:leading], out, lse, d_lse, *tensors[leading:], *arguments)
    return None, None, *(None if t is None else gradient for t, gradient in zip(tensors, gradients, strict=False)), None


_gradients_once = once_differentiable(_gradients)
