"""Plans for the tensor core backward of small windows (cuda_src/kernels/banded_backward.cu), 16-bit elements.

A `Geometry` says how the map is cut (see cuda_src/common/bands.cuh): groups of 8 tokens in bands of
rows, tiles of groups, regions of tiles; a block works through regions of one head. It is compiled in,
with the window and the head dimensions; extents, batch, heads and strides are arguments.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
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
    Workspace,
    capability,
)
from natcore.problem import OPERANDS, Call, Problem
from natcore.views import ITEM_SIZES

MAX_HEAD_DIM = 128
BIAS_WARPS = 16
_ROWS = ("d_out", "q", "k", "v", "out", "dq", "dk", "dv")
_LAYOUTS = ("d_out", "q", "k", "v", "out", "lse", "d_lse", "rpb", "dq", "dk", "dv")
_POINTERS = ("d_out", "q", "k", "v", "out", "lse", "d_lse", "rpb", "dq", "dk", "dv")
OPTIONS = ("band", "block_rows", "groups", "region0", "region1", "region2", "query_warps", "key_warps", "blocks_per_sm")


@dataclass(frozen=True)
class Axis:
    """One axis as the kernel sees it."""

    extent: int
    kernel: int
    stride: int
    dilation: int
    causal: bool

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """The distinct lengths of dilation groups, the longest first."""
        return tuple(sorted({ceil((self.extent - g) / self.dilation) for g in range(self.dilation)}, reverse=True))

    def keys(self, p: int, length: int) -> tuple[int, int]:
        """The interval of keys of query p of a dilation group (see cuda_src/common/window.cuh)."""
        block = p // self.stride * self.stride
        if self.causal:
            return max(min(block + self.stride, length) - self.kernel, 0), p + 1
        center = min(block + self.stride // 2, length - 1)
        start = min(max(center - self.kernel // 2, 0), length - self.kernel)
        return start, start + self.kernel

    @lru_cache(maxsize=64)  # noqa: B019 (axes are few and small)
    def intervals(self, length: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Of each query its keys, and of each key its queries."""
        keys = [self.keys(p, length) for p in range(length)]
        queries, first, end = [], 0, 0
        for n in range(length):
            while keys[first][1] <= n:
                first += 1
            while end < length and keys[end][0] <= n:
                end += 1
            queries.append((first, end))
        return keys, queries

    @lru_cache(maxsize=512)  # noqa: B019
    def spans(self, count: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """For runs of ``count`` tokens: the longest span of keys of queries, its greatest reach to the left of
        the run's first and to the right of it; and the same of queries of keys."""
        found = []
        for side in (0, 1):
            reach = []
            for length in self.lengths:
                intervals = self.intervals(length)[side]
                for first in range(0, length, count):
                    reach.append((first - intervals[first][0], intervals[min(first + count, length) - 1][1] - first))
            left, right = max(r[0] for r in reach), max(r[1] for r in reach)
            found.append((max(sum(r) for r in reach), left, right))
        return found[0], found[1]


def _up(value: int, multiple: int) -> int:
    return ceil(value / multiple) * multiple


@dataclass(frozen=True)
class Geometry:
    problem: Problem
    band: int  # rows of a group of 8 tokens
    block_rows: int  # of a block of 16 tokens
    groups: int  # of a tile
    region: tuple[int, int, int]  # tokens
    query_warps: int
    key_warps: int
    blocks_per_sm: int

    @cached_property
    def axes(self) -> tuple[Axis, Axis, Axis]:
        w = self.problem.window
        given = [
            Axis(*(int(x) for x in axis[:4]), bool(axis[4]))
            for axis in zip(self.problem.spatial, w.kernel_size, w.stride, w.dilation, w.is_causal, strict=True)
        ]
        none = Axis(1, 1, 1, 1, False)
        return {1: (none, *given, none), 2: (none, *given), 3: tuple(given)}[w.rank]  # type: ignore[return-value]

    @property
    def group_columns(self) -> int:
        return 8 // self.band

    @property
    def threads(self) -> int:
        return 32 * (self.query_warps + self.key_warps)

    @property
    def regions(self) -> tuple[int, ...]:
        return tuple(ceil(axis.lengths[0] / size) for axis, size in zip(self.axes, self.region, strict=True))

    @property
    def items(self) -> int:
        return self.problem.batch * prod(self.problem.window.dilation) * prod(self.regions)

    @cached_property
    def columns(self) -> dict[str, int]:
        """The columns around a group: QUERY_LEFT, QUERY_BLOCKS, KEY_LEFT, KEY_BLOCKS."""
        found = {}
        for side, (_, left, right) in zip(("QUERY", "KEY"), self.axes[2].spans(self.group_columns), strict=True):
            found |= {f"{side}_LEFT": left, f"{side}_BLOCKS": ceil((left + right) * self.block_rows / 16)}
        return found

    @cached_property
    def spans(self) -> dict[str, int]:
        """Planes and rows in shared memory: KEY_SPAN_0, ..."""
        return {
            f"{side}_SPAN_{a}": self.axes[a].spans(self.region[a])[i][0]
            for a in (0, 1)
            for i, side in enumerate(("KEY", "QUERY"))
        }

    @property
    def table_row(self) -> int:
        c, wide = self.columns, 16 // self.block_rows
        least = min(-(c["QUERY_LEFT"] + self.group_columns - 1), c["KEY_LEFT"] - (c["KEY_BLOCKS"] * wide - 1))
        greatest = max(c["QUERY_BLOCKS"] * wide - 1 - c["QUERY_LEFT"], self.group_columns - 1 + c["KEY_LEFT"])
        return (greatest - least + 4) // 8 * 8 + 4

    @property
    def entries(self) -> int:
        return prod(2 * axis.kernel - 1 for axis in self.axes)

    @property
    def shared_bytes(self) -> int:
        """SHARED_BYTES of bands.cuh."""
        p, c, s, wide = self.problem, self.columns, self.spans, 16 // self.block_rows
        tokens = [_up(d, 16) * 2 for d in (p.head_dim, p.head_dim_v)]
        apart = self.region[2] - self.group_columns
        key_columns = apart + c["QUERY_BLOCKS"] * wide
        query_columns = _up(apart + c["KEY_BLOCKS"] * wide, 2)
        key_rows, query_rows = (s[f"{side}_SPAN_0"] * s[f"{side}_SPAN_1"] for side in ("KEY", "QUERY"))
        spans = sum(
            rows * (columns * token // 16 | 1) * 16
            for rows, columns in ((key_rows, key_columns), (query_rows, query_columns))
            for token in tokens
        )
        table = _up(spans + query_rows * query_columns * 8 + query_columns * 4, 16)
        rows = (2 * self.axes[0].kernel - 1) * (2 * self.axes[1].kernel - 1) + 1
        stage = _up(table + self.axes[2].kernel * rows * self.table_row * 4, 16)
        sums = stage + self.threads // 32 * 8 * (max(tokens) // 16 | 1) * 16
        return sums + self.query_warps * self.entries * 4

    @property
    def defines(self) -> tuple[tuple[str, str], ...]:
        p = self.problem
        names = {"KERNEL": "kernel", "STRIDE": "stride", "DILATION": "dilation", "CAUSAL": "causal"}
        defines: dict[str, object] = {
            f"{name}_{a}": int(getattr(axis, field))
            for name, field in names.items()
            for a, axis in enumerate(self.axes)
        }
        defines |= {f"REGION_{a}": n for a, n in enumerate(self.region)} | self.columns | self.spans
        defines |= {"ELEMENT": p.dtype, "HEAD_DIM": p.head_dim, "HEAD_DIM_V": p.head_dim_v, "BAND": self.band}
        defines |= {"BLOCK_ROWS": self.block_rows, "GROUPS": self.groups, "THREADS": self.threads}
        defines |= {"QUERY_WARPS": self.query_warps, "BLOCKS_PER_SM": self.blocks_per_sm}
        if p.rpb_dtype is not None:
            defines["RPB"] = p.rpb_dtype
        return tuple(sorted((name, str(value)) for name, value in defines.items()))

    def slices(self, facts: DeviceFacts) -> int:
        """Blocks that share a head's regions: as many as are resident at once."""
        resident = facts.multiprocessors * self.blocks_per_sm
        return max(1, min(resident // self.problem.heads, self.items))


def choose_geometry(problem: Problem, facts: DeviceFacts, options: Mapping[str, int]) -> Geometry | None:
    """The geometry for a problem, with options in place of its own choices; None where nothing fits."""
    return _choose_geometry(problem, facts, tuple(sorted(options.items())))


@lru_cache(maxsize=4096)
def _choose_geometry(problem: Problem, facts: DeviceFacts, chosen: tuple[tuple[str, int], ...]) -> Geometry | None:
    options = dict(chosen)
    best: tuple[float, Geometry] | None = None
    for g in _geometries(problem, options):
        if g.shared_bytes <= facts.shared_bytes_per_block and (best is None or _cost(g, facts) < best[0]):
            best = (_cost(g, facts), g)
    return None if best is None else best[1]


def _geometries(problem: Problem, options: Mapping[str, int]) -> Iterator[Geometry]:
    rank = problem.window.rank
    rows = problem.window.kernel_size[0 if rank < 3 else 1]
    block_rows = options.get("block_rows", 8 if rows <= 7 and rank > 1 else 16)
    band = options.get("band", 8 if rank == 1 else 2 if rows in (6, 7, 15) else 4 if rows <= 5 or rows >= 10 else 8)
    groups = options.get("groups", 2 if max(problem.head_dim, problem.head_dim_v) <= 64 and rank > 1 else 1)
    tile = groups * 8 // band
    for rows in [options["region1"]] if "region1" in options else [band * n for n in range(1, 9)]:
        for columns in [options["region2"]] if "region2" in options else [tile * n for n in range(1, 5)]:
            g = Geometry(
                problem, band, block_rows, groups, (options.get("region0", 1), rows, columns),
                options.get("query_warps", 4), options.get("key_warps", 4), options.get("blocks_per_sm", 2),
            )  # fmt: skip
            yield g


def _cost(g: Geometry, facts: DeviceFacts) -> float:
    s, c = g.spans, g.columns
    tokens = s["QUERY_SPAN_0"] * s["QUERY_SPAN_1"] * (g.region[2] + c["KEY_BLOCKS"] * 16 // g.block_rows)
    resident = min(g.blocks_per_sm, (facts.shared_bytes_per_block + 1024) // (g.shared_bytes + 1024))
    tiles = prod(g.region) / (8 * g.groups)
    waves = ceil(tiles / g.query_warps) / (tiles / g.query_warps)
    covered = prod(n * size for n, size in zip(g.regions, g.region, strict=True))
    return covered * (1 + 0.2 * tokens / prod(g.region)) * waves / (0.5 + 0.25 * resident)


def _layout(call: Call, name: str, axes: tuple[Axis, Axis, Axis]) -> bytes:
    """struct Layout of one operand; of absent ones, zeros."""
    strides = call.strides[OPERANDS["backward"].index(name)]
    if strides is None:
        return bytes(40)
    if name == "rpb":
        batch, given, head = 0, strides[1:], strides[0]
    elif name in ("lse", "d_lse"):
        batch, given, head = strides[0], strides[1:-1], strides[-1]
    else:
        batch, given, head = strides[0], strides[1:-2], strides[-2]
    axis = {1: (0, *given, 0), 2: (0, *given), 3: given}[len(given)]
    step = [s * (1 if name == "rpb" else x.dilation) for s, x in zip(axis, axes, strict=True)]
    return struct.pack("=q7i4x", batch, head, *axis, *step)


def plan(call: Call, facts: DeviceFacts, options: Mapping[str, int]) -> Plan:
    """The plan of a call that `refusal` has passed."""
    g = choose_geometry(call.problem, facts, options)
    if g is None or g.shared_bytes > facts.shared_bytes_per_block:
        raise ValueError(f"config: {g} needs {g and g.shared_bytes} bytes of shared memory.")
    problem, slices = call.problem, g.slices(facts)
    index = OPERANDS["backward"].index
    operands = tuple(Operand(index(name), 16 if name in _ROWS else 1) for name in _POINTERS)
    extents = (axis.extent for axis in g.axes)
    sizes = struct.pack("=9i4x", *extents, *g.regions, problem.batch, problem.heads, slices)
    params = Constant(sizes + b"".join(_layout(call, name, g.axes) for name in _LAYOUTS))
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
    return Plan((main, _bias_launch(g, drpb, slices, facts.arch)), slices * problem.heads * g.entries * 4)


def _bias_launch(g: Geometry, strides: tuple[int, ...], slices: int, arch: str) -> Launch:
    """drpb from the partial tables."""
    defines = (("RESULT", str(g.problem.rpb_dtype)), ("WARPS", str(BIAS_WARPS)))
    given = strides[1:]
    axis = {1: (0, *given, 0), 2: (0, *given), 3: given}[len(given)]
    shape = (2 * x.kernel - 1 for x in g.axes)
    params = Constant(struct.pack("=4q5i4x", strides[0], *axis, g.problem.heads, *shape, slices))
    return Launch(
        KernelSpec("banded_backward_bias", defines, arch),
        (ceil(g.problem.heads * g.entries / 32), 1, 1),
        (32 * BIAS_WARPS, 1, 1),
        0,
        (Workspace(0), Operand(OPERANDS["backward"].index("drpb")), params),
    )


def refusal(call: Call, facts: DeviceFacts) -> str | None:
    """Why the banded kernel cannot run a call, or None."""
    p = call.problem
    if call.direction != "backward":
        return "there is no banded forward."
    if capability(facts.arch) < 80:
        return f"{facts.arch} is too old; the banded kernel runs on sm_80 and later."
    if ITEM_SIZES[p.dtype] != 2:
        return f"dtype {p.dtype}: the banded kernel takes float16 and bfloat16."
    if p.head_dim % 8 or p.head_dim_v % 8 or max(p.head_dim, p.head_dim_v) > MAX_HEAD_DIM:
        return f"head_dim {p.head_dim}, head_dim_v {p.head_dim_v}: multiples of 8 up to {MAX_HEAD_DIM} are supported."
    if p.extra or p.batch == 0 or p.heads != p.heads_kv:
        return "additional keys, empty batches and grouped heads are for the general kernels."
    for name, strides in zip(call.operands, call.strides, strict=True):
        if strides is None:
            continue
        shape = p.shapes[name]
        odd = [s for s, n in zip(strides[:-1], shape[:-1], strict=True) if n > 1 and s % 8]
        if name in _ROWS and (strides[-1] != 1 or odd):
            return f"{name} has strides {strides}: all but the last must be multiples of 8, and that 1."
        if max(abs(s) * max(p.window.dilation) for s in strides[1:]) >= 1 << 31:
            return f"{name} has strides {strides}, beyond 32 bits."
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
    lambda: (),
)
