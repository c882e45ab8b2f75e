"""Plans for the backward of maps that fit into a block's shared memory (cuda_src/kernels/resident_backward.cu).

How tokens are grouped is compiled in (see `resident_geometry`), with the window, the map's extent in a dilation group
and the head dimensions; extents, batch, heads and strides are arguments.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from functools import partial
from math import ceil, prod

from natcore.planning import listed
from natcore.planning.operands import alignment, layout_of_two_axes
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
from natcore.planning.resident_geometry import Maps, choose_geometry, refusal_of_maps
from natcore.problem import OPERANDS, Call, Problem

OPTIONS = ("at_once", "warps", "blocks_per_sm")
_OPERANDS = ("d_out", "q", "k", "v", "out", "lse", "d_lse", "rpb", "dq", "dk", "dv")
#: Clocks of both launches, of each phase of a map on a multiprocessor, and of each unit; fitted to nine measured times
#: on an H200, with errors of at most 12 %.
_LAUNCH, _PHASE, _UNIT = 25_000, 2_600, 87


def launch_of(
    kernel: str,
    call: Call,
    facts: DeviceFacts,
    g: Maps,
    slices: int,
    names: tuple[str, ...],
    more: tuple[Param, ...] = (),
) -> Launch:
    """One of a kernel of whole maps: pointers to its operands ``names``, ``more``, the scale, struct Params."""
    p, index = call.problem, OPERANDS[call.direction].index
    sizes = struct.pack("=4i", *p.spatial, p.batch, slices)
    params = Constant(sizes + b"".join(layout_of_two_axes(call, name) for name in names))
    operands = (Operand(index(name), alignment(name)) for name in names)
    return Launch(
        KernelSpec(kernel, g.defines, facts.arch),
        (p.heads, g.map_groups * slices, 1),
        (32 * g.warps, 1, 1),
        g.shared_bytes,
        (*operands, *more, Scale("float32"), params),
    )


def backward_of(kernel: str, call: Call, facts: DeviceFacts, g: Maps, slices: int) -> Plan:
    """The plan of a backward of whole maps: its launch, and the last sum of drpb."""
    p = call.problem
    drpb = call.strides[OPERANDS["backward"].index("drpb")]
    partials: Param = Constant(bytes(8)) if drpb is None else Workspace(0)
    main = launch_of(kernel, call, facts, g, slices, _OPERANDS, (partials,))
    if drpb is None:
        return Plan((main,), 0)
    head, *axis = drpb
    tables, shape = slices * g.map_groups, (1, *p.window.rpb_shape)
    return Plan((main, sum_drpb(p, head, (0, *axis), shape, tables, facts.arch)), tables * p.heads * prod(shape) * 4)


def plan(call: Call, facts: DeviceFacts, options: Mapping[str, int]) -> Plan:
    """The plan of a call that `refusal` has passed."""
    g = choose_geometry(call.problem, facts, options)
    if g is None:
        raise ValueError(
            f"config: the options {dict(options)} need more shared memory than {facts} has, for {call.problem}."
        )
    return backward_of("resident_backward", call, facts, g, g.slices(facts))


def refusal_of_backward(
    problem: Problem, facts: DeviceFacts, choose: Callable[[Problem, DeviceFacts, Mapping[str, int]], Maps | None]
) -> str | None:
    """Why no backward of whole maps can take grouped heads, or no geometry that it may ``choose`` fits, or None."""
    if problem.heads != problem.heads_kv:
        return (
            f"heads {problem.heads}, heads_kv {problem.heads_kv}: the backward of grouped heads is for the tiled one."
        )
    if choose(problem, facts, {}) is None:
        return f"map {problem.spatial}: {facts} has too little shared memory."
    return None


def refusal(call: Call, facts: DeviceFacts) -> str | None:
    """Why the resident kernel cannot run a call, or None."""
    return refusal_of_maps(call, facts) or refusal_of_backward(call.problem, facts, choose_geometry)


def clocks(call: Call, facts: DeviceFacts) -> float:
    """By the cost model: phases and units of the maps of the busiest multiprocessor."""
    g = choose_geometry(call.problem, facts, {})
    assert g is not None  # refused
    return _LAUNCH + g.maps_in_turn(facts) * (_PHASE * ceil(g.pairs / g.at_once) + _UNIT * g.bands * g.units)


#: Some of drpb's sums, which a map needs once or twice, wait in local memory: up to 10 of 24 registers, by compiler.
_KERNEL = KernelInfo("resident_backward", ("sm_80+",), max_registers=255, max_shared_bytes=0, max_spilled_bytes=240)
CANDIDATE = Candidate(
    "resident",
    (_KERNEL, SUM_DRPB),
    OPTIONS,
    refusal,
    plan,
    partial(listed.small_windows, "backward"),
    directions=("backward",),
    clocks=clocks,
)
