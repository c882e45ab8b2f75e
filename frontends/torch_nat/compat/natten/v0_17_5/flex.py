"""Flex Attention under its own names: torch_nat's operations, as everywhere."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torch_nat.compat.natten.legacy.fused import fused
from torch_nat.compat.natten.legacy.unfused import PerAxis, PerAxisFlag

__all__ = ["flex_na1d", "flex_na2d", "flex_na3d"]


def _of_rank(rank: int) -> Any:
    def operation(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kernel_size: PerAxis,
        dilation: PerAxis | None = 1,
        is_causal: PerAxisFlag = False,
        additional_keys: Tensor | None = None,
        additional_values: Tensor | None = None,
        xformers_kwargs: dict[str, Any] | None = None,
    ) -> Tensor:
        """Neighbourhood attention on ``[batch, *spatial, heads, head_dim]``, heads last."""
        window = (kernel_size, dilation, is_causal)
        extra = (additional_keys, additional_values)
        return fused(rank, query, key, value, window, None, None, *extra, xformers_kwargs)

    operation.__name__ = operation.__qualname__ = f"flex_na{rank}d"
    return operation


flex_na1d, flex_na2d, flex_na3d = (_of_rank(rank) for rank in (1, 2, 3))
