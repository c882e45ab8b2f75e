"""Plans for the tensor core forward of small two-dimensional windows (cuda_src/kernels/marching_forward.cu).

How the map is cut is compiled in (see `marching_geometry` and, for the choice, `marching_cost`), with the window and
the head dimensions; extents, batch, heads and strides are arguments.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from functools import partial

from natcore.planning import listed
from natcore.planning.marching_cost import choose_geometry
from natcore.planning.marching_geometry import Geometry
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
)
from natcore.problem import OPERANDS, Call

LEAST_COLUMNS = 8  # a map's; on narrower ones the tiled kernel was faster
_OPERANDS = ("q", "k", "v", "rpb", "out", "lse")
OPTIONS = ("band", "block_rows", "groups", "tiles", "heads", "ring", "query_ring", "producers", "blocks_per_sm")


def _layout(call: Call, name: str, g: Geometry) -> bytes:
    """struct Layout of one operand; of absent ones, zeros."""
    strides = strides_of(call, name)
    if strides is None:
        return bytes(32)
    batch, axis, head = strides
    step = [s * x.dilation for s, x in zip(axis, g.axes, strict=True)]
    return struct.pack("=q5i4x", batch, head, *axis, *(axis if name == "rpb" else step))


def plan(call: Call, facts: DeviceFacts, options: Mapping[str, int]) -> Plan:
    """The plan of a call that `refusal` has passed."""
    problem = call.problem
    g = choose_geometry(problem, facts, options)
    if g is None:
        raise ValueError(f"config: no geometry with the options {dict(options)} fits {problem}.")
    slices = g.slices(facts)
    sizes = struct.pack(
        "=8i",
        *problem.spatial,
        problem.batch,
        problem.heads // problem.heads_kv,
        g.bands,
        g.strips,
        g.head_groups,
        slices,
    )
    params = Constant(sizes + b"".join(_layout(call, name, g) for name in _OPERANDS))
    operands = tuple(Operand(OPERANDS["forward"].index(name), alignment(name)) for name in _OPERANDS)
    launch = Launch(
        KernelSpec("marching_forward", g.defines, facts.arch),
        (g.head_groups * slices, 1, 1),
        (g.threads, 1, 1),
        g.shared_bytes,
        (*operands, Scale("float32"), params),
    )
    return Plan((launch,), 0)


def refusal(call: Call, facts: DeviceFacts) -> str | None:
    """Why the marching kernel cannot run a call, or None."""
    p = call.problem
    if p.window.rank != 2:
        return f"{p.window.rank}-D windows are for the tiled kernel."
    reason = refusal_of_elements(call, facts, "marching")
    if reason is not None:
        return reason
    if p.spatial[1] // p.window.dilation[1] < LEAST_COLUMNS:
        return f"{p.spatial[1]} columns with dilation {p.window.dilation[1]}: narrow maps are for the tiled kernel."
    if p.extra or p.batch == 0:
        return "additional keys and empty batches are for the general kernel."
    reason = refusal_of_strides(call, 1 << 27, "the 32 bits of offsets inside a tile", first=1)
    if reason is not None:
        return reason
    if choose_geometry(p, facts, {}) is None:
        return f"kernel_size {p.window.kernel_size}: the windows of 8 queries do not fit a row of blocks."
    return None


CANDIDATE = Candidate(
    "marching",
    (KernelInfo("marching_forward", ("sm_80+",), max_registers=255, max_shared_bytes=0),),
    OPTIONS,
    refusal,
    plan,
    partial(listed.small_windows, "forward"),
    directions=("forward",),
)
