"""Plain eager calls: straight to `launch`, recorded by an autograd.Function where a gradient is needed.

Everything here runs once per call, and the host's microseconds are counted (benchmarks/latency.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from natcore.planning import Config
from natcore.recent import find, recents
from natcore.window import Window, window_of
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


_recent = recents()


def attend(
    rank: int,
    window_arguments: tuple[Any, Any, Any, Any],
    scale: float | None,
    return_lse: bool,
    config: Config | None,
    dropout_p: float,
    tensors: tuple[Any, ...],
) -> Sequence[Any] | None:
    """out, and lse where asked for, of q, k, v or qkv, and the extras (see `launch.run`).

    None if the dispatcher is needed.
    """
    if is_looked_on():
        return None
    try:
        asked = return_lse, config, dropout_p, torch.is_grad_enabled()
        recent = _recent(rank, *window_arguments, *asked, tensors[0].shape, *map(type, tensors))
    except (TypeError, AttributeError):  # lists, and what is no tensor
        recent = []
    found = find(recent, tensors)
    if found is None:
        found = _prepare(window_of(rank, *window_arguments), return_lse, config, dropout_p, tensors)
        if found is None:
            return None
        launch.remember(recent, tensors, found)
    prepared, kind = found
    if kind is None:
        return launch.run(prepared, scale, tensors)
    results = _Attention.apply((prepared, kind, scale, return_lse), *tensors)
    return results if return_lse else (results,)


def _prepare(
    window: Window, return_lse: bool, config: Config | None, dropout_p: float, tensors: tuple[Any, ...]
) -> tuple[launch.Prepared, launch.Kind | None] | None:
    """The call, and its kind where a gradient is needed; None if the dispatcher is."""
    described = [None if t is None else launch.describe(t) if _is_plain(t) else () for t in tensors]
    with_grad = torch.is_grad_enabled() and any(getattr(t, "requires_grad", False) for t in tensors)
    kind = window, config, dropout_p
    prepared = launch.prepare_forward(*kind, return_lse or with_grad, *described)
    return None if prepared is None else (prepared, kind if with_grad else None)


class _Attention(torch.autograd.Function):
    """The gradient of a plain eager call; the dispatcher's counterpart is in `ops`."""

    @staticmethod
    def forward(ctx: Any, call: tuple[launch.Prepared, launch.Kind, float | None, bool], *tensors: Any):
        prepared, _, scale, return_lse = ctx.call = call
        out, lse = launch.run(prepared, scale, tensors)
        ctx.save_for_backward(*tensors, out, lse)
        if not return_lse:
            return out
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None = None):
        # What marks the gradients as not differentiable takes its time, and is needed only under create_graph.
        return _gradients_once(ctx, d_out, d_lse) if torch.is_grad_enabled() else _gradients(ctx, d_out, d_lse)


def _gradients(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of the call (None), and of every tensor."""
    *tensors, out, lse = ctx.saved_tensors
    prepared, kind, scale, _ = ctx.call
    if d_out is None:
        d_out = torch.zeros_like(out)
    looked_on = torch.compiler.is_compiling() or is_looked_on()
    if not looked_on and _is_plain(d_out) and (d_lse is None or _is_plain(d_lse)):
        recent = prepared.gradients[d_lse is None]
        return None, *launch.backward(recent, kind, scale, (d_out, out, lse, d_lse), tensors), None
    window, config, dropout_p = kind
    leading = len(tensors) - launch.EXTRAS
    saved, arguments = (out, lse, d_lse), ops.call_arguments(window, scale, config, dropout_p)
    found = ops.backward_of(leading)(d_out, *tensors[:leading], *saved, *tensors[leading:], *arguments)
    return None, *ops.given_gradients(tensors[:-1], found), None


_gradients_once = once_differentiable(_gradients)
