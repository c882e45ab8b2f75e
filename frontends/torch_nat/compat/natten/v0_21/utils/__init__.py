"""Helpers that NATTEN's callers import."""

from torch_nat.compat.natten.v0_21.utils import (
    checks,
    device,
    dtype,
    environment,
    log,
    tensor,
    testing,
    tuples,
    varlen,
)

__all__ = ["checks", "device", "dtype", "environment", "log", "tensor", "testing", "tuples", "varlen"]
