"""The last sum of drpb: over the partial sums that blocks leave in the workspace, in a fixed order."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from math import ceil, prod

from natcore.planning.plan import Constant, KernelInfo, KernelSpec, Launch, Operand, Workspace, capability
from natcore.problem import OPERANDS, Problem

WARPS = 16
SUM_DRPB = KernelInfo("sum_drpb", ("sm_80+",), max_registers=64, max_shared_bytes=2 << 10)


def sum_drpb(
    problem: Problem, head: int, axis: Sequence[int], shape: Sequence[int], slices: int, arch: str, at: int = 0
) -> Launch:
    """drpb from tables ``[slices, heads, *shape]`` of float32, ``at`` bytes into the workspace.

    ``head`` and ``axis`` are drpb's strides in elements, ``axis`` and ``shape`` of three axes in the tables' order.
    """
    defines = (("RESULT", str(problem.rpb_dtype)), ("WARPS", str(WARPS)))
    params = Constant(struct.pack("=4q5i4x", head, *axis, problem.heads, *shape, slices))
    return Launch(
        KernelSpec("sum_drpb", defines, arch),
        (ceil(problem.heads * prod(shape) / 32), 1, 1),
        (32 * WARPS, 1, 1),
        0,
        (Workspace(at), Operand(OPERANDS["backward"].index("drpb")), params),
        overlaps=capability(arch) >= 90,
    )
