"""Plans for the tensor core kernels of small two-dimensional windows (cuda_src/kernels/marching_*.cu).

How the map is cut is compiled in (see `marching_geometry` and, for the choice, `marching_cost`), with the window and
the head dimensions; extents, batch, heads and strides are arguments.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from functools import partial

from natcore.planning import listed
from natcore.planning.marching_cost import choose_geometry, cost
from natcore.planning.marching_geometry import PASSES, Geometry, Pass
from natcore.planning.operands import alignment, layout_of_two_axes, refusal_of_elements, refusal_of_strides
from natcore.planning.passes import KEYS, options_of, scalars_bytes
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
from natcore.problem import OPERANDS, Call, Direction

LEAST_COLUMNS = 8  # a map's; on narrower ones other kernels were faster
_CHOICES = ("band", "block_rows", "groups", "tiles", "heads", "ring", "own_ring", "producers", "blocks_per_sm")
OPTIONS = (*_CHOICES, *(KEYS + name for name in _CHOICES))
_FORWARD = ("q", "k", "v", "rpb", "out", "lse")
_QUERIES = ("d_out", "q", "k", "v", "out", "lse", "d_lse", "rpb", "dq")
_KEYS = ("rpb", "dk", "dv", "drpb")


def _launch(
    call: Call, facts: DeviceFacts, g: Geometry, params: tuple[str | Param, ...], more: tuple[int, ...] = ()
) -> Launch:
    """The launch of one pass. ``params``: operands, by name, whose layouts go into struct Params, and others;
    ``more``: integers at the end of struct Params."""
    p, slices = call.problem, g.slices(facts)
    numbers = (*p.spatial, p.batch, p.heads // p.heads_kv, g.bands, g.strips, g.head_groups, slices)
    layouts = b"".join(layout_of_two_axes(call, name) for name in params if isinstance(name, str))
    constants = struct.pack("=8i", *numbers) + layouts + struct.pack(f"={len(more)}i", *more)
    constants += bytes(-len(constants) % 8)
    index = OPERANDS[call.direction].index
    operands = (Operand(index(x), alignment(x)) if isinstance(x, str) else x for x in params)
    return Launch(
        KernelSpec(f"marching_{g.of}", g.defines, facts.arch),
        (g.head_groups * slices, 1, 1),
        (g.threads, 1, 1),
        g.shared_bytes,
        (*operands, Scale("float32"), Constant(constants)),
    )


def passes_of(direction: Direction) -> tuple[Pass, ...]:
    """In the order of their launches."""
    return ("forward",) if direction == "forward" else ("queries", "keys")


def _chosen(call: Call, facts: DeviceFacts, options: Mapping[str, int], of: Pass) -> Geometry:
    its = options_of(options, of)
    g = choose_geometry(call.problem, facts, its, of)
    if g is None:
        raise ValueError(f"config: no geometry of {of} with the options {its} fits {call.problem}.")
    return g


def plan(call: Call, facts: DeviceFacts, options: Mapping[str, int]) -> Plan:
    """The plan of a call that `refusal` has passed."""
    if call.direction == "forward":
        return Plan((_launch(call, facts, _chosen(call, facts, options, "forward"), _FORWARD),), 0)
    p = call.problem
    queries, keys = (_chosen(call, facts, options, of) for of in passes_of("backward"))
    scalars = scalars_bytes(p)
    with_bias, slices = call.strides[OPERANDS["backward"].index("drpb")] is not None, queries.slices(facts)
    partials: Param = Workspace(scalars) if with_bias else Constant(bytes(8))
    launches = (
        _launch(call, facts, queries, (*_QUERIES, Workspace(0), partials)),
        _launch(call, facts, keys, ("d_out", "q", "k", "v", Workspace(0), *_KEYS, partials), (slices,)),
    )
    return Plan(launches, scalars + (slices * p.heads * queries.entries * 4 if with_bias else 0))


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
    if call.direction == "backward" and p.heads != p.heads_kv:
        return f"heads {p.heads}, heads_kv {p.heads_kv}: the backward of grouped heads is for the tiled one."
    if any(choose_geometry(p, facts, {}, of) is None for of in passes_of(call.direction)):
        return f"kernel_size {p.window.kernel_size}: what 8 tokens see does not fit a row of blocks."
    return None


def clocks(call: Call, facts: DeviceFacts) -> float:
    """By the cost model, of all passes."""
    return sum(cost(_chosen(call, facts, {}, of), facts) for of in passes_of(call.direction))


CANDIDATE = Candidate(
    "marching",
    tuple(KernelInfo(f"marching_{of}", ("sm_80+",), max_registers=255, max_shared_bytes=0) for of in PASSES),
    OPTIONS,
    refusal,
    plan,
    partial(listed.small_windows, "forward", "backward"),
    clocks=clocks,
)
