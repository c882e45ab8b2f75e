"""Plain eager calls: straight to `launch`, recorded by an autograd.Function where a gradient is needed.

Everything here runs once per call, and the host's microseconds are counted (benchmarks/latency.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from natcore.planning import Config
from natcore.window import Window
from torch_nat import launch, ops

_C = torch._C
_PLAIN_TYPES = (Tensor, torch.nn.Parameter)

#: What one call is beside its tensors: window, scale, config, dropout_p.
Call = tuple[Window, float | None, Config | None, float]


def is_plain(tensors: tuple[Any, ...]) -> bool:
    """Whether nobody but autograd looks on, so that the dispatcher may be left out. None counts as plain."""
    if (
        _C._len_torch_dispatch_stack()
        or _C._len_torch_function_stack()
        or _C._are_functorch_transforms_active()
        or _C._is_any_autocast_enabled()
        or _C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    ):
        return False
    for x in tensors:  # a generator would cost a microsecond
        if x is not None and (type(x) not in _PLAIN_TYPES or not (x.is_cuda or x.is_cpu) or x.is_neg()):
            return False
    return True


def attend(call: Call, with_lse: bool, tensors: tuple[Any, ...]) -> tuple[Tensor, Tensor | None]:
    """out, and lse where asked for, of plain tensors: q, k, v or qkv, and the extras (see `launch.forward`)."""
    if torch.is_grad_enabled() and True in [x is not None and x.requires_grad for x in tensors]:
        return _Attention.apply(call, *tensors)
    return launch.forward(*call, with_lse, tensors)


class _Attention(torch.autograd.Function):
    """The gradient of a plain eager call; the dispatcher's counterpart is in `ops`."""

    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Any):
        ctx.call = call
        ctx.set_materialize_grads(False)
        out, lse = launch.forward(*call, True, tensors)
        ctx.save_for_backward(*tensors, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None):
        # What marks the gradients as not differentiable takes its time, and is needed only under create_graph.
        return _gradients_once(ctx, d_out, d_lse) if torch.is_grad_enabled() else _gradients(ctx, d_out, d_lse)


def _gradients(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of the call (None), and of every tensor."""
    *tensors, out, lse = ctx.saved_tensors
    if d_out is None:
        d_out = torch.zeros_like(out)
    if is_plain((d_out, d_lse)) and not torch.compiler.is_compiling():
        return None, *launch.backward(*ctx.call, (d_out, out, lse, d_lse), tensors), None
    leading = len(tensors) - launch.EXTRAS
    arguments = ops.window_arguments(*ctx.call)
    gradients = ops.backward_of(leading)(d_out, *tensors[:leading], out, lse, d_lse, *tensors[leading:], *arguments)
    return None, *(None if t is None else gradient for t, gradient in zip(tensors, gradients, strict=False)), None


_gradients_once = once_differentiable(_gradients)
