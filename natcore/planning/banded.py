"""Plans for the tensor core backward of small windows (cuda_src/kernels/banded_backward.cu), 16-bit elements.

How the map is cut is compiled in (see `banded_geometry` and, for the choice, `banded_cost`), with the window
and the head dimensions; extents, batch, heads and strides are arguments.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from functools import partial
from math import ceil, prod

from natcore.planning import listed
from natcore.planning.banded_cost import choose_geometry
from natcore.planning.banded_geometry import Geometry
from natcore.planning.operands import alignment, refusal_of_elements, refusal_of_strides, strides_of
from natcore.planning.plan import (
    Candidate,
    Constant,
    DeviceFacts,
    KernelInfo,
    KernelSpec,
    Launch,
    Operand,
    Plan,
    Scale,
    Workspace,
)
from natcore.problem import OPERANDS, Call, Problem

BIAS_WARPS = 16
_LAYOUTS = ("d_out", "q", "k", "v", "out", "lse", "d_lse", "rpb", "dq", "dk", "dv")
OPTIONS = (
    *("band", "block_rows", "groups", "region0", "region1", "region2"),
    *("query_warps", "warps", "blocks_per_sm", "ahead", "ring_step"),
)


def _layout(call: Call, name: str, g: Geometry) -> bytes:
    """struct Layout of one operand; of absent ones, zeros."""
    strides = strides_of(call, name)
    if strides is None:
        return bytes(40)
    batch, given, head = strides
    planes = 0
    if g.batch_is_axis:
        batch, planes = 0, batch
    axis = {1: (planes, *given, 0), 2: (planes, *given), 3: given}[len(given)]
    step = [s * (1 if name == "rpb" else x.dilation) for s, x in zip(axis, g.axes, strict=True)]
    return struct.pack("=q7i4x", batch, head, *axis, *step)


def plan(call: Call, facts: DeviceFacts, options: Mapping[str, int]) -> Plan:
    """The plan of a call that `refusal` has passed."""
    g = choose_geometry(call.problem, facts, options)
    if g is None or g.shared_bytes > facts.shared_bytes_per_block:
        raise ValueError(f"config: {g} needs {g and g.shared_bytes} bytes of shared memory.")
    problem, slices = call.problem, g.slices(facts)
    index = OPERANDS["backward"].index
    operands = tuple(Operand(index(name), alignment(name)) for name in _LAYOUTS)
    extents = (axis.extent for axis in g.axes)
    sizes = struct.pack("=9i4x", *extents, *g.regions, g.batch, problem.heads, slices)
    params = Constant(sizes + b"".join(_layout(call, name, g) for name in _LAYOUTS))
    drpb = call.strides[index("drpb")]
    partials = Workspace(0) if drpb is not None else Constant(bytes(8))
    main = Launch(
        KernelSpec("banded_backward", g.defines, facts.arch),
        (problem.heads * slices, 1, 1),
        (g.threads, 1, 1),
        g.shared_bytes,
        (*operands, partials, Scale("float32"), params),
    )
    if drpb is None:
        return Plan((main,), 0)
    return Plan((main, sum_of_partials(problem, drpb, slices, facts.arch)), slices * problem.heads * g.entries * 4)


def sum_of_partials(problem: Problem, strides: tuple[int, ...], slices: int, arch: str) -> Launch:
    """drpb, of these strides, from the tables [slices, heads, *shape] at the workspace's start."""
    defines = (("RESULT", str(problem.rpb_dtype)), ("WARPS", str(BIAS_WARPS)))
    given, table = strides[1:], problem.window.rpb_shape
    axis = {1: (0, *given, 0), 2: (0, *given), 3: given}[len(given)]
    shape = {1: (1, *table, 1), 2: (1, *table), 3: table}[len(table)]
    params = Constant(struct.pack("=4q5i4x", strides[0], *axis, problem.heads, *shape, slices))
    return Launch(
        KernelSpec("banded_backward_bias", defines, arch),
        (ceil(problem.heads * prod(table) / 32), 1, 1),
        (32 * BIAS_WARPS, 1, 1),
        0,
        (Workspace(0), Operand(OPERANDS["backward"].index("drpb")), params),
    )


def refusal(call: Call, facts: DeviceFacts) -> str | None:
    """Why the banded kernel cannot run a call, or None."""
    p = call.problem
    if call.direction != "backward":
        return "there is no banded forward."
    reason = refusal_of_elements(call, facts, "banded")
    if reason is not None:
        return reason
    if p.extra or p.batch == 0 or p.heads != p.heads_kv:
        return "additional keys, empty batches and grouped heads are for the general kernels."
    reason = refusal_of_strides(call, 1 << 31, "32 bits")
    if reason is not None:
        return reason
    if choose_geometry(p, facts, {}) is None:
        return f"kernel_size {p.window.kernel_size}: not even the neighbourhood of 8 queries fits into shared memory."
    return None


CANDIDATE = Candidate(
    "banded",
    (
        KernelInfo("banded_backward", ("sm_80+",), max_registers=255, max_shared_bytes=0),
        KernelInfo("banded_backward_bias", ("sm_80+",), max_registers=64, max_shared_bytes=2 << 10),
    ),
    OPTIONS,
    refusal,
    plan,
    partial(listed.small_windows, "backward"),
)
