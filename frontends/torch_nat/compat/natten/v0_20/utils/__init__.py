"""Helpers that NATTEN's callers import."""

from torch_nat.compat.natten.v0_20.utils import checks
from torch_nat.compat.natten.v0_21.utils import device, dtype, log, tensor, testing, tuples

__all__ = ["checks", "device", "dtype", "log", "tensor", "testing", "tuples"]
