"""Plans for the tensor core kernels of maps of at most 64 tokens (cuda_src/kernels/whole_*.cu), 16-bit elements.

How tokens are numbered is compiled in (see `whole_geometry`), with the window and the head dimensions; extents that
need as many tiles, batch, heads and strides are arguments.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from functools import partial
from math import ceil, prod

from natcore.planning import listed
from natcore.planning.operands import alignment, refusal_of_elements, refusal_of_strides, strides_of
from natcore.planning.partials import SUM_DRPB, sum_drpb
from natcore.planning.plan import (
    Candidate,
    Constant,
    DeviceFacts,
    KernelInfo,
    KernelSpec,
    Launch,
    Operand,
    Param,
    Plan,
    Scale,
    Workspace,
)
from natcore.planning.whole_geometry import Geometry, choose_geometry, tile_for
from natcore.problem import OPERANDS, Call

MAX_HEAD_DIM = 32  # of the forward
MAX_HEADS = 65_535
MAX_ACCUMULATORS = 128  # of the backward, registers
#: Clocks of a launch, and of each map of 7 x 7 tokens and head_dim 32 on a multiprocessor. Of the backward, fitted to
#: measured times on an H200; of the forward, such that it stands to those of tiling_cost as its measured times do.
_CLOCKS = {"forward": (9_200, 350), "backward": (12_000, 2_100)}
OPTIONS = ("warps", "heads", "stages", "blocks_per_sm")
_FORWARD = ("q", "k", "v", "rpb", "out", "lse")
_BACKWARD = ("d_out", "q", "k", "v", "lse", "d_lse", "rpb", "dq", "dk", "dv")


def _layout(call: Call, name: str, g: Geometry) -> bytes:
    """struct Layout of one operand; of absent ones, zeros."""
    strides = strides_of(call, name)
    if strides is None:
        return bytes(40)
    batch, given, head = strides
    axis = (0,) * (3 - len(given)) + given
    step = [s * x.dilation for s, x in zip(axis, g.axes, strict=True)]
    return struct.pack("=q7i4x", batch, head, *axis, *step)


def _launch(call: Call, facts: DeviceFacts, g: Geometry, names: tuple[str, ...], more: tuple[Param, ...]) -> Launch:
    """The launch of a kernel on operands, by name, and other parameters."""
    p, slices = call.problem, g.slices(facts)
    extents = (axis.extent for axis in g.axes)
    sizes = struct.pack("=7i4x", *extents, p.batch, p.heads, p.heads // p.heads_kv, slices)
    params = Constant(sizes + b"".join(_layout(call, name, g) for name in names))
    index = OPERANDS[call.direction].index
    operands = (Operand(index(name), alignment(name)) for name in names)
    return Launch(
        KernelSpec(f"whole_{call.direction}", g.defines, facts.arch),
        (g.groups * slices, p.heads // g.heads, 1),
        (32 * g.warps, 1, 1),
        g.shared_bytes,
        (*operands, *more, Scale("float32"), params),
    )


def _geometry(call: Call, facts: DeviceFacts, options: Mapping[str, int]) -> Geometry | None:
    """Teams of the forward copy the heads of a token as one row: where those lie apart, a team is one warp."""
    p = call.problem
    if call.direction == "forward":
        strides = (
            (strides_of(call, name), d) for name, d in zip("qkv", (p.head_dim, p.head_dim, p.head_dim_v), strict=True)
        )
        apart = any(of is not None and of[2] != d for of, d in strides)
        if apart and p.heads > 1:
            if options.get("heads", 1) != 1:
                raise ValueError(f"config: heads {options['heads']}, but those of q, k or v lie apart in memory.")
            options = {**options, "heads": 1}
    return choose_geometry(p, call.direction, facts, options)


def plan(call: Call, facts: DeviceFacts, options: Mapping[str, int]) -> Plan:
    """The plan of a call that `refusal` has passed."""
    p = call.problem
    g = _geometry(call, facts, options)
    if g is None:
        raise ValueError(f"config: the options {dict(options)} need more shared memory than {facts} has, for {p}.")
    if call.direction == "forward":
        return Plan((_launch(call, facts, g, _FORWARD, ()),), 0)
    drpb = call.strides[OPERANDS["backward"].index("drpb")]
    if drpb is None:
        return Plan((_launch(call, facts, g, _BACKWARD, (Constant(bytes(8)),)),), 0)
    slices = g.slices(facts) * g.groups
    main = _launch(call, facts, g, _BACKWARD, (Workspace(0),))
    head, *axis = drpb
    missing = 3 - len(axis)  # axes, which lead
    axis, shape = (*[0] * missing, *axis), (*[1] * missing, *p.window.rpb_shape)
    return Plan((main, sum_drpb(p, head, axis, shape, slices, facts.arch)), slices * p.heads * g.entries * 4)


def refusal(call: Call, facts: DeviceFacts) -> str | None:
    """Why the kernels of whole maps cannot run a call, or None. What other kernels did faster is theirs."""
    p = call.problem
    reason = refusal_of_elements(call, facts, "whole-map")
    if reason is not None:
        return reason
    if p.extra or p.batch == 0:
        return "additional keys and empty batches are for the general kernel."
    if p.heads > MAX_HEADS:
        return f"heads {p.heads}: beyond {MAX_HEADS}, what the second axis of a grid takes."
    if tile_for(p) is None:
        return f"map {p.spatial}, dilation {p.window.dilation}: more than 8 tiles of 8 tokens in a dilation group."
    reason = refusal_of_strides(call, 1 << 24, "the 32 bits of offsets inside a map", first=1)
    if reason is not None:
        return reason
    g = _geometry(call, facts, {})
    if g is None:
        return f"head_dim {p.head_dim}, head_dim_v {p.head_dim_v}: a map does not fit into shared memory."
    return _refusal_of_forward(g) if call.direction == "forward" else _refusal_of_backward(g)


def _refusal_of_forward(g: Geometry) -> str | None:
    p = g.problem
    if max(p.head_dim, p.head_dim_v) > MAX_HEAD_DIM:
        return f"head_dim {p.head_dim}, head_dim_v {p.head_dim_v}: beyond {MAX_HEAD_DIM} the tiled kernel is faster."
    if not g.full:
        return f"kernel_size {p.window.kernel_size}: maps that queries see a part of are for the tiled kernel."
    return None


def _refusal_of_backward(g: Geometry) -> str | None:
    p = g.problem
    if p.heads != p.heads_kv:
        return f"heads {p.heads}, heads_kv {p.heads_kv}: the backward of grouped heads is for the tiled one."
    if g.accumulators > MAX_ACCUMULATORS:
        return (
            f"head_dim {p.head_dim}, head_dim_v {p.head_dim_v}: dK and dV of {prod(g.tiles)} tiles of 8 tokens are "
            f"{g.accumulators} registers a thread; at most {MAX_ACCUMULATORS} are left."
        )
    return None


def clocks(call: Call, facts: DeviceFacts) -> float:
    """By the cost model: blocks of scores, and their products, of the maps of the busiest multiprocessor."""
    p = call.problem
    g = _geometry(call, facts, {})
    assert g is not None  # refused
    tiles = prod(g.tiles)
    work = tiles * ceil(tiles / 2) / 28 * (0.5 + (p.head_dim + p.head_dim_v) / 128)
    launch, each = _CLOCKS[call.direction]
    return launch + each * work * ceil(p.batch * p.heads * g.groups / facts.multiprocessors)


CANDIDATE = Candidate(
    "whole",
    (
        *(
            KernelInfo(f"whole_{of}", ("sm_80+",), max_registers=255, max_shared_bytes=0)
            for of in ("forward", "backward")
        ),
        SUM_DRPB,
    ),
    OPTIONS,
    refusal,
    plan,
    partial(listed.small_windows, "forward", "backward"),
    clocks=clocks,
)
