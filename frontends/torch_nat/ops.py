"""The operations as torch's dispatcher knows them: torch.ops.natcore.*.

Four operations, forward and backward, each also in the form that takes one packed qkv. Registered for
each: CPU and CUDA kernels, shapes (fake tensors, meta), autograd, vmap, autocast. The public functions
come here whenever something other than plain eager execution looks on (see functional.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from operator import index
from typing import Any

import torch
from torch import Tensor

from natcore.planning import Config
from natcore.problem import check_packed, problem_of
from natcore.recent import find, recents
from natcore.window import Window
from torch_nat import launch

_C, _KEYS = torch._C, torch._C.DispatchKey

#: Four lists of integers would cost a call 2.5 us, so the window comes as text; see `encode_window`.
_CALL = "str window, float? scale, str? config, float dropout_p"
#: How many arguments are no tensors.
_CALL_ARGUMENTS = 4
_EXTRAS = "Tensor? rpb, Tensor? additional_keys, Tensor? additional_values, Tensor? dropout_seed"
_SAVED = "Tensor out, Tensor lse, Tensor? d_lse"

#: A backward returns the gradients of the tensors that were given, in their order.
SCHEMAS = {
    "attention": f"(Tensor q, Tensor k, Tensor v, {_EXTRAS}, {_CALL}) -> (Tensor out, Tensor lse)",
    "attention_backward": f"(Tensor d_out, Tensor q, Tensor k, Tensor v, {_SAVED}, {_EXTRAS}, {_CALL}) -> Tensor[]",
    "attention_packed": f"(Tensor qkv, {_EXTRAS}, {_CALL}) -> (Tensor out, Tensor lse)",
    "attention_packed_backward": f"(Tensor d_out, Tensor qkv, {_SAVED}, {_EXTRAS}, {_CALL}) -> Tensor[]",
}

LIBRARY = torch.library.Library("natcore", "DEF")
for _name, _schema in SCHEMAS.items():
    LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))


def call_arguments(window: Window, scale: float | None, config: Config | None, dropout_p: float) -> tuple:
    """The trailing arguments of every operation."""
    return encoded(window), scale, encode_config(config), dropout_p


def encoded(window: Window) -> str:
    return encode_window(window.kernel_size, window.stride, window.dilation, window.is_causal)


def per_axis(rank: int, argument: Any) -> Sequence[Any]:
    """For a compiler to trace; the operation itself checks the entries."""
    return [argument] * rank if isinstance(argument, int) else list(argument)


def encode_window(
    kernel_size: Sequence[int], stride: Sequence[int], dilation: Sequence[int], is_causal: Sequence[bool]
) -> str:
    """ "kernel_size=7,7 stride=1,1 dilation=1,1 is_causal=0,0" """
    k, s, d = [",".join([str(index(entry)) for entry in entries]) for entries in (kernel_size, stride, dilation)]
    causal = ",".join(["1" if entry else "0" for entry in is_causal])
    return f"kernel_size={k} stride={s} dilation={d} is_causal={causal}"


@lru_cache(maxsize=1024)
def decode_window(text: str) -> Window:
    """Raises ValueError as `Window.of`."""
    lists = {name: entries.split(",") for name, _, entries in (part.partition("=") for part in text.split())}
    causal = [entry == "1" for entry in lists.pop("is_causal")]
    rank = len(lists["kernel_size"])
    return Window.of(rank, **{name: [int(x) for x in entries] for name, entries in lists.items()}, is_causal=causal)


def encode_config(config: Config | None) -> str | None:
    """ "kernel:name=value,name=value", since a schema knows no such type."""
    if config is None:
        return None
    return config.kernel + ":" + ",".join([f"{name}={value}" for name, value in config.options])


@lru_cache(maxsize=256)
def decode_config(text: str | None) -> Config | None:
    if text is None:
        return None
    kernel, _, options = text.partition(":")
    pairs = (option.split("=") for option in options.split(",") if option)
    return Config(kernel, tuple((name, int(value)) for name, value in pairs))


def forward_of(leading: int) -> Callable[..., tuple[Tensor, Tensor]]:
    """The operation on q, k, v (3 leading tensors) or on one packed qkv (1)."""
    return torch.ops.natcore.attention if leading == 3 else torch.ops.natcore.attention_packed


def backward_of(leading: int) -> Callable[..., list[Tensor]]:
    return torch.ops.natcore.attention_backward if leading == 3 else torch.ops.natcore.attention_packed_backward


# CPU and CUDA kernels.

_recent, _recent_backward = recents(), recents()


def _attention(*args):
    *tensors, window, scale, config, dropout_p = args
    recent = _recent(window, config, dropout_p, tensors[0].shape, *map(type, tensors))
    prepared = find(recent, tensors)
    if prepared is None:
        described = [None if t is None else launch.describe(t) for t in tensors]
        prepared = launch.prepare_forward(decode_window(window), decode_config(config), dropout_p, True, *described)
        assert prepared is not None  # the kernels are registered for CPU and CUDA alone
        launch.remember(recent, tensors, prepared)
    return tuple(launch.run(prepared, scale, tensors))


_attention_packed = _attention


def _attention_backward(d_out, q, k, v, out, lse, d_lse, *rest):
    return _backward((d_out, out, lse, d_lse), (q, k, v), *rest)


def _attention_packed_backward(d_out, qkv, out, lse, d_lse, *rest):
    return _backward((d_out, out, lse, d_lse), (qkv,), *rest)


def _backward(saved, leading, rpb, keys, values, seed, window, scale, config, dropout_p):
    tensors = (*leading, rpb, keys, values, seed)
    types = map(type, (*saved, *tensors))
    recent = _recent_backward(window, config, dropout_p, leading[0].shape, *types)
    kind = decode_window(window), decode_config(config), dropout_p
    return [g for g in launch.backward(recent, kind, scale, saved, tensors) if g is not None]


# Shapes alone. The checks are those of the kernels, so that a bad problem fails when it is traced.


def _attention_fake(q, k, v, rpb, keys, values, seed, window, scale, config, dropout_p):
    given = {"q": q, "k": k, "v": v, "rpb": rpb, "additional_keys": keys, "additional_values": values}
    given["dropout_seed"] = seed
    views = {name: None if t is None else launch.view_of(name, launch.describe(t)) for name, t in given.items()}
    problem_of(decode_window(window), views, dropout_p)
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty(q.shape[:-1], dtype=lse_dtype)


def _attention_packed_fake(qkv, rpb, keys, values, seed, window, *rest):
    check_packed(decode_window(window).rank, qkv.shape)
    q, k, v = qkv.unbind(-3)
    return _attention_fake(q, k, v, rpb, keys, values, seed, window, *rest)


def _attention_backward_fake(d_out, q, k, v, out, lse, d_lse, rpb, keys, values, *_):
    return [t.new_empty(t.shape) for t in (q, k, v, rpb, keys, values) if t is not None]


def _attention_packed_backward_fake(d_out, qkv, out, lse, d_lse, rpb, keys, values, *_):
    return [t.new_empty(t.shape) for t in (qkv, rpb, keys, values) if t is not None]


# Autograd. One pair of functions serves both forms: ``leading`` counts q, k, v or qkv.


def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    tensors, ctx.call = inputs[:-_CALL_ARGUMENTS], inputs[-_CALL_ARGUMENTS:]
    ctx.set_materialize_grads(False)  # a loss that does not use the LSE gives no d_lse
    ctx.save_for_backward(*tensors, *output)


def formula(run: Callable[..., Sequence[Tensor]], leading: int) -> Callable[..., tuple[Tensor | None, ...]]:
    """The gradients of every argument, None for the seed and what is no tensor, by the backward operation ``run``."""

    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, out, lse = ctx.saved_tensors
        d_out = torch.zeros_like(out) if d_out is None else d_out
        gradients = run(d_out, *tensors[:leading], out, lse, d_lse, *tensors[leading:], *ctx.call)
        return *given_gradients(tensors[:-1], gradients), None, *(None for _ in ctx.call)

    return backward


def given_gradients(tensors: Sequence[Tensor | None], gradients: Sequence[Tensor]) -> list[Tensor | None]:
    """What a backward operation returned, with None where a tensor was absent."""
    found = iter(gradients)
    return [None if tensor is None else next(found) for tensor in tensors]


def _refuse(ctx: Any, *_: Any) -> None:
    raise NotImplementedError(DOUBLE_BACKWARD)


DOUBLE_BACKWARD = (
    "the gradient of neighbourhood attention cannot be differentiated again (double backward). "
    "Detach it, or take second derivatives through dense attention with a mask."
)


#: The dispatch keys of a call on plain tensors: a device's and its autograd's. Nobody else looks on.
_PLAIN = {
    (_C.DispatchKeySet(getattr(_KEYS, key)) | _C.DispatchKeySet(getattr(_KEYS, f"Autograd{key}"))).raw_repr()
    for key in ("CPU", "CUDA")
}


class _Recorded(torch.autograd.Function):
    """One call of an operation that autograd records; ``formula`` gives the gradients of its arguments."""

    @staticmethod
    def forward(ctx: Any, below: Callable[..., Sequence[Tensor]], formula: Callable, *arguments: Any):
        output = tuple(below(*arguments))
        ctx.formula = formula
        if formula is not _refuse:
            setup_context(ctx, arguments, output)  # pyright: ignore[reportArgumentType]  # out and lse
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None):
        return None, None, *ctx.formula(ctx, *gradients)


def _autograd(name: str, formula: Callable) -> Callable[..., Sequence[Tensor]]:
    """The kernel for autograd's key. What torch.library.register_autograd makes would do, but compiled graphs call
    operations with nothing to record, and pay for a second way through the dispatcher: here they go straight on."""
    operation, kernel = getattr(torch.ops.natcore, name).default, globals()[f"_{name}"]

    def below(keys: Any, *arguments: Any) -> Sequence[Tensor]:
        with _C._AutoDispatchBelowAutograd():
            return operation.redispatch(keys & _C._after_autograd_keyset, *arguments)

    def autograd(keys: Any, *arguments: Any) -> Sequence[Tensor]:
        if torch.is_grad_enabled() and _C._any_requires_grad(*arguments):
            output = _Recorded.apply(partial(below, keys), formula, *arguments)
            return list(output) if formula is _refuse else output
        return kernel(*arguments) if keys.raw_repr() in _PLAIN else below(keys, *arguments)

    return autograd


def _register() -> None:
    formulas = {"attention": formula(backward_of(3), 3), "attention_packed": formula(backward_of(1), 1)}
    for name in SCHEMAS:
        kernel, fake = globals()[f"_{name}"], globals()[f"_{name}_fake"]
        for key in ("CPU", "CUDA"):
            LIBRARY.impl(name, kernel, key)
        torch.library.register_fake(f"natcore::{name}", fake, lib=LIBRARY)
        LIBRARY.impl(name, _autograd(name, formulas.get(name, _refuse)), "Autograd", with_keyset=True)


_register()
