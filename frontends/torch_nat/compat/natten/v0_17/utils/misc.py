"""The GPU's compute capability."""

from torch_nat.compat.natten.legacy.hardware import get_device_cc

__all__ = ["get_device_cc"]
