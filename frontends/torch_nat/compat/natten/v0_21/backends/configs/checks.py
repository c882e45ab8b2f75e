"""Which of NATTEN's backends may be asked for on given tensors.

torch_nat serves every one of them with its own kernels, so the answer is whether it runs these tensors
at all and, for hopper and blackwell, whether the GPU is of that kind.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torch_nat.compat.natten.v0_21.utils.checks import fmha_tensor_checks, na_tensor_checks
from torch_nat.compat.natten.v0_21.utils.device import get_device_cc

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def _runs(
    tensors: tuple[Tensor, Tensor, Tensor], fmha: bool, raise_error: bool, capabilities: tuple[int, ...] = ()
) -> bool:
    query, key, value = tensors
    checks = fmha_tensor_checks if fmha else na_tensor_checks
    if not checks(query, key, value, raise_error=raise_error):
        return False
    fault = None
    if query.dtype not in _DTYPES or query.device.type not in ("cpu", "cuda"):
        fault = f"{query.dtype} on {query.device} is not supported."
    elif capabilities and get_device_cc(query.device) not in capabilities:
        fault = f"{query.device} has compute capability {get_device_cc(query.device)}, not one of {capabilities}."
    if fault is not None and raise_error:
        raise RuntimeError(fault)
    return fault is None


def can_run_cutlass_fna(query: Tensor, key: Tensor, value: Tensor, raise_error: bool = False) -> bool:
    return _runs((query, key, value), False, raise_error)


def can_run_cutlass_hopper_fna(query: Tensor, key: Tensor, value: Tensor, raise_error: bool = False) -> bool:
    return _runs((query, key, value), False, raise_error, (90,))


def can_run_cutlass_blackwell_fna(query: Tensor, key: Tensor, value: Tensor, raise_error: bool = False) -> bool:
    return _runs((query, key, value), False, raise_error, (100, 103))


def can_run_cutlass_fmha(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, is_varlen: bool, raise_error: bool = False
) -> bool:
    return _runs((query, key, value), True, raise_error)


def can_run_cutlass_hopper_fmha(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, is_varlen: bool, raise_error: bool = False
) -> bool:
    return _runs((query, key, value), True, raise_error, (90,))


def can_run_cutlass_blackwell_fmha(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, is_varlen: bool, raise_error: bool = False
) -> bool:
    return _runs((query, key, value), True, raise_error, (100, 103))


def can_run_flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    torch_compile: bool,
    is_causal: bool = False,
    is_varlen: bool = False,
    raise_error: bool = False,
) -> bool:
    return _runs((query, key, value), query.shape[1:-2] != key.shape[1:-2], raise_error)
