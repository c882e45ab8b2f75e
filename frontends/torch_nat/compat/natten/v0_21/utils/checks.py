"""Checks of arguments, for callers that use them directly. The operations check by themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from torch_nat.compat.natten._arguments import check_dense
from torch_nat.compat.natten.v0_21.types import KernelSchedule
from torch_nat.compat.natten.v0_21.utils.varlen import check_vector, generate_varlen_parameters

_SCHEDULES = {
    "non": KernelSchedule.NonPersistent,
    "coop": KernelSchedule.WarpSpecializedCooperative,
    "pp": KernelSchedule.WarpSpecializedPingpong,
}


def per_axis_entries(name: str, na_dim: int, value: Any, kind: type, least: int) -> tuple:
    """One entry per axis. Raises ValueError, as NATTEN does, for anything else."""
    entries = (value,) * na_dim if isinstance(value, kind) else value
    valid = isinstance(entries, Sequence) and len(entries) == na_dim and all(isinstance(x, kind) for x in entries)
    if not valid or (kind is int and any(x < least for x in entries)):
        bound = f" >= {least}" if kind is int else ""
        raise ValueError(f"{name} is {value!r}; expected one {kind.__name__}{bound}, or {na_dim} of them.")
    return tuple(entries)


def check_input_size_arg(na_dim: int, input_size: Any) -> tuple[int, ...]:
    return per_axis_entries("input_size", na_dim, input_size, int, 2)


def check_kernel_size_arg(na_dim: int, kernel_size: Any) -> tuple[int, ...]:
    """NATTEN wants at least 2 per axis; torch_nat's operations take 1 as well."""
    return per_axis_entries("kernel_size", na_dim, kernel_size, int, 2)


def check_stride_arg(na_dim: int, stride: Any) -> tuple[int, ...]:
    return per_axis_entries("stride", na_dim, 1 if stride is None else stride, int, 1)


def check_dilation_arg(na_dim: int, dilation: Any) -> tuple[int, ...]:
    return per_axis_entries("dilation", na_dim, 1 if dilation is None else dilation, int, 1)


def check_causal_arg(na_dim: int, is_causal: Any) -> tuple[bool, ...]:
    return per_axis_entries("is_causal", na_dim, False if is_causal is None else is_causal, bool, 0)


def check_all_args(na_dim: int, kernel_size: Any, stride: Any, dilation: Any, is_causal: Any) -> tuple:
    """(kernel_size, stride, dilation, is_causal), each as a tuple."""
    return (
        check_kernel_size_arg(na_dim, kernel_size),
        check_stride_arg(na_dim, stride),
        check_dilation_arg(na_dim, dilation),
        check_causal_arg(na_dim, is_causal),
    )


def check_args_against_input(
    input_tensor: Tensor,
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    is_causal: tuple[bool, ...],
) -> None:
    """Raises ValueError where a window does not fit the map, or a stride its window."""
    spatial = tuple(input_tensor.shape[1:-2])
    if any(k * d > x for x, k, d in zip(spatial, kernel_size, dilation, strict=True)):
        raise ValueError(f"kernel_size {kernel_size} * dilation {dilation} exceeds the map {spatial}.")
    if any(s > k for k, s in zip(kernel_size, stride, strict=True)):
        raise ValueError(f"stride {stride} exceeds kernel_size {kernel_size}.")


def is_self_attention(
    input_tensor: Tensor,
    kernel_size: tuple[int, ...],
    is_causal: tuple[bool, ...],
    has_additional_attention: bool = False,
) -> bool:
    """Whether the window is the whole map, so that this is plain (in 1-D perhaps causal) attention."""
    spatial = tuple(input_tensor.shape[1:-2])
    if len(spatial) == 1 and not has_additional_attention:
        return kernel_size[0] == spatial[0]
    return tuple(kernel_size) == spatial and not any(is_causal)


def check_kernel_schedule(kernel_schedule: Any) -> KernelSchedule | None:
    if kernel_schedule is None or isinstance(kernel_schedule, KernelSchedule):
        return kernel_schedule
    if kernel_schedule in _SCHEDULES:
        return _SCHEDULES[kernel_schedule]
    raise ValueError(f"kernel_schedule is {kernel_schedule!r}; choices are {', '.join(_SCHEDULES)}.")


def na_tensor_checks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    must_match_head_dims: bool = False,
    supports_gqa_mqa: bool = True,
    raise_error: bool = True,
    backend_name: str | None = None,
) -> bool:
    """Whether q, k and v go together for na1d, na2d or na3d; raises ValueError if ``raise_error``."""
    fault = _fault(query, key, value, (4, 5, 6), must_match_head_dims, supports_gqa_mqa)
    if fault is None and not query.shape[1:-2] == key.shape[1:-2] == value.shape[1:-2]:
        fault = f"query, key and value have maps {query.shape[1:-2]}, {key.shape[1:-2]}, {value.shape[1:-2]}."
    return _answer(fault, raise_error, backend_name)


def fmha_tensor_checks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    must_match_head_dims: bool = False,
    supports_gqa_mqa: bool = True,
    raise_error: bool = True,
    backend_name: str | None = None,
) -> bool:
    """Whether q, k and v go together for `attention`; raises ValueError if ``raise_error``."""
    fault = _fault(query, key, value, (4,), must_match_head_dims, supports_gqa_mqa)
    if fault is None and key.shape[1] != value.shape[1]:
        fault = f"key and value have {key.shape[1]} and {value.shape[1]} tokens."
    return _answer(fault, raise_error, backend_name)


def additional_kv_tensor_checks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    add_key: Tensor | None = None,
    add_value: Tensor | None = None,
    must_match_head_dims: bool = False,
    supports_gqa_mqa: bool = True,
) -> None:
    """Raises ValueError unless additional keys and values, ``[batch, extra, heads_kv, dim]``, go with q, k and v."""
    if add_key is None and add_value is None:
        return
    if add_key is None or add_value is None:
        raise ValueError("additional_keys and additional_values go together: give both or none.")
    flat = query.flatten(1, -3)
    if add_key.dim() != 4 or add_value.dim() != 4:
        shapes = f"{tuple(add_key.shape)} and {tuple(add_value.shape)}"
        raise ValueError(f"additional keys and values have shapes {shapes}; expected [batch, extra, heads, dim].")
    fmha_tensor_checks(flat, add_key, add_value, must_match_head_dims, supports_gqa_mqa)
    for name, tensor, extra in (("keys", key, add_key), ("values", value, add_value)):
        if tensor.shape[-2:] != extra.shape[-2:]:
            raise ValueError(
                f"additional {name} have heads and head_dim {tuple(extra.shape[-2:])}; the {name} themselves "
                f"{tuple(tensor.shape[-2:])}."
            )


def varlen_tensor_checks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seqlens_Q: Tensor | None = None,
    seqlens_KV: Tensor | None = None,
    cumulative_seqlen_Q: Tensor | None = None,
    cumulative_seqlen_KV: Tensor | None = None,
    max_seqlen_Q: int | None = None,
    max_seqlen_KV: int | None = None,
) -> tuple[Tensor | None, Tensor | None, int, int]:
    """Cumulative and longest lengths of packed sequences; (None, None, 0, 0) where each batch entry is one sequence.

    Raises ValueError for arguments that do not go together or with the tensors.
    """
    if seqlens_Q is not None or seqlens_KV is not None:
        return generate_varlen_parameters(query, key, value, seqlens_Q, seqlens_KV)
    if cumulative_seqlen_Q is None and cumulative_seqlen_KV is None and not max_seqlen_Q and not max_seqlen_KV:
        return None, None, 0, 0
    given = (cumulative_seqlen_Q, cumulative_seqlen_KV, max_seqlen_Q, max_seqlen_KV)
    if any(x is None for x in given):
        raise ValueError("cumulative_seqlen_Q, cumulative_seqlen_KV, max_seqlen_Q and max_seqlen_KV go together.")
    for name, boundaries in (("cumulative_seqlen_Q", given[0]), ("cumulative_seqlen_KV", given[1])):
        check_vector(name, boundaries, query, 2)
    if cumulative_seqlen_Q.shape != cumulative_seqlen_KV.shape:  # type: ignore[union-attr]
        raise ValueError(f"cumulative_seqlen_Q and _KV have {len(given[0])} and {len(given[1])} entries.")  # type: ignore
    for name, longest, tensor in (("max_seqlen_Q", max_seqlen_Q, query), ("max_seqlen_KV", max_seqlen_KV, key)):
        if type(longest) is not int or not 0 <= longest <= tensor.shape[1]:
            raise ValueError(
                f"{name} is {longest!r}; expected an int from 0 to the {tensor.shape[1]} tokens there are."
            )
    if not query.shape[0] == key.shape[0] == value.shape[0] == 1:
        raise ValueError(f"sequences are packed along one sequence: the batch must be 1, not {query.shape[0]}.")
    return given  # type: ignore[return-value]


def check_tile_shape(tile_shape: Any) -> tuple[int, ...]:
    """As a tuple. Raises ValueError for anything but one to three integers."""
    if isinstance(tile_shape, Sequence) and len(tile_shape) <= 3 and all(isinstance(x, int) for x in tile_shape):
        return tuple(tile_shape)
    raise ValueError(f"tile shape is {tile_shape!r}; expected at most 3 integers.")


def _fault(
    query: Tensor, key: Tensor, value: Tensor, ranks: tuple[int, ...], must_match: bool, grouped: bool
) -> str | None:
    check_dense((query, key, value))
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if not query.dim() == key.dim() == value.dim() or query.dim() not in ranks:
        return f"{shapes}: expected the same number of axes, {' or '.join(map(str, ranks))}."
    if not query.device == key.device == value.device or not query.dtype == key.dtype == value.dtype:
        return f"query, key and value differ in device or dtype: {[(t.device, t.dtype) for t in (query, key, value)]}."
    if not query.shape[0] == key.shape[0] == value.shape[0]:
        return f"{shapes}: batches differ."
    if query.shape[-1] != key.shape[-1]:
        return f"{shapes}: query and key differ in head_dim."
    if must_match and query.shape[-1] != value.shape[-1]:
        return f"{shapes}: query and value differ in head_dim."
    if not grouped and not query.shape[-2] == key.shape[-2] == value.shape[-2]:
        return f"{shapes}: the heads of key and value must be those of query."
    if key.shape[-2] != value.shape[-2] or key.shape[-2] < 1 or query.shape[-2] % key.shape[-2]:
        return f"{shapes}: the heads of key and value must be equal and divide those of query."
    return None


def _answer(fault: str | None, raise_error: bool, backend_name: str | None) -> bool:
    if fault is not None and raise_error:
        raise ValueError(f"{backend_name}: {fault}" if backend_name else fault)
    return fault is None
