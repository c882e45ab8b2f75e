"""NATTEN's kernels under their own names. Each is torch_nat's operation, with that kernel's order of arguments."""

from __future__ import annotations

from collections.abc import Callable
from inspect import Parameter, Signature
from typing import Any

from torch import Tensor

from torch_nat.compat.natten._arguments import check_rank
from torch_nat.compat.natten.v0_21.functional import attention, neighborhood_attention_generic

__all__ = [
    "cutlass_blackwell_fmha",
    "cutlass_blackwell_fna_generic",
    "cutlass_fmha",
    "cutlass_fna_generic",
    "cutlass_hopper_fmha",
    "cutlass_hopper_fna_generic",
    "flex_fmha",
    "flex_fna_generic",
    "na1d_cutlass_blackwell_fna",
    "na1d_cutlass_fna",
    "na1d_cutlass_hopper_fna",
    "na1d_flex",
    "na2d_cutlass_blackwell_fna",
    "na2d_cutlass_fna",
    "na2d_cutlass_hopper_fna",
    "na2d_flex",
    "na3d_cutlass_blackwell_fna",
    "na3d_cutlass_fna",
    "na3d_cutlass_hopper_fna",
    "na3d_flex",
]

_WINDOW = {"kernel_size": Parameter.empty, "stride": 1, "dilation": 1, "is_causal": False, "scale": None}
_PACKED = {"cumulative_seqlen_Q": None, "cumulative_seqlen_KV": None, "max_seqlen_Q": 0, "max_seqlen_KV": 0}
_SHAPES = dict.fromkeys(("q_tile_shape", "kv_tile_shape"))
_BACKWARD_SHAPES = dict.fromkeys(("backward_q_tile_shape", "backward_kv_tile_shape"))
_SIZES = dict.fromkeys(("q_tile_size", "kv_tile_size"))
_BACKWARD_SIZES = dict.fromkeys(("backward_q_tile_size", "backward_kv_tile_size"))
_SPLITS = {"backward_kv_splits": None, "backward_use_pt_reduction": False}
_PERSISTENT, _SCHEDULE, _COMPILE = {"run_persistent_kernel": False}, {"kernel_schedule": None}, {"torch_compile": False}
_LSE = {"return_lse": False}


def _taking(arguments: dict[str, Any], operation: Callable[..., Any], name: str, rank: int | None = None) -> Any:
    """``operation`` with q, k, v and then ``arguments`` (name to default) in that order."""
    tensors = dict.fromkeys(("query", "key", "value"), Parameter.empty)
    signature = Signature(
        [
            Parameter(n, Parameter.POSITIONAL_OR_KEYWORD, default=default)
            for n, default in {**tensors, **arguments}.items()
        ]
    )

    def kernel(*args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, Tensor]:
        given = signature.bind(*args, **kwargs).arguments
        if given.get("run_persistent_kernel") is False:  # what these functions default to, unlike the operation
            del given["run_persistent_kernel"]
        if rank is not None:
            check_rank(given["query"], rank)
        return operation(**given)

    kernel.__name__ = kernel.__qualname__ = name
    kernel.__doc__ = f"`{operation.__name__}`; tile shapes, schedules and the like are ignored, with one warning."
    kernel.__signature__ = signature  # type: ignore[attr-defined]
    return kernel


_FNA = {
    "cutlass_fna": _WINDOW | _SHAPES | _BACKWARD_SHAPES | _SPLITS | _LSE,
    "cutlass_hopper_fna": _WINDOW | _SHAPES | _BACKWARD_SHAPES | _SCHEDULE | _LSE,
    "cutlass_blackwell_fna": _WINDOW | _SHAPES | _BACKWARD_SHAPES | _PERSISTENT | _LSE,
    "flex": _WINDOW | _SHAPES | _COMPILE | _LSE,
}


def _neighborhood(kernel: str) -> tuple[Any, Any, Any, Any]:
    """The function of any rank, and those of one."""
    generic = f"{kernel}_generic" if kernel.endswith("fna") else f"{kernel}_fna_generic"
    names = [(None, generic), *((rank, f"na{rank}d_{kernel}") for rank in (1, 2, 3))]
    return tuple(_taking(_FNA[kernel], neighborhood_attention_generic, name, rank) for rank, name in names)  # type: ignore


cutlass_fna_generic, na1d_cutlass_fna, na2d_cutlass_fna, na3d_cutlass_fna = _neighborhood("cutlass_fna")
(
    cutlass_hopper_fna_generic,
    na1d_cutlass_hopper_fna,
    na2d_cutlass_hopper_fna,
    na3d_cutlass_hopper_fna,
) = _neighborhood("cutlass_hopper_fna")
(
    cutlass_blackwell_fna_generic,
    na1d_cutlass_blackwell_fna,
    na2d_cutlass_blackwell_fna,
    na3d_cutlass_blackwell_fna,
) = _neighborhood("cutlass_blackwell_fna")
flex_fna_generic, na1d_flex, na2d_flex, na3d_flex = _neighborhood("flex")

_DENSE = {"is_causal": False, "scale": None}
cutlass_fmha = _taking(_DENSE | _SIZES | _BACKWARD_SIZES | _SPLITS | _LSE | _PACKED, attention, "cutlass_fmha")
cutlass_hopper_fmha = _taking(
    _DENSE | _SIZES | _SCHEDULE | _BACKWARD_SIZES | _LSE | _PACKED, attention, "cutlass_hopper_fmha"
)
cutlass_blackwell_fmha = _taking(
    _DENSE | _SIZES | _PERSISTENT | _BACKWARD_SIZES | _LSE | _PACKED, attention, "cutlass_blackwell_fmha"
)
flex_fmha = _taking(_DENSE | _SIZES | _COMPILE | _LSE | _PACKED, attention, "flex_fmha")
