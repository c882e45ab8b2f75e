"""What plans for the general kernels are made of: the choices compiled in, parameters, parts of the workspace.

The window, sizes and strides are kernel arguments; only dtypes, head dimensions, the width of loads
and the strip length are compiled in, so one cubin serves every window and every map.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod

from natcore.planning.plan import Constant, KernelSpec, Launch, Operand, Param, Workspace
from natcore.problem import OPERANDS, Call, Problem, dropout_threshold
from natcore.views import ITEM_SIZES, contiguous_strides

THREADS = 128
LOAD_BYTES = 16  # the widest load
#: Of a row, with one lane, but at least 8 elements: bounds the registers. The fastest of 8 to 64 on an H200.
ROW_BYTES_PER_LANE = 32
#: Entries along the last axis of the bias table that one block sums.
SPAN = 32
#: Of sums over queries, which are cut into slices. The same on every GPU, so that sums are too.
TARGET_BLOCKS = 1 << 14
MIN_QUERIES_PER_GROUP = 8  # of a slice

#: Operands whose rows the kernels load and store in chunks of `vector` elements.
ROWS = ("q", "k", "v", "out", "d_out", "dq", "dk", "dv", "additional_keys", "additional_values")

#: Kernels that walk a window in strips: the longest strip. Longer ones hide more latency and take more registers;
#: these were the fastest on an H200 of those that spill nowhere.
_WALKS = {
    "general_forward": {"float64": 2, "float32": 1, "float16": 4, "bfloat16": 4},
    "general_backward_query": {"float64": 1, "float32": 4, "float16": 2, "bfloat16": 1},
    "general_backward_key": {"float64": 1, "float32": 2, "float16": 1, "bfloat16": 1},
}


@dataclass(frozen=True)
class Build:
    """A call with the choices that are compiled into its kernels."""

    call: Call
    arch: str
    vector: int  # elements of one load
    lanes: int  # lanes that share a row
    strip: int | None  # neighbours loaded at once; None = each kernel's own choice
    threads: int

    @property
    def problem(self) -> Problem:
        return self.call.problem

    @property
    def groups(self) -> int:
        return self.threads // self.lanes

    @property
    def accumulator(self) -> str:
        return self.problem.lse_dtype

    def blocks(self, items: int) -> tuple[int, int, int]:
        return (ceil(items / self.groups), 1, 1)

    def items(self, heads: int) -> int:
        return self.problem.batch * prod(self.problem.spatial) * heads

    def kernel(self, name: str) -> KernelSpec:
        p = self.problem
        wide = self.items(p.heads) >= 1 << 31
        defines = {
            "ELEMENT": p.dtype,
            "HEAD_DIM": p.head_dim,
            "HEAD_DIM_V": p.head_dim_v,
            "VECTOR": self.vector,
            "LANES": self.lanes,
            "THREADS": self.threads,
            "INDEX": "unsigned long long" if wide else "unsigned",
        }
        if name in _WALKS:
            longest = _WALKS[name][p.dtype]
            if p.dropout_p > 0 and name == "general_backward_key":
                longest = 1  # the random words take registers
            defines["STRIP"] = self.strip or _strip(p, longest)
        if name in ("general_backward_bias", "general_qk_bias"):
            defines["SPAN"] = SPAN
        if p.rpb_dtype is not None and name in (*_WALKS, "general_backward_bias", "general_qk"):
            defines["RPB"] = p.rpb_dtype
        if p.dropout_p > 0:
            defines["DROPOUT"] = 1
        return KernelSpec(name, tuple(sorted((n, str(v)) for n, v in defines.items())), self.arch)

    def operand(self, name: str) -> Operand:
        index = OPERANDS[self.call.direction].index(name)
        return Operand(index, self.vector * ITEM_SIZES[self.problem.dtype] if name in ROWS else 1)

    def launch(self, name: str, grid: tuple[int, int, int], pointers: Sequence[Param | str], *rest: Param) -> Launch:
        params = tuple(self.operand(p) if isinstance(p, str) else p for p in pointers)
        return Launch(self.kernel(name), grid, (self.threads, 1, 1), 0, params + rest)

    def params(self, layouts: Sequence[str | None], slices: int = 0) -> Constant:
        """struct Params of a kernel: the sizes and then a Layout for each of these operands."""
        return Constant(_sizes(self.problem, slices) + b"".join(_layout(self.call, name) for name in layouts))


def _sizes(problem: Problem, slices: int) -> bytes:
    """struct Sizes of common/general.cuh: three axes, missing ones leading with extent and kernel 1; dropout."""
    w = problem.window
    axes = zip(problem.spatial, w.kernel_size, w.stride, w.dilation, w.is_causal, strict=True)
    padded = [(1, 1, 1, 1, False)] * (3 - w.rank) + list(axes)
    tail = (problem.batch, problem.heads, problem.heads_kv, problem.extra, slices)
    dropout = problem.places, dropout_threshold(problem.dropout_p), 1 / (1 - problem.dropout_p)
    return struct.pack("=20iiId", *(int(x) for axis in padded for x in axis), *tail, *dropout)


def _layout(call: Call, name: str | None) -> bytes:
    """struct Layout of one operand: strides of batch, three axes and head; of absent operands, zeros."""
    if name is None:
        return bytes(40)
    if name == "delta":  # in the workspace, contiguous
        strides = contiguous_strides(call.problem.shapes["lse"])
    else:
        strides = call.strides[OPERANDS[call.direction].index(name)]
    if strides is None:
        return bytes(40)
    if name == "rpb":
        batch, axes, head = 0, strides[1:], strides[0]
    elif name in ("lse", "d_lse", "delta"):
        batch, axes, head = strides[0], strides[1:-1], strides[-1]
    else:
        batch, axes, head = strides[0], strides[1:-2], strides[-2]
    return struct.pack("=5q", batch, *([0] * (3 - len(axes))), *axes, head)


def vector_of(call: Call) -> int:
    """The widest load, in elements, that head dimensions and strides allow."""
    problem, shapes = call.problem, call.problem.shapes
    steps = [problem.head_dim, problem.head_dim_v]
    for name, strides in zip(call.operands, call.strides, strict=True):
        if strides is not None and name in ROWS:
            steps += [s for s, n in zip(strides[:-1], shapes[name][:-1], strict=True) if n > 1]
    vector = LOAD_BYTES // ITEM_SIZES[problem.dtype]
    while any(step % vector for step in steps):
        vector //= 2
    return vector


def build_for(call: Call, arch: str, options: Mapping[str, int]) -> Build:
    """The choices for a call; each may be overridden by an option."""
    problem = call.problem
    vector = options.get("vector", vector_of(call))
    if vector < 1 or vector_of(call) % vector:
        raise ValueError(
            f"config: vector {vector} must divide {vector_of(call)}, what strides and head dimensions allow."
        )
    widest = max(problem.head_dim, problem.head_dim_v)
    lanes, share = 1, max(ROW_BYTES_PER_LANE // ITEM_SIZES[problem.dtype], 8)
    if problem.dropout_p > 0:
        share //= 2  # the random words take registers
    while lanes < 32 and ceil(widest / vector / lanes) * vector > share:
        lanes *= 2
    lanes = options.get("lanes", lanes)
    if lanes not in (1, 2, 4, 8, 16, 32):
        raise ValueError(f"config: lanes {lanes} must be a power of two up to 32.")
    threads = options.get("threads", THREADS)
    if not 1 <= threads <= THREADS or threads % lanes:
        raise ValueError(f"config: threads {threads} must be a multiple of lanes {lanes} and at most {THREADS}.")
    strip = options.get("strip")
    if strip is not None and not 1 <= strip <= 8:
        raise ValueError(f"config: strip {strip} must be from 1 to 8.")
    return Build(call, arch, vector, lanes, strip, threads)


def _strip(problem: Problem, longest: int) -> int:
    """Neighbours loaded at once: the fewest loads past the end of the window's row, then the longest strip."""
    kernel = problem.window.kernel_size[-1]
    if kernel <= longest:
        return kernel
    shorter = max(longest - 1, 1) if longest > 2 else longest
    return min((longest, shorter), key=lambda strip: (ceil(kernel / strip) * strip, -strip))


class Space:
    """Hands out parts of the workspace."""

    def __init__(self) -> None:
        self.bytes = 0

    def take(self, count: int, dtype: str) -> Workspace:
        start = self.bytes
        self.bytes += ceil(count * ITEM_SIZES[dtype] / 256) * 256
        return Workspace(start)


def slices_of(build: Build, queries: int, sums: int) -> int:
    """Into how many parts a sum over queries is cut, where there are ``sums`` such sums."""
    return max(1, min(TARGET_BLOCKS // sums, queries // (build.groups * MIN_QUERIES_PER_GROUP)))


def sum_partials(build: Build, name: str, partials: Workspace, slices: int) -> tuple[Launch, ...]:
    """The second pass: one result of up to four axes, from partials [slices, *shape]."""
    call, shape = build.call, build.problem.shapes[name]
    strides = call.strides[call.operands.index(name)]
    assert strides is not None
    lead = 4 - len(shape)
    params = struct.pack("=4q5i4x", *([0] * lead), *strides, *([1] * lead), *shape, slices)
    defines = {"PARTIAL": build.accumulator, "RESULT": build.problem.dtype_of(name), "THREADS": str(build.threads)}
    spec = KernelSpec("general_sum_partials", tuple(sorted(defines.items())), build.arch)
    grid = (ceil(prod(shape) / build.threads), 1, 1)
    return (Launch(spec, grid, (build.threads, 1, 1), 0, (partials, build.operand(name), Constant(params))),)
