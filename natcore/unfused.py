"""Unfused attention as a problem: scores of windows, and sums weighted by them.

    qk    scores[query, place] = scale * q . k + rpb       -infinity where the query sees no key
    av    out[query] = sum over places of weights * v      whatever is there where it sees none

A window's places are row-major over kernel_size, counted from the first key that the query sees on
each axis; a causal query sees fewer keys, and its last places stay empty. Places of additional keys
follow. So ``av(softmax(qk(q, k)), v)`` is fused attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from natcore.problem import DTYPES, Direction, Problem, Window, check_bias, check_operand, check_sizes, required
from natcore.views import View


class QKGradients(NamedTuple):
    """What the backward of qk returns; None for what the forward was not given."""

    dq: Any
    dk: Any
    drpb: Any
    d_additional_keys: Any


class AVGradients(NamedTuple):
    """What the backward of av returns; None for what the forward was not given."""

    d_weights: Any
    dv: Any
    d_additional_values: Any


#: The inputs that pose the problem: what comes per query, what per key, what per additional key.
INPUTS = {"qk": ("q", "k", "additional_keys"), "av": ("weights", "v", "additional_values")}


def unfused_problem_of(direction: Direction, window: Window, views: Mapping[str, View | None]) -> Problem:
    """The problem posed by q, k (or weights, v) and what is optional; its two head dimensions are one.

    Raises ValueError, naming argument, axis and numbers, for anything that is not a valid problem.
    """
    names = INPUTS[direction[:2]]
    query, key = (required(views, name) for name in names[:2])
    extra, rpb, rank = views.get(names[2]), views.get("rpb"), window.rank
    for name, view in zip(names, (query, key), strict=False):
        if len(view.shape) != rank + 3:
            raise ValueError(
                f"{name} has {len(view.shape)} axes, {view.shape}; na{rank}d_{direction[:2]} takes {rank + 3}: "
                f"[batch, {', '.join(f'axis{a}' for a in range(rank))}, heads, "
                f"{'kernel_size keys' if name == 'weights' else 'head_dim'}]."
            )
    if query.dtype not in DTYPES:
        raise ValueError(f"{names[0]} has dtype {query.dtype}; supported are {', '.join(DTYPES)}.")
    if extra is not None and (len(extra.shape) != 4 or extra.shape[1] < 1):
        raise ValueError(f"{names[2]} has shape {extra.shape}; it takes [batch, extra >= 1, heads_kv, head_dim].")
    problem = Problem(
        window,
        batch=query.shape[0],
        spatial=query.shape[1:-2],
        heads=query.shape[-2],
        heads_kv=key.shape[-2],
        head_dim=key.shape[-1],
        head_dim_v=key.shape[-1],
        extra=0 if extra is None else extra.shape[1],
        dtype=query.dtype,
        rpb_dtype=None if rpb is None else rpb.dtype,
    )
    check_sizes(problem)
    check_bias(problem, rpb)
    for name, view in zip((*names, "rpb"), (query, key, extra, rpb), strict=True):
        if view is not None:
            check_operand(problem, name, view, query.device)
    return problem
