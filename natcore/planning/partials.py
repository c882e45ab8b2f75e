"""drpb from the tables that blocks leave behind (cuda_src/kernels/bias_from_partials.cu)."""

from __future__ import annotations

import struct
from math import ceil, prod

from natcore.planning.plan import Constant, KernelInfo, KernelSpec, Launch, Operand, Workspace
from natcore.problem import OPERANDS, Problem

KERNEL = KernelInfo("bias_from_partials", ("sm_80+",), max_registers=64, max_shared_bytes=2 << 10)
WARPS = 16


def bias_launch(problem: Problem, strides: tuple[int, ...], slices: int, arch: str, offset: int) -> Launch:
    """The launch that sums ``slices`` tables ``[slices, heads, *rpb's shape]`` at ``offset`` of the workspace.

    ``strides`` are those of drpb.
    """
    axis = tuple(strides[1:])
    shape = tuple(2 * k - 1 for k in problem.window.kernel_size)
    # Missing axes have extent 1; a 1-D problem lies on the middle one.
    places = {1: (1,), 2: (1, 2), 3: (0, 1, 2)}[problem.window.rank]
    steps, extents = [0, 0, 0], [1, 1, 1]
    for place, step, extent in zip(places, axis, shape, strict=True):
        steps[place], extents[place] = step, extent
    params = Constant(struct.pack("=4q5i4x", strides[0], *steps, problem.heads, *extents, slices))
    defines = (("RESULT", str(problem.rpb_dtype)), ("WARPS", str(WARPS)))
    return Launch(
        KernelSpec(KERNEL.name, defines, arch),
        (ceil(problem.heads * prod(shape) / 32), 1, 1),
        (32 * WARPS, 1, 1),
        0,
        (Workspace(offset), Operand(OPERANDS["backward"].index("drpb")), params),
    )
