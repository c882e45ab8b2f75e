"""Plans for the tensor core kernel of small windows (cuda_src/kernels/tiled_forward.cu), 16-bit elements.

A `Geometry` says how the map is cut: 16 queries make a tile, some tiles a region (one block), and the
union of their windows is gathered in shared memory. All of it is compiled in, with the window and the
head dimensions; extents, batch, heads and strides are arguments.

Cost model. Clock cycles of one multiprocessor:

    tile      TILE + BLOCK * (n8 blocks of scores) * (head_dim + head_dim_v) / 64
    region    REGION + SLOT * (slots of the span) * (head_dim + head_dim_v) / 64

summed over all tiles and regions (also those that lie partly outside the map), divided by an occupancy
factor min(1, warps per multiprocessor / WARPS). The constants are fitted to measured times.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import permutations, product
from math import ceil, prod

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
from natcore.problem import OPERANDS, Call, Problem
from natcore.views import ITEM_SIZES

MAX_HEAD_DIM = 128
MAX_BLOCKS = 64  # n8 blocks of scores of one tile: all are unrolled
WORD = 32  # keys of a mask word
CHUNK_BLOCKS = 16  # the most n8 blocks of scores held in registers at once
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


# ---- choosing a geometry ----

_TILES = tuple(t for t in product((1, 2, 4, 8, 16), repeat=3) if prod(t) == TILE_QUERIES)


def _chunk(blocks: int) -> int:
    """Blocks of scores held at once: all, or equal shares of whole mask words."""
    if blocks <= CHUNK_BLOCKS:
        return blocks
    return ceil(blocks / ceil(blocks / CHUNK_BLOCKS) / 4) * 4


def _warps(tiles: int) -> int:
    """Warps of a block: a tile each, or as few tiles each as leave none idle."""
    rounds = ceil(tiles / 8)
    return ceil(tiles / rounds)


def _orders(rank: int) -> Iterator[tuple[int, ...]]:
    for order in permutations(range(rank)):
        yield (-1,) * (3 - rank) + order


def _geometry(problem: Problem, order: tuple[int, ...], tile: tuple[int, ...], region: tuple[int, ...]) -> Geometry:
    g = Geometry(problem, order, tile, region, _warps(prod(region)), 1, 1, 1, 1)  # type: ignore[arg-type]
    chunk = _chunk(g.blocks)
    registers = 60 + 4 * chunk + g.problem.head_dim // 4 + g.problem.head_dim_v // 2
    return Geometry(problem, order, tile, region, g.warps, max(1, 65536 // (32 * g.warps * registers)), chunk, 1, 1)  # type: ignore[arg-type]


def _cost(g: Geometry, shared_bytes: int) -> float:
    """Cycles of a multiprocessor, by the cost model at the top of this file, per query of the map."""
    p = g.problem
    width = (p.head_dim + p.head_dim_v) / 64
    tiles = prod(ceil(axis.lengths[0] / tile) for axis, tile in zip(g.axes, g.tile, strict=True))
    resident = min(g.blocks_per_sm, shared_bytes // (g.shared_bytes + 1024))
    if resident < 1:
        return float("inf")
    occupancy = min(1.0, resident * g.warps / 12) * min(1.0, 0.6 + 0.2 * resident)
    return (tiles * (40 + 14 * g.blocks * width) + prod(g.regions) * (400 + 3.0 * g.slots * width)) / occupancy


@lru_cache(maxsize=4096)
def choose_geometry(problem: Problem, shared_bytes: int) -> Geometry | None:
    """The cheapest geometry that fits, or None."""
    shapes = []
    for order in _orders(problem.window.rank):
        for tile in _TILES:
            if all(a >= 0 or n == 1 for a, n in zip(order, tile, strict=True)):
                g = _geometry(problem, order, tile, (1, 1, 1))
                if _is_legal(g):
                    tiles = prod(ceil(axis.lengths[0] / n) for axis, n in zip(g.axes, g.tile, strict=True))
                    shapes.append((tiles * (40 + 14 * g.blocks), order, tile, g))
    best: tuple[float, Geometry] | None = None
    for _, order, tile, unit in sorted(shapes, key=lambda s: s[:3])[:3]:
        counts = [ceil(axis.lengths[0] / n) for axis, n in zip(unit.axes, tile, strict=True)]
        for region in product(
            *(sorted({ceil(n / parts) for parts in range(1, n + 1) if ceil(n / parts) <= 16}) for n in counts)
        ):
            if prod(region) > 64:
                continue
            g = _geometry(problem, order, tile, region)
            if g.shared_bytes <= shared_bytes and (best is None or _cost(g, shared_bytes) < best[0]):
                best = (_cost(g, shared_bytes), g)
    return None if best is None else best[1]


def _is_legal(g: Geometry) -> bool:
    """What common/tiles.cuh asserts."""
    rows = g.halo[2] <= WORD or g.halo[0] == g.halo[1] == 1
    return rows and max(g.halo[:2]) <= WORD and g.blocks <= MAX_BLOCKS


def _configured(call: Call, facts: DeviceFacts, options: Mapping[str, int]) -> Geometry:
    """The geometry that is best or, with options, the one that they spell out."""
    g = choose_geometry(call.problem, _shared_limit(facts))
    assert g is not None  # refusal() has looked
    if not options:
        return g
    axes = options.get("axes", int("".join(str(a) for a in g.order if a >= 0)))
    order = (-1,) * (3 - call.problem.window.rank) + tuple(int(x) for x in f"{axes:0{call.problem.window.rank}d}")
    tile = tuple(options.get(f"tile{a}", g.tile[a]) for a in range(3))
    region = tuple(options.get(f"region{a}", g.region[a]) for a in range(3))
    if tile not in _TILES or min(region) < 1 or sorted(order) != sorted(g.order):
        raise ValueError(f"config: axes {axes}, tile {tile} and region {region}: a tile is {TILE_QUERIES} queries.")
    unit = _geometry(call.problem, order, tile, region)
    chosen = Geometry(
        call.problem,
        order,
        tile,  # type: ignore[arg-type]
        region,  # type: ignore[arg-type]
        options.get("warps", unit.warps),
        options.get("blocks_per_sm", unit.blocks_per_sm),
        options.get("chunk", unit.chunk),
        options.get("stages", 1),
        options.get("rounds", 1),
    )
    if not _is_legal(chosen) or chosen.shared_bytes > _shared_limit(facts):
        raise ValueError(
            f"config: {chosen} needs {chosen.shared_bytes} bytes of shared memory and {chosen.blocks} blocks."
        )
    return chosen


def _shared_limit(facts: DeviceFacts) -> int:
    return facts.shared_bytes_per_block


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
    g = _configured(call, facts, options)
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
    g = choose_geometry(p, _shared_limit(facts)) if p.batch else None
    if p.batch and (g is None or g.grid >= 1 << 31):
        return f"kernel_size {p.window.kernel_size}: the halo of 16 queries is too large."
    return None


CANDIDATE = Candidate(
    "tiled",
    (KernelInfo("tiled_forward", ("sm_80+",), max_registers=255, max_shared_bytes=0),),
    OPTIONS,
    refusal,
    plan,
    lambda: (),
)
