"""Fused attention under the name by which NATTEN 0.17.4 compiled it."""

from torch_nat.compat.natten.v0_17._functional import na1d, na2d, na3d

__all__ = ["na1d", "na2d", "na3d"]
