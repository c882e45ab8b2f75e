"""Plans for the tiled backward (cuda_src/kernels/tiled_queries.cu, tiled_keys.cu).

Two passes: one of queries, which makes dq and partial sums of drpb and leaves each query's scalars in the workspace,
and one of keys, which makes dk and dv. How the map is cut is compiled in (see `tiled_backward_geometry` and, for the
choice, `tiled_backward_cost`), with the window and the head dimensions; extents, batch, heads and strides are
arguments.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from math import prod

from natcore.planning import listed
from natcore.planning.operands import alignment, refusal_of_elements, refusal_of_strides, strides_of
from natcore.planning.partials import SUM_DRPB, sum_drpb
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
from natcore.planning.tiled_backward_cost import choose_geometry, cost
from natcore.planning.tiled_backward_geometry import PASSES, Geometry, Pass
from natcore.problem import OPERANDS, Call

_CHOICES = ("ordering", "columns", "region0", "region1", "stages", "blocks_per_sm")
OPTIONS = (*_CHOICES, *(KEYS + name for name in _CHOICES))
_QUERIES = ("d_out", "q", "k", "v", "out", "lse", "d_lse", "rpb", "dq")
LONGEST_FLOAT32 = 192  # elements of a key and its value
WORKSPACE = 16 << 20  # bytes of partial sums of drpb, at most


def _packed(batch: int, head: int, axis: tuple[int, ...], step: tuple[int, ...]) -> bytes:
    """struct Layout of common/tiled_boxes.cuh."""
    return struct.pack("=q7i4x", batch, head, *axis, *step)


def _layout(call: Call, name: str, g: Geometry) -> bytes:
    """struct Layout of one operand; of absent ones, zeros."""
    strides = strides_of(call, name)
    if strides is None:
        return bytes(40)
    batch, given, head = strides
    axis = tuple(given[a] if a >= 0 else 0 for a in g.order)
    return _packed(batch, head, axis, axis if name == "rpb" else _steps(g, axis))


def _steps(g: Geometry, axis: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(s * x.dilation for s, x in zip(axis, g.axes, strict=True))


def _scalars(g: Geometry) -> bytes:
    """The layout of the queries' scalars: [batch, heads, *spatial]."""
    spatial = g.problem.spatial
    strides = [prod(spatial[a + 1 :]) for a in range(len(spatial))]
    axis = tuple(strides[a] if a >= 0 else 0 for a in g.order)
    return _packed(prod(spatial) * g.problem.heads, prod(spatial), axis, _steps(g, axis))


def _launch(call: Call, facts: DeviceFacts, g: Geometry, params: tuple[str | Param, ...], more: bytes) -> Launch:
    """The launch of one pass. ``params``: operands, by name, whose layouts go into struct Params, and others;
    ``more``: what follows them there."""
    slices = g.slices(facts)
    numbers = (*(axis.extent for axis in g.axes), g.problem.batch, g.heads, *g.regions, slices, g.items)
    layouts = b"".join(_layout(call, name, g) for name in params if isinstance(name, str))
    constants = struct.pack("=9i4x", *numbers) + layouts + more
    index = OPERANDS[call.direction].index
    operands = (Operand(index(x), alignment(x)) if isinstance(x, str) else x for x in params)
    return Launch(
        KernelSpec(f"tiled_{g.of}", g.defines, facts.arch),
        (g.heads * slices, 1, 1),
        (32 * g.warps, 1, 1),
        g.shared_bytes,
        (*operands, Scale("float32"), Constant(constants)),
    )


def _sum_drpb(call: Call, g: Geometry, partials: int, slices: int, arch: str) -> Launch:
    """drpb from the partial sums, whose axes are in the kernel's order."""
    strides = strides_of(call, "drpb")
    assert strides is not None
    axis = [strides[1][a] if a >= 0 else 0 for a in g.order]
    return sum_drpb(g.problem, strides[2], axis, [2 * x.kernel - 1 for x in g.axes], slices, arch, partials)


def _chosen(call: Call, facts: DeviceFacts, options: Mapping[str, int], of: Pass) -> Geometry:
    its = options_of(options, of)
    g = choose_geometry(call.problem, facts, its, of)
    if g is None:
        raise ValueError(f"config: no geometry of {of} with the options {its} fits {call.problem}.")
    return g


def plan(call: Call, facts: DeviceFacts, options: Mapping[str, int]) -> Plan:
    """The plan of a call that `refusal` has passed."""
    p = call.problem
    queries, keys = (_chosen(call, facts, options, of) for of in PASSES)
    given = dict(zip(call.operands, call.strides, strict=True))
    scalars, slices = scalars_bytes(p), queries.slices(facts)
    with_bias = given["drpb"] is not None
    partials: Param = Workspace(scalars) if with_bias else Constant(bytes(8))
    more = _scalars(queries) + struct.pack("=i4x", p.heads // p.heads_kv)
    launches = [_launch(call, facts, queries, (*_QUERIES, Workspace(0), partials), more)]
    if given["dk"] is not None or given["dv"] is not None:
        params = ("d_out", "q", "k", "v", Workspace(0), "rpb", "dk", "dv")
        launches.append(_launch(call, facts, keys, params, _scalars(keys)))
    if with_bias:
        launches.append(_sum_drpb(call, queries, scalars, slices, facts.arch))
    return Plan(tuple(launches), scalars + (slices * p.heads * queries.entries * 4 if with_bias else 0))


def _farthest(call: Call, g: Geometry) -> int:
    """Elements from the first slot of a plane to the farthest one, of any operand."""
    strides = [found for name in ("d_out", "q", "k", "v") if (found := strides_of(call, name)) is not None]
    steps = [_steps(g, tuple(given[a] if a >= 0 else 0 for a in g.order)) for _, given, _ in strides]
    return max(sum(abs(step) * slots for step, slots in zip(its[1:], g.span, strict=True)) for its in steps)


def refusal(call: Call, facts: DeviceFacts) -> str | None:
    """Why the tiled backward cannot run a call, or None."""
    p = call.problem
    if call.direction != "backward":
        return "its forward has a name of its own."
    reason = refusal_of_elements(call, facts, "tiled backward", float32=True)
    if reason is not None:
        return reason
    if p.dtype == "float32" and p.head_dim + p.head_dim_v > LONGEST_FLOAT32:
        return (
            f"head_dim {p.head_dim}, head_dim_v {p.head_dim_v}, float32: beyond {LONGEST_FLOAT32} in all few warps "
            "have room; the general kernels are faster."
        )
    if p.extra or p.batch == 0:
        return "additional keys and empty batches are for the general kernels."
    reason = refusal_of_strides(call, 1 << 31, "32 bits", first=1)
    if reason is not None:
        return reason
    for of in PASSES:
        g = choose_geometry(p, facts, {}, of)
        if g is None:
            return f"kernel_size {p.window.kernel_size}: what 16 {of} see does not fit into shared memory."
        far = _farthest(call, g)
        if far >= 1 << 31:
            return f"strides {call.strides}: the span of a block reaches {far} elements far, beyond 32 bits."
        if of == "queries" and p.rpb_dtype is not None and g.slices(facts) * p.heads * g.entries * 4 > WORKSPACE:
            return (
                f"kernel_size {p.window.kernel_size}, {p.heads} heads: the partial sums of drpb take too much memory."
            )
    return None


def clocks(call: Call, facts: DeviceFacts) -> float:
    """By the cost model, of both passes."""
    return sum(cost(_chosen(call, facts, {}, of), facts) for of in PASSES)


CANDIDATE = Candidate(
    "tiled_backward",
    (*(KernelInfo(f"tiled_{of}", ("sm_80+",), max_registers=255, max_shared_bytes=0) for of in PASSES), SUM_DRPB),
    OPTIONS,
    refusal,
    plan,
    lambda: (*listed.small_windows("backward"), *listed.small_windows_float32("backward")),
    directions=("backward",),
    clocks=clocks,
)
