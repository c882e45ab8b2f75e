"""na1d, na2d, na3d, attention and merge_attentions with the arguments of NATTEN 0.21."""

from __future__ import annotations

from functools import wraps
from typing import Any

from torch import Tensor

import torch_nat
from torch_nat.compat.natten import _arguments as arguments
from torch_nat.compat.natten._attention import attend, attend_packed
from torch_nat.compat.natten._merging import merge_attentions
from torch_nat.compat.natten.v0_21.types import KernelSchedule
from torch_nat.compat.natten.v0_21.utils.checks import check_kernel_schedule, fmha_tensor_checks, varlen_tensor_checks

__all__ = ["attention", "merge_attentions", "na1d", "na2d", "na3d", "neighborhood_attention_generic"]

PerAxis = int | tuple[int, ...] | list[int] | None
PerAxisFlag = bool | tuple[bool, ...] | list[bool] | None
Shape = tuple[int, ...] | None
Schedule = str | KernelSchedule | None
_OPERATIONS: dict[int, Any] = {1: torch_nat.na1d, 2: torch_nat.na2d, 3: torch_nat.na3d}
#: What `attention_kwargs` may hold: arguments of `attention` that choose kernels.
_ATTENTION_TUNING = (
    *("backend", "q_tile_size", "kv_tile_size", "backward_q_tile_size", "backward_kv_tile_size"),
    *("backward_kv_splits", "backward_use_pt_reduction", "run_persistent_kernel", "kernel_schedule", "torch_compile"),
)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool = False,
    scale: float | None = None,
    seqlens_Q: Tensor | None = None,
    seqlens_KV: Tensor | None = None,
    cumulative_seqlen_Q: Tensor | None = None,
    cumulative_seqlen_KV: Tensor | None = None,
    max_seqlen_Q: int | None = None,
    max_seqlen_KV: int | None = None,
    backend: str | None = None,
    q_tile_size: int | None = None,
    kv_tile_size: int | None = None,
    backward_q_tile_size: int | None = None,
    backward_kv_tile_size: int | None = None,
    backward_kv_splits: int | None = None,
    backward_use_pt_reduction: bool = False,
    run_persistent_kernel: bool = True,
    kernel_schedule: Schedule = None,
    torch_compile: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Plain attention on ``[batch, tokens, heads, head_dim]``, heads last; a causal query i sees keys 0 to i.

    ``key`` and ``value`` may have their own number of tokens, fewer heads (GQA, MQA), and ``value`` its
    own head_dim. Packed sequences of unequal lengths (batch 1) are told by ``seqlens_Q`` and
    ``seqlens_KV``, or by ``cumulative_seqlen_*`` and ``max_seqlen_*``. Returns the output and, with
    ``return_lse``, the LSE ``[batch, tokens, heads]``, whose gradient counts. Raises ValueError for
    tensors or lengths that do not go together. The remaining arguments are ignored, with one warning.
    """
    if not isinstance(is_causal, bool):
        raise TypeError(
            f"is_causal is {is_causal!r}; before 0.21.5 the scale stood here. Name it: scale={is_causal!r}."
        )
    check_kernel_schedule(kernel_schedule)
    tuning = dict(
        q_tile_size=q_tile_size,
        kv_tile_size=kv_tile_size,
        backward_q_tile_size=backward_q_tile_size,
        backward_kv_tile_size=backward_kv_tile_size,
        backward_kv_splits=backward_kv_splits,
        backward_use_pt_reduction=backward_use_pt_reduction,
        run_persistent_kernel=run_persistent_kernel,
        kernel_schedule=kernel_schedule,
        torch_compile=torch_compile,
    )
    arguments.ignore(arguments.FMHA_BACKENDS, backend, tuning)
    arguments.check_dense((query, key, value))
    fmha_tensor_checks(query, key, value)
    packed = (cumulative_seqlen_Q, cumulative_seqlen_KV, max_seqlen_Q, max_seqlen_KV)
    ends_q, ends_kv, *longest = varlen_tensor_checks(query, key, value, seqlens_Q, seqlens_KV, *packed)
    if ends_q is None or ends_kv is None:
        out, lse = attend(query, key, value, is_causal, scale, return_lse)
    else:
        lengths = (ends_q, ends_kv), tuple(longest)
        out, lse = attend_packed(query, key, value, *lengths, is_causal, scale, return_lse)
    return (out, lse) if return_lse else out  # type: ignore[return-value]


def neighborhood_attention_generic(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: PerAxis,
    stride: PerAxis = 1,
    dilation: PerAxis = 1,
    is_causal: PerAxisFlag = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    attention_kwargs: dict | None = None,
    backend: str | None = None,
    q_tile_shape: Shape = None,
    kv_tile_shape: Shape = None,
    backward_q_tile_shape: Shape = None,
    backward_kv_tile_shape: Shape = None,
    backward_kv_splits: Shape = None,
    backward_use_pt_reduction: bool = False,
    run_persistent_kernel: bool = True,
    kernel_schedule: Schedule = None,
    torch_compile: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """na1d, na2d or na3d, by the number of axes of ``query``: ``[batch, *spatial, heads, head_dim]``.

    See `torch_nat.na2d`, which it calls, for what the arguments up to ``additional_values`` and the
    results are. The arguments from ``attention_kwargs`` to ``torch_compile`` choose NATTEN's kernels:
    they are checked and ignored, with one warning.
    """
    rank = query.dim() - 3
    if rank not in _OPERATIONS:
        raise ValueError(
            f"query has shape {tuple(query.shape)}; expected 4, 5 or 6 axes, [batch, *spatial, heads, dim]."
        )
    check_kernel_schedule(kernel_schedule)
    tuning = dict(
        q_tile_shape=q_tile_shape,
        kv_tile_shape=kv_tile_shape,
        backward_q_tile_shape=backward_q_tile_shape,
        backward_kv_tile_shape=backward_kv_tile_shape,
        backward_kv_splits=backward_kv_splits,
        backward_use_pt_reduction=backward_use_pt_reduction,
        run_persistent_kernel=run_persistent_kernel,
        kernel_schedule=kernel_schedule,
        torch_compile=torch_compile,
        attention_kwargs=_check_attention_kwargs(attention_kwargs),
    )
    arguments.ignore(arguments.FNA_BACKENDS, backend, tuning)
    extras = (additional_keys, additional_values)
    arguments.check_dense((query, key, value, *extras))
    query, key, value = (arguments.readable(x) for x in (query, key, value))
    additional_keys, additional_values = (None if x is None else arguments.readable(x) for x in extras)
    return _OPERATIONS[rank](
        query,
        key,
        value,
        kernel_size,
        stride=1 if stride is None else stride,
        dilation=1 if dilation is None else dilation,
        is_causal=False if is_causal is None else is_causal,
        scale=scale,
        additional_keys=additional_keys,
        additional_values=additional_values,
        return_lse=return_lse,
    )


def _check_attention_kwargs(attention_kwargs: dict | None) -> dict | None:
    """None where there is nothing to ignore. Raises TypeError for what would change the result."""
    unknown = sorted(set(attention_kwargs or ()) - set(_ATTENTION_TUNING))
    if unknown:
        raise TypeError(f"attention_kwargs has {', '.join(unknown)}; it may hold {', '.join(_ATTENTION_TUNING)}.")
    return attention_kwargs or None


def _of_rank(rank: int) -> Any:
    """`neighborhood_attention_generic` for tensors of one rank, with its signature."""

    @wraps(neighborhood_attention_generic)
    def operation(query: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, Tensor]:
        arguments.check_rank(query, rank)
        return neighborhood_attention_generic(query, *args, **kwargs)

    operation.__name__ = operation.__qualname__ = f"na{rank}d"
    return operation


na1d, na2d, na3d = (_of_rank(rank) for rank in (1, 2, 3))
