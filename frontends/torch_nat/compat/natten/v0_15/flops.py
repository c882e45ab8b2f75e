"""Counting with fvcore. See `torch_nat.compat.natten.legacy.flops`."""

from __future__ import annotations

from typing import Any

import torch

from torch_nat.compat.natten.legacy import flops as legacy


def add_natten_handle(flop_ctr: Any) -> Any:
    """Teach an fvcore counter the operations; every score counts one more, for a bias, whether there is one or not."""
    return legacy.add_handles(flop_ctr, count_bias=True)


def get_flops(model: torch.nn.Module, input: Any, disable_warnings: bool = False) -> int:
    """The model's multiply-accumulates. Raises ImportError without fvcore."""
    return legacy.total(model, input, disable_warnings, count_bias=True)
