"""Merging attentions over disjoint sets of keys, by their log-sum-exps (LSE).

With w_i = exp(lse_i - max lse), attention over the union of the keys is sum(w_i out_i) / sum(w_i), and
its LSE is max lse + log sum(w_i) (Dao et al., "FlashAttention", 2022, section 3.1: the same for blocks).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

from natcore.arrays import kind_of


def merge_attentions(outs: Sequence[Any], lses: Sequence[Any]) -> tuple[Any, Any]:
    """Attention over the union of disjoint key sets, from attention over each of them.

    outs: arrays of one shape [..., heads, head_dim] and dtype.
    lses: their log-sum-exps [..., heads], natural log; -infinity stands for no keys at all.

    Returns (out, lse) of that shape and dtype, computed in the dtype of the LSEs. Arrays may be NumPy's,
    torch's, CuPy's, JAX's or of the array API, all of one kind; nothing is changed in place. Gradients are
    for `torch_nat.merge_attentions` and `jax_nat.merge_attentions`.

    Raises ValueError (naming argument, axis and numbers) for arrays that do not fit.
    """
    check_mergeable(outs, lses)
    for name, arrays in (("outs", outs), ("lses", lses)):
        for i, array in enumerate(arrays):
            if getattr(array, "requires_grad", False) is True:
                raise ValueError(
                    f"{name}[{i}] requires grad, and natcore on raw arrays records no gradients: call torch_nat "
                    f"instead, or pass {name}[{i}].detach()."
                )
    return combine(kind_of("outs[0]", outs[0]).namespace(outs[0]), outs, lses)


def check_mergeable(outs: Sequence[Any], lses: Sequence[Any]) -> None:
    """Raises ValueError unless there are as many LSEs as outputs, and all of them fit."""
    if len(outs) != len(lses) or not outs:
        raise ValueError(f"there are {len(outs)} outs and {len(lses)} lses; give one LSE for each of one or more outs.")
    shape = tuple(outs[0].shape)
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        for name, array, first, expected in (("outs", out, outs[0], shape), ("lses", lse, lses[0], shape[:-1])):
            if tuple(array.shape) != expected:
                raise ValueError(f"{name}[{i}] has shape {tuple(array.shape)}, expected {expected}.")
            if array.dtype != first.dtype:
                raise ValueError(f"{name}[{i}] has dtype {array.dtype}, but {name}[0] has {first.dtype}.")


def combine(
    xp: Any, outs: Sequence[Any], lses: Sequence[Any], constant: Callable[[Any], Any] = lambda x: x
) -> tuple[Any, Any]:
    """The formula in the functions of a library; ``constant`` cuts the gradient of the maximum, which cancels."""
    top = reduce(xp.maximum, [constant(lse) for lse in lses])
    top = xp.where(xp.isfinite(top), top, xp.zeros_like(top))  # of no keys at all
    weights = [xp.exp(lse - top) for lse in lses]
    total = sum(weights[1:], weights[0])
    divisor = xp.where(total == 0, xp.ones_like(total), total)
    terms = [(weight / divisor)[..., None] * out for weight, out in zip(weights, outs, strict=True)]
    lse = xp.where(total == 0, xp.full_like(total, -float("inf")), top + xp.log(divisor))
    return _cast(sum(terms[1:], terms[0]), outs[0].dtype), _cast(lse, lses[0].dtype)


def _cast(x: Any, dtype: Any) -> Any:
    return x.to(dtype) if hasattr(x, "to") and hasattr(x, "new_empty") else x.astype(dtype)
