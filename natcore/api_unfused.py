"""The public door to unfused attention: arrays in, arrays of the same kind out."""

from __future__ import annotations

from typing import Any

from natcore.api import PerAxis, PerAxisFlag, documented
from natcore.planning import Config
from natcore.problem import OPERANDS, RESULTS, Direction
from natcore.session import Session
from natcore.unfused import AVGradients, QKGradients
from natcore.window import Window, window_of


def _call(
    direction: Direction, arrays: tuple, window: Window, scale: float, config: Config | None, stream: Any
) -> list[Any]:
    """The results of a call on its inputs, in the order of OPERANDS."""
    names, number = OPERANDS[direction], len(RESULTS[direction])
    for name, array in zip(names, arrays, strict=False):
        if array is None and name != "rpb" and not name.startswith("additional"):
            raise ValueError(f"{name} is None; it is required.")
    session = Session(names[0], arrays[0], stream)
    session.read(names[: len(arrays)], arrays)
    session.skip(number)
    return session.run(direction, window, scale, config)[-number:]


def _make_qk(rank: int):
    def scores(
        q: Any, k: Any, kernel_size: PerAxis, *, stride: PerAxis = 1, dilation: PerAxis = 1,
        is_causal: PerAxisFlag = False, scale: float = 1.0, rpb: Any = None, additional_keys: Any = None,
        config: Config | None = None, stream: Any = None,
    ) -> Any:  # fmt: skip
        window = window_of(rank, kernel_size, stride, dilation, is_causal)
        return _call("qk", (q, k, rpb, additional_keys), window, scale, config, stream)[0]

    return documented(scores, f"na{rank}d_qk", _QK_DOC, rank)


def _make_qk_backward(rank: int):
    def differentiate(
        d_scores: Any, q: Any, k: Any, kernel_size: PerAxis, *, stride: PerAxis = 1, dilation: PerAxis = 1,
        is_causal: PerAxisFlag = False, scale: float = 1.0, rpb: Any = None, additional_keys: Any = None,
        config: Config | None = None, stream: Any = None,
    ) -> QKGradients:  # fmt: skip
        window = window_of(rank, kernel_size, stride, dilation, is_causal)
        arrays = (d_scores, q, k, rpb, additional_keys)
        return QKGradients(*_call("qk_backward", arrays, window, scale, config, stream))

    return documented(differentiate, f"na{rank}d_qk_backward", _QK_BACKWARD_DOC, rank)


def _make_av(rank: int):
    def sums(
        weights: Any, v: Any, kernel_size: PerAxis, *, stride: PerAxis = 1, dilation: PerAxis = 1,
        is_causal: PerAxisFlag = False, additional_values: Any = None, config: Config | None = None,
        stream: Any = None,
    ) -> Any:  # fmt: skip
        window = window_of(rank, kernel_size, stride, dilation, is_causal)
        return _call("av", (weights, v, additional_values), window, 1.0, config, stream)[0]

    return documented(sums, f"na{rank}d_av", _AV_DOC, rank)


def _make_av_backward(rank: int):
    def differentiate(
        d_out: Any, weights: Any, v: Any, kernel_size: PerAxis, *, stride: PerAxis = 1, dilation: PerAxis = 1,
        is_causal: PerAxisFlag = False, additional_values: Any = None, config: Config | None = None,
        stream: Any = None,
    ) -> AVGradients:  # fmt: skip
        window = window_of(rank, kernel_size, stride, dilation, is_causal)
        arrays = (d_out, weights, v, additional_values)
        return AVGradients(*_call("av_backward", arrays, window, 1.0, config, stream))

    return documented(differentiate, f"na{rank}d_av_backward", _AV_BACKWARD_DOC, rank)


_PLACES = """
Places, the last axis of scores and weights, are row-major over the window, counted from the first key
that the query sees on each axis; the additional keys follow. A causal query sees fewer keys: on that
axis its last places are empty (scores -infinity, weights ignored).
"""
_COMMON = """
    stride, dilation, is_causal, config, stream: as in `na{rank}d`, as are dtypes, layouts and errors.
"""
_QK_DOC = (
    """The scores of {rank}-D neighborhood attention: scale * q . k + rpb, before the softmax.

    q: [batch, {axes}, heads, head_dim].
    k: [batch, {axes}, heads_kv, head_dim]; heads % heads_kv == 0.
    kernel_size: int or one int per spatial axis.
    scale: 1 by default, since callers of the unfused form scale q themselves.
    rpb: relative positional bias [heads, {rpb_axes}], float32 or q's dtype, added unscaled.
    additional_keys: [batch, extra, heads_kv, head_dim], seen by every query."""
    + _COMMON
    + _PLACES
    + """
Returns scores [batch, {axes}, heads, places] in q's dtype.
"""
)
_QK_BACKWARD_DOC = (
    """Gradients of `na{rank}d_qk`, deterministic.

    d_scores: gradient of the scores; ignored where a query sees no key.
    q, k, kernel_size, scale, rpb, additional_keys: as in `na{rank}d_qk`."""
    + _COMMON
    + """
Returns `natcore.QKGradients`: dq, dk, drpb, d_additional_keys; None for what was not given.
"""
)
_AV_DOC = (
    """Weighted sums over {rank}-D neighborhoods: attention after the softmax.

    weights: [batch, {axes}, heads, places].
    v: [batch, {axes}, heads_kv, head_dim] in the dtype of the weights; heads % heads_kv == 0.
    kernel_size: int or one int per spatial axis.
    additional_values: [batch, extra, heads_kv, head_dim]."""
    + _COMMON
    + _PLACES
    + """
Returns out [batch, {axes}, heads, head_dim].
"""
)
_AV_BACKWARD_DOC = (
    """Gradients of `na{rank}d_av`, deterministic.

    d_out: gradient of out, [batch, {axes}, heads, head_dim].
    weights, v, kernel_size, additional_values: as in `na{rank}d_av`."""
    + _COMMON
    + """
Returns `natcore.AVGradients`: d_weights (0 where a query sees no key), dv, d_additional_values; None for
what was not given.
"""
)

na1d_qk, na2d_qk, na3d_qk = (_make_qk(rank) for rank in (1, 2, 3))
na1d_qk_backward, na2d_qk_backward, na3d_qk_backward = (_make_qk_backward(rank) for rank in (1, 2, 3))
na1d_av, na2d_av, na3d_av = (_make_av(rank) for rank in (1, 2, 3))
na1d_av_backward, na2d_av_backward, na3d_av_backward = (_make_av_backward(rank) for rank in (1, 2, 3))
