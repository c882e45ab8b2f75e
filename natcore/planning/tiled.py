"""Plans for the tensor core kernel of small windows (cuda_src/kernels/tiled_forward.cu), 16-bit elements.

A `Geometry` says how the map is cut: 16 queries make a tile, some tiles a region (one block), and the
union of their windows is gathered in shared memory. All of it is compiled in, with the window and the
head dimensions; extents, batch, heads and strides are arguments. planning/tiling_cost.py chooses it.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from natcore.planning import listed
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
    capability,
)
from natcore.planning.tiling import TILE_QUERIES, Geometry
from natcore.planning.tiling_cost import MAX_BLOCKS, TILES, choose_geometry, is_legal
from natcore.problem import OPERANDS, Call, Problem
from natcore.views import ITEM_SIZES

MAX_HEAD_DIM = 128
_ROWS = ("q", "k", "v", "out")
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
    strides = call.strides[OPERANDS["forward"].index(name)]
    if strides is None:
        return bytes(40)
    if name == "rpb":
        batch, axes, head = 0, strides[1:], strides[0]
    elif name == "lse":
        batch, axes, head = strides[0], strides[1:-1], strides[-1]
    else:
        batch, axes, head = strides[0], strides[1:-2], strides[-2]
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
        Operand(OPERANDS["forward"].index(name), 16 if name in _ROWS else 1)
        for name in ("q", "k", "v", "rpb", "out", "lse")
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
    if capability(facts.arch) < 80:
        return f"{facts.arch} is too old; the tiled kernel runs on sm_80 and later."
    if ITEM_SIZES[p.dtype] != 2:
        return f"dtype {p.dtype}: the tiled kernel takes float16 and bfloat16."
    if p.head_dim % 8 or p.head_dim_v % 8 or max(p.head_dim, p.head_dim_v) > MAX_HEAD_DIM:
        return f"head_dim {p.head_dim}, head_dim_v {p.head_dim_v}: multiples of 8 up to {MAX_HEAD_DIM} are supported."
    if p.extra:
        return "additional keys are for the general kernel."
    for name, strides in zip(call.operands, call.strides, strict=True):
        if strides is None:
            continue
        shape = p.shapes[name]
        if name in _ROWS and (
            strides[-1] != 1 or any(s % 8 for s, n in zip(strides[:-1], shape[:-1], strict=True) if n > 1)
        ):
            return f"{name} has strides {strides}: all but the last must be multiples of 8, and that 1."
        if max(abs(s) * max(p.window.dilation) for s in strides[1:]) >= 1 << 27:
            return f"{name} has strides {strides}, beyond the 32 bits of offsets inside a tile."
    g = _best(p, facts) if p.batch else None
    if p.batch and (g is None or g.grid >= 1 << 31):
        return _too_large(p)
    return None


CANDIDATE = Candidate(
    "tiled",
    (KernelInfo("tiled_forward", ("sm_80+",), max_registers=255, max_shared_bytes=0),),
    OPTIONS,
    refusal,
    plan,
    partial(listed.small_windows, "forward"),
)
