"""Plans for the tensor core kernel of small windows (cuda_src/kernels/tiled_forward.cu).

A `Geometry` says how the map is cut: 16 queries make a tile, some tiles a region (one block), and the
union of their windows is gathered in shared memory. All of it is compiled in, with the window and the
head dimensions; extents, batch, heads and strides are arguments. planning/tiling_cost.py chooses it.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import replace

from natcore.planning import listed
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
from natcore.planning.tiling import TILE_QUERIES, Geometry
from natcore.planning.tiling_cost import MAX_BLOCKS, TILES, choose_geometry, cost, is_legal
from natcore.problem import OPERANDS, Call, Problem

_LAYOUTS = ("q", "k", "v", "rpb", "out", "lse")
OPTIONS = (
    "axes",
    *(f"{n}{a}" for n in ("tile", "region") for a in range(3)),
    "warps",
    "blocks_per_sm",
    "chunk",
    "stages",
    "rounds",
)


def _best(problem: Problem, facts: DeviceFacts) -> Geometry | None:
    return choose_geometry(problem, facts.shared_bytes_per_block, facts.multiprocessors)


def configured(call: Call, facts: DeviceFacts, options: Mapping[str, int]) -> Geometry:
    """The best geometry of a call that `refusal` has passed or, with options, the one that they spell out."""
    best = _best(call.problem, facts)
    if best is None:
        raise NotImplementedError(_too_large(call.problem))
    if not options:
        return best
    rank = call.problem.window.rank
    axes = options.get("axes", int("".join(str(a) for a in best.order if a >= 0)))
    order = (-1,) * (3 - rank) + tuple(int(x) for x in f"{axes:0{rank}d}")
    tile = tuple(options.get(f"tile{a}", best.tile[a]) for a in range(3))
    region = tuple(options.get(f"region{a}", best.region[a]) for a in range(3))
    if tile not in TILES or min(region) < 1 or sorted(order) != sorted(best.order):
        raise ValueError(f"config: axes {axes}, tile {tile} and region {region}: a tile is {TILE_QUERIES} queries.")
    unit = Geometry.of(call.problem, order, tile, region)
    launch = {n: options.get(n, getattr(best, n)) for n in ("warps", "blocks_per_sm", "stages", "rounds")}
    chosen = replace(unit, chunk=options.get("chunk", unit.chunk), **launch)
    if min(launch.values()) < 1 or not is_legal(chosen) or chosen.shared_bytes > facts.shared_bytes_per_block:
        raise ValueError(
            f"config: {dict(options)} gives {chosen.blocks} blocks of scores and {chosen.shared_bytes} bytes of shared "
            f"memory; at most {MAX_BLOCKS} and {facts.shared_bytes_per_block} are possible."
        )
    return chosen


def _too_large(problem: Problem) -> str:
    return f"kernel_size {problem.window.kernel_size}: the halo of {TILE_QUERIES} queries is too large."


# ---- the candidate ----


def _divisor(d: int) -> bytes:
    """struct Divisor of common/tiles.cuh."""
    shift = (d - 1).bit_length()
    return struct.pack("=3I", d, (1 << 32 + shift) // d + 1 - (1 << 32) if d > 1 else 0, shift)


def _layout(call: Call, name: str, g: Geometry) -> bytes:
    """struct Layout of one operand; of absent ones, zeros."""
    strides = strides_of(call, name)
    if strides is None:
        return bytes(40)
    batch, axes, head = strides
    axis = [axes[a] if a >= 0 else 0 for a in g.order]
    step = [s * x.dilation for s, x in zip(axis, g.axes, strict=True)]
    return struct.pack("=q7i4x", batch, head, *axis, *(step if name != "rpb" else axis))


def plan(call: Call, facts: DeviceFacts, options: Mapping[str, int]) -> Plan:
    """The plan of a call that `refusal` has passed."""
    problem = call.problem
    if problem.batch == 0:
        return Plan((), 0)
    g = configured(call, facts, options)
    kernel = KernelSpec("tiled_forward", g.defines, facts.arch)
    operands = tuple(
        Operand(OPERANDS["forward"].index(name), alignment(name)) for name in ("q", "k", "v", "rpb", "out", "lse")
    )
    sizes = struct.pack("=5i", *(axis.extent for axis in g.axes), problem.batch, g.splits)
    divisors = (problem.heads, problem.heads // problem.heads_kv, *g.regions)
    sizes += b"".join(_divisor(d) for d in divisors)
    params = Constant(sizes + b"".join(_layout(call, name, g) for name in _LAYOUTS))
    launch = Launch(kernel, (g.grid, 1, 1), (32 * g.warps, 1, 1), g.shared_bytes, (*operands, Scale("float32"), params))
    return Plan((launch,), 0)


def refusal(call: Call, facts: DeviceFacts) -> str | None:
    """Why the tiled kernel cannot run a call, or None."""
    p = call.problem
    if call.direction != "forward":
        return "there is no tiled backward."
    reason = refusal_of_elements(call, facts, "tiled", float32=True)
    if reason is not None:
        return reason
    if p.extra:
        return "additional keys are for the general kernel."
    reason = refusal_of_strides(call, 1 << 27, "the 32 bits of offsets inside a tile", first=1)
    if reason is not None:
        return reason
    g = _best(p, facts) if p.batch else None
    if p.batch and (g is None or g.grid >= 1 << 31):
        return _too_large(p)
    return None


def clocks(call: Call, facts: DeviceFacts) -> float:
    """By the cost model."""
    if call.problem.batch == 0:
        return 0.0
    return cost(configured(call, facts, {}), facts.shared_bytes_per_block, facts.multiprocessors)


CANDIDATE = Candidate(
    "tiled",
    (KernelInfo("tiled_forward", ("sm_80+",), max_registers=255, max_shared_bytes=0),),
    OPTIONS,
    refusal,
    plan,
    lambda: (*listed.small_windows("forward"), *listed.small_windows_float32("forward")),
    clocks=clocks,
)
