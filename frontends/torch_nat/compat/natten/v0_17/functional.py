"""The functions of NATTEN 0.17.4: those of 0.17.5, and natten{1,2,3}dqk, dqkrpb and dav for the last time."""

from torch_nat.compat.natten.v0_15.functional import (
    natten1dav,
    natten1dqk,
    natten1dqkrpb,
    natten2dav,
    natten2dqk,
    natten2dqkrpb,
    natten3dav,
    natten3dqk,
    natten3dqkrpb,
)
from torch_nat.compat.natten.v0_17._functional import (
    na1d,
    na1d_av,
    na1d_qk,
    na2d,
    na2d_av,
    na2d_qk,
    na3d,
    na3d_av,
    na3d_qk,
)

__all__ = [
    "na1d",
    "na1d_av",
    "na1d_qk",
    "na2d",
    "na2d_av",
    "na2d_qk",
    "na3d",
    "na3d_av",
    "na3d_qk",
    "natten1dav",
    "natten1dqk",
    "natten1dqkrpb",
    "natten2dav",
    "natten2dqk",
    "natten2dqkrpb",
    "natten3dav",
    "natten3dqk",
    "natten3dqkrpb",
]
