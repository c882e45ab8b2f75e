"""The public door: arrays in, arrays of the same kind out. What is unfused stands in `natcore.api_unfused`.

`Gradients` and everything else that is checked lives in `natcore.problem`; how arrays are read and
made, in `natcore.arrays`; how a call is prepared and run, in `natcore.session`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from natcore.planning import Config
from natcore.problem import OPERANDS, Gradients
from natcore.session import attend

PerAxis = int | Sequence[int]
PerAxisFlag = bool | Sequence[bool]
#: Of the arrays that are handed in, results left out.
_NAMES = OPERANDS["forward"][:6]
_PACKED_NAMES = ("qkv", *_NAMES[3:])
_BACKWARD_NAMES = OPERANDS["backward"][:10]
_NO_GRADIENTS = (None,) * len(Gradients._fields)


def _forward(arrays, extras, window_arguments, scale, return_lse, dropout, out, config, stream):
    """``arrays``: q, k and v, or (qkv,)."""
    names, unwanted = _NAMES if len(arrays) == 3 else _PACKED_NAMES, None if return_lse else "lse"
    results = attend(
        "forward", names, (*arrays, *extras), (out, None), window_arguments, scale, config, dropout, unwanted, stream
    )
    answer = results[-2] if out is None else out
    return (answer, results[-1]) if return_lse else answer


def _make_forward(rank: int):
    def attend(
        q: Any, k: Any, v: Any, kernel_size: PerAxis, *, stride: PerAxis = 1, dilation: PerAxis = 1,
        is_causal: PerAxisFlag = False, scale: float | None = None, rpb: Any = None, additional_keys: Any = None,
        additional_values: Any = None, return_lse: bool = False, dropout_p: float = 0.0,
        dropout_seed: int | None = None, out: Any = None, config: Config | None = None, stream: Any = None,
    ) -> Any:  # fmt: skip
        window, extras = (rank, kernel_size, stride, dilation, is_causal), (rpb, additional_keys, additional_values)
        dropout = (dropout_p, dropout_seed)
        return _forward((q, k, v), extras, window, scale, return_lse, dropout, out, config, stream)

    return documented(attend, f"na{rank}d", _FORWARD_DOC, rank)


def _make_packed(rank: int):
    def attend(
        qkv: Any, kernel_size: PerAxis, *, stride: PerAxis = 1, dilation: PerAxis = 1,
        is_causal: PerAxisFlag = False, scale: float | None = None, rpb: Any = None, additional_keys: Any = None,
        additional_values: Any = None, return_lse: bool = False, dropout_p: float = 0.0,
        dropout_seed: int | None = None, out: Any = None, config: Config | None = None, stream: Any = None,
    ) -> Any:  # fmt: skip
        window, extras = (rank, kernel_size, stride, dilation, is_causal), (rpb, additional_keys, additional_values)
        dropout = (dropout_p, dropout_seed)
        return _forward((qkv,), extras, window, scale, return_lse, dropout, out, config, stream)

    return documented(attend, f"na{rank}d_qkvpacked", _PACKED_DOC, rank)


def _make_backward(rank: int):
    def differentiate(
        d_out: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, kernel_size: PerAxis, *, stride: PerAxis = 1,
        dilation: PerAxis = 1, is_causal: PerAxisFlag = False, scale: float | None = None, rpb: Any = None,
        additional_keys: Any = None, additional_values: Any = None, d_lse: Any = None, dropout_p: float = 0.0,
        dropout_seed: int | None = None, config: Config | None = None, stream: Any = None,
    ) -> Gradients:  # fmt: skip
        arrays = (d_out, q, k, v, out, lse, d_lse, rpb, additional_keys, additional_values)
        for name, array in (("d_out", d_out), ("out", out), ("lse", lse)):
            if array is None:
                raise ValueError(f"{name} is None; the backward needs it (call na{rank}d with return_lse=True).")
        window, dropout = (rank, kernel_size, stride, dilation, is_causal), (dropout_p, dropout_seed)
        results = attend(
            "backward", _BACKWARD_NAMES, arrays, _NO_GRADIENTS, window, scale, config, dropout, None, stream
        )
        return Gradients(*results[-len(_NO_GRADIENTS) :])

    return documented(differentiate, f"na{rank}d_backward", _BACKWARD_DOC, rank)


_ARGUMENTS_DOC = """
    kernel_size, stride, dilation: int or one int per spatial axis, with kernel_size * dilation <=
        extent and 1 <= stride <= kernel_size.
    is_causal: bool or one bool per spatial axis.
    scale: factor on q . k before the softmax; default head_dim ** -0.5. 0 and negatives count.
    rpb: relative positional bias [heads, {rpb_axes}], float32 or q's dtype, added unscaled
        (Hassani et al., "Neighborhood Attention Transformer", CVPR 2023, eq. 2).
    additional_keys, additional_values: [batch, extra, heads_kv, head_dim], seen by every query.
    dropout_p, dropout_seed: the probability in [0, 1) with which an attention weight becomes 0 (the others
        are divided by 1 - dropout_p; lse is that of all), and an int in [0, 2 ** 32). The same seed drops
        the same weights on every device, forward and backward (see natcore.reference_dropout).
    config: an explicit `natcore.Config` in place of the planner's choice.
    stream: CUDA stream (int handle or stream object); default: the producer's current stream.

float64, float32, float16 or bfloat16; sums are in float32 or better. Any strides with a contiguous
last axis, never copied. Arrays may be NumPy's, or torch, CuPy, JAX or array-API arrays with
``__dlpack__``, on the CPU or a CUDA device.

Raises ValueError (naming argument, axis and numbers) for an invalid problem, NotImplementedError
(naming the nearest supported case) for one that the device's backend cannot run.
"""
_FORWARD_DOC = (
    """{rank}-D neighborhood attention: every query attends to its nearest kernel_size keys.

    q: [batch, {axes}, heads, head_dim].
    k, v: [batch, {axes}, heads_kv, head_dim]; heads % heads_kv == 0; v may have its own head_dim."""
    + _ARGUMENTS_DOC
    + """
Returns out [batch, {axes}, heads, head_dim of v], of q's kind on q's device (``out`` if given);
with return_lse also the log-sum-exp of the scores [batch, {axes}, heads], natural log, float32
(float64 for float64 inputs).
"""
)
_PACKED_DOC = (
    """As `na{rank}d` on one packed array, with no copy.

    qkv: [batch, {axes}, 3, heads, head_dim]."""
    + _ARGUMENTS_DOC
    + """
Returns what `na{rank}d` returns.
"""
)
_BACKWARD_DOC = (
    """Gradients of `na{rank}d`, deterministic.

    d_out: gradient of out, [batch, {axes}, heads, head_dim of v].
    q, k, v, out, lse: what went into and came out of `na{rank}d`.
    d_lse: gradient of lse, or None."""
    + _ARGUMENTS_DOC
    + """
Returns `natcore.Gradients`: dq, dk, dv, drpb, d_additional_keys, d_additional_values, each of its
input's shape and dtype; None for what was not given.
"""
)


def documented(function: Any, name: str, doc: str, rank: int) -> Any:
    axes = ", ".join(("length",) if rank == 1 else ("depth", "height", "width")[-rank:])
    rpb_axes = ", ".join(["2 * kernel - 1"] * rank)
    function.__name__ = function.__qualname__ = name
    function.__doc__ = doc.format(rank=rank, axes=axes, rpb_axes=rpb_axes)
    return function


na1d, na2d, na3d = (_make_forward(rank) for rank in (1, 2, 3))
na1d_qkvpacked, na2d_qkvpacked, na3d_qkvpacked = (_make_packed(rank) for rank in (1, 2, 3))
na1d_backward, na2d_backward, na3d_backward = (_make_backward(rank) for rank in (1, 2, 3))
