"""Arguments of NATTEN's that choose a kernel and never a result: checked, accepted, ignored aloud."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor

FNA_BACKENDS = ("blackwell-fna", "hopper-fna", "cutlass-fna", "flex-fna")
FMHA_BACKENDS = ("blackwell-fmha", "hopper-fmha", "cutlass-fmha", "flex-fmha")

#: What leaves an argument unused: passing it is worth no warning.
_DEFAULTS = {"backward_use_pt_reduction": False, "run_persistent_kernel": True, "torch_compile": False}


def ignore(backends: tuple[str, ...], backend: str | None, tuning: dict[str, Any]) -> None:
    """Warn, once for each set of names, that tuning arguments have no effect here.

    Raises NotImplementedError for a backend that NATTEN does not know either.
    """
    if backend is not None and backend not in backends:
        raise NotImplementedError(f"backend {backend!r} is unknown; NATTEN's are {', '.join(backends)}.")
    given = {"backend": backend, **tuning}
    names = [name for name, value in given.items() if value is not None and value != _DEFAULTS.get(name)]
    if names and not torch.compiler.is_compiling():
        _warn_once(tuple(names))


@cache
def _warn_once(names: tuple[str, ...]) -> None:
    warnings.warn(
        f"torch_nat chooses its kernels itself: {', '.join(names)} accepted and ignored. Results are the same.",
        UserWarning,
        stacklevel=5,
    )


def readable(tensor: Tensor) -> Tensor:
    """The tensor itself unless its last axis is strided, which NATTEN copied too."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def check_dense(tensors: Iterable[Tensor | None]) -> None:
    """Raises NotImplementedError for nested and sparse tensors."""
    for tensor in tensors:
        if tensor is not None and (tensor.is_nested or tensor.is_sparse):
            kind = "nested" if tensor.is_nested else "sparse"
            raise NotImplementedError(f"{kind} tensors are not supported: call once per dense tensor, or pad them.")


def check_rank(query: Tensor, rank: int) -> None:
    """Raises ValueError unless ``query`` is ``[batch, *spatial, heads, head_dim]`` with ``rank`` spatial axes."""
    if query.dim() != rank + 3:
        raise ValueError(f"query has shape {tuple(query.shape)}; na{rank}d takes {rank + 3} axes, heads last.")
