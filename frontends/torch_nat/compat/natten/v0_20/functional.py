"""na1d, na2d, na3d, attention and merge_attentions with the arguments of NATTEN 0.20.

Against 0.21, attention has neither is_causal nor packed sequences (its fourth argument is the scale), the
neighbourhood operations return no LSE and may be told to fuse additional keys, and merge_attentions
returns the output alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import wraps
from typing import Any

from torch import Tensor

from torch_nat.compat.natten import _arguments as arguments
from torch_nat.compat.natten._merging import merge_attentions as _merge_attentions
from torch_nat.compat.natten.v0_21 import functional as current
from torch_nat.compat.natten.v0_21.functional import PerAxis, PerAxisFlag, Schedule, Shape

__all__ = ["attention", "merge_attentions", "na1d", "na2d", "na3d", "neighborhood_attention_generic"]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None = None,
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
    """Plain attention, heads last; otherwise as in 0.21."""
    return current.attention(
        query,
        key,
        value,
        scale=scale,
        backend=backend,
        q_tile_size=q_tile_size,
        kv_tile_size=kv_tile_size,
        backward_q_tile_size=backward_q_tile_size,
        backward_kv_tile_size=backward_kv_tile_size,
        backward_kv_splits=backward_kv_splits,
        backward_use_pt_reduction=backward_use_pt_reduction,
        run_persistent_kernel=run_persistent_kernel,
        kernel_schedule=kernel_schedule,
        torch_compile=torch_compile,
        return_lse=return_lse,
    )


def merge_attentions(outputs: Sequence[Tensor], lse_tensors: Sequence[Tensor], torch_compile: bool = True) -> Tensor:
    """The merged output; `torch_nat.compat.natten._merging` gives the LSE too."""
    return _merge_attentions(outputs, lse_tensors, torch_compile)[0]


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
    try_fuse_additional_kv: bool = False,
) -> Tensor:
    """As in 0.21, without an LSE. Additional keys are fused whatever ``try_fuse_additional_kv`` says."""
    window = (kernel_size, stride, dilation, is_causal, scale, additional_keys, additional_values)
    tuning = (attention_kwargs, backend, q_tile_shape, kv_tile_shape, backward_q_tile_shape, backward_kv_tile_shape)
    tuning += (backward_kv_splits, backward_use_pt_reduction, run_persistent_kernel, kernel_schedule, torch_compile)
    return current.neighborhood_attention_generic(query, key, value, *window, *tuning)  # type: ignore[return-value]


def _of_rank(rank: int) -> Any:
    @wraps(neighborhood_attention_generic)
    def operation(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        arguments.check_rank(query, rank)
        return neighborhood_attention_generic(query, *args, **kwargs)

    operation.__name__ = operation.__qualname__ = f"na{rank}d"
    return operation


na1d, na2d, na3d = (_of_rank(rank) for rank in (1, 2, 3))
