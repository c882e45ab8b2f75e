"""Loggers whose level follows NATTEN_LOG_LEVEL."""

from torch_nat.compat.natten.v0_21.utils.log import get_logger

__all__ = ["get_logger"]
