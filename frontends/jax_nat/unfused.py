"""Unfused attention for JAX: na1d_qk, na1d_av, ...; and merging attentions.

na2d_qk -> checks (trace time) -> _scores: custom_vjp -> the primitive of fused attention, other direction
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_nat.functional import PerAxis, PerAxisFlag, documented, like, number, varying_alike, view_of
from jax_nat.primitive import Request, run
from natcore.merging import check_mergeable, combine
from natcore.planning import Config
from natcore.problem import GRADIENTS, Direction, Problem, Window
from natcore.unfused import unfused_problem_of


class _Static(NamedTuple):
    """What a traced call does not trace."""

    direction: Direction
    problem: Problem
    scale: float
    config: Config | None


_RESULTS = {"qk": "scores", "av": "out"}


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _call(static: _Static, arrays: dict[str, jax.Array]) -> jax.Array:
    request = Request(static.direction, static.problem, False, static.scale, static.config)
    return run(request, arrays)[_RESULTS[static.direction]]


def _forward(static: _Static, arrays: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
    return _call(static, arrays), arrays


def _backward(static: _Static, arrays: dict[str, jax.Array], cotangent: jax.Array) -> tuple[dict[str, jax.Array]]:
    direction: Any = static.direction + "_backward"
    request = Request(direction, static.problem, False, static.scale, static.config)
    gradients = run(request, arrays | {"d_" + _RESULTS[static.direction]: cotangent})
    return ({name: like(x, gradients[GRADIENTS[name]]) for name, x in arrays.items()},)


_call.defvjp(_forward, _backward)
_call_jit = jax.jit(_call, static_argnums=0)


def _checked(
    direction: Direction, rank: int, operands: dict[str, Any], window: tuple, scale: Any, config: Config | None
) -> jax.Array:
    arrays = {name: jnp.asarray(x) for name, x in operands.items() if x is not None}
    problem = unfused_problem_of(direction, Window.of(rank, *window), {n: view_of(x) for n, x in arrays.items()})
    return _call_jit(_Static(direction, problem, number("scale", scale), config), varying_alike(arrays))


def _make_qk(rank: int) -> Any:
    def scores(
        q: jax.Array, k: jax.Array, kernel_size: PerAxis, *, stride: PerAxis = 1, dilation: PerAxis = 1,
        is_causal: PerAxisFlag = False, scale: float = 1.0, rpb: jax.Array | None = None,
        additional_keys: jax.Array | None = None, config: Config | None = None,
    ) -> jax.Array:  # fmt: skip
        operands = {"q": q, "k": k, "rpb": rpb, "additional_keys": additional_keys}
        return _checked("qk", rank, operands, (kernel_size, stride, dilation, is_causal), scale, config)

    return documented(scores, f"na{rank}d_qk", _QK_DOC, rank)


def _make_av(rank: int) -> Any:
    def sums(
        weights: jax.Array, v: jax.Array, kernel_size: PerAxis, *, stride: PerAxis = 1, dilation: PerAxis = 1,
        is_causal: PerAxisFlag = False, additional_values: jax.Array | None = None, config: Config | None = None,
    ) -> jax.Array:  # fmt: skip
        operands = {"weights": weights, "v": v, "additional_values": additional_values}
        return _checked("av", rank, operands, (kernel_size, stride, dilation, is_causal), 1.0, config)

    return documented(sums, f"na{rank}d_av", _AV_DOC, rank)


def merge_attentions(outs: Sequence[jax.Array], lses: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Attention over the union of disjoint key sets, from attention over each of them.

    outs: arrays of one shape [..., heads, head_dim] and dtype.
    lses: their log-sum-exps [..., heads], natural log; -infinity stands for no keys at all.

    Returns (out, lse) of that shape and dtype, computed in the dtype of the LSEs; differentiable with
    respect to every array. Raises ValueError for arrays that do not fit, with the numbers.
    """
    check_mergeable(outs, lses)
    return combine(jnp, outs, lses, jax.lax.stop_gradient)


_PLACES = """
Places, the last axis of scores and weights, are row-major over the window, counted from the first key
that the query sees on each axis; the additional keys follow. A causal query sees fewer keys: on that
axis its last places are empty (scores -infinity, weights ignored).

dtypes, transformations and errors are those of `na{rank}d`; gradients for every array, once.
"""
_QK_DOC = (
    """The scores of {rank}-D neighborhood attention: scale * q . k + rpb, before the softmax.

    q: [batch, {axes}, heads, head_dim].
    k: [batch, {axes}, heads_kv, head_dim]; heads % heads_kv == 0.
    kernel_size, stride, dilation, is_causal, config: as in `na{rank}d`.
    scale: a Python number; 1 by default, since callers of the unfused form scale q themselves.
    rpb: relative positional bias [heads, {tables}], float32 or q's dtype, added unscaled.
    additional_keys: [batch, extra, heads_kv, head_dim], seen by every query.

Returns scores [batch, {axes}, heads, places] in q's dtype.
"""
    + _PLACES
)
_AV_DOC = (
    """Weighted sums over {rank}-D neighborhoods: attention after the softmax.

    weights: [batch, {axes}, heads, places].
    v: [batch, {axes}, heads_kv, head_dim] in the dtype of the weights; heads % heads_kv == 0.
    kernel_size, stride, dilation, is_causal, config: as in `na{rank}d`.
    additional_values: [batch, extra, heads_kv, head_dim].

Returns out [batch, {axes}, heads, head_dim].
"""
    + _PLACES
)

na1d_qk, na2d_qk, na3d_qk = (_make_qk(rank) for rank in (1, 2, 3))
na1d_av, na2d_av, na3d_av = (_make_av(rank) for rank in (1, 2, 3))
