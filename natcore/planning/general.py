"""Plans for the general kernels (cuda_src/kernels/general_*.cu): every valid problem, no tensor cores.

The window, sizes and strides are kernel arguments; only dtypes, head dimensions, the width of loads
and the strip length are compiled in, so one cubin serves every window and every map.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod

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
    capability,
)
from natcore.problem import OPERANDS, Call, Problem
from natcore.views import ITEM_SIZES, contiguous_strides

MAX_HEAD_DIM = 256
MAX_EXTENT = 1 << 30  # positions on an axis are 32-bit in the kernels
THREADS = 128
LOAD_BYTES = 16  # the widest load
ROW_BYTES_PER_LANE = 64  # a row's share of a lane, as accumulators: bounds the registers

#: Operands whose rows the kernels load and store in chunks of `vector` elements.
_ROWS = ("q", "k", "v", "out", "d_out", "dq", "dk", "dv", "additional_keys", "additional_values")


@dataclass(frozen=True)
class _Build:
    """A call with the choices that are compiled into its kernels."""

    call: Call
    arch: str
    vector: int  # elements of one load
    lanes: int  # lanes that share a row
    strip: int  # neighbours loaded at once
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
            "STRIP": self.strip,
            "THREADS": self.threads,
            "INDEX": "unsigned long long" if wide else "unsigned",
        }
        if p.rpb_dtype is not None:
            defines["RPB"] = p.rpb_dtype
        return KernelSpec(name, tuple(sorted((n, str(v)) for n, v in defines.items())), self.arch)

    def operand(self, name: str) -> Operand:
        index = OPERANDS[self.call.direction].index(name)
        return Operand(index, self.vector * ITEM_SIZES[self.problem.dtype] if name in _ROWS else 1)

    def launch(self, name: str, grid: tuple[int, int, int], pointers: Sequence[Param | str], *rest: Param) -> Launch:
        params = tuple(self.operand(p) if isinstance(p, str) else p for p in pointers)
        return Launch(self.kernel(name), grid, (self.threads, 1, 1), 0, params + rest)

    def params(self, layouts: Sequence[str], slices: int = 0) -> Constant:
        """struct Params of a kernel: the sizes and then a Layout for each of these operands."""
        return Constant(_sizes(self.problem, slices) + b"".join(_layout(self.call, name) for name in layouts))


def _sizes(problem: Problem, slices: int) -> bytes:
    """struct Sizes of common/general.cuh: three axes, missing ones leading with extent and kernel 1."""
    w = problem.window
    axes = zip(problem.spatial, w.kernel_size, w.stride, w.dilation, w.is_causal, strict=True)
    padded = [(1, 1, 1, 1, False)] * (3 - w.rank) + list(axes)
    tail = (problem.batch, problem.heads, problem.heads_kv, problem.extra, slices)
    return struct.pack("=20i", *(int(x) for axis in padded for x in axis), *tail)


def _layout(call: Call, name: str) -> bytes:
    """struct Layout of one operand: strides of batch, three axes and head; of absent operands, zeros."""
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


def _vector(call: Call) -> int:
    """The widest load, in elements, that head dimensions and strides allow."""
    problem, shapes = call.problem, call.problem.shapes
    steps = [problem.head_dim, problem.head_dim_v]
    for name, strides in zip(call.operands, call.strides, strict=True):
        if strides is not None and name in _ROWS:
            steps += [s for s, n in zip(strides[:-1], shapes[name][:-1], strict=True) if n > 1]
    vector = LOAD_BYTES // ITEM_SIZES[problem.dtype]
    while any(step % vector for step in steps):
        vector //= 2
    return vector


def _build(call: Call, arch: str, options: Mapping[str, int]) -> _Build:
    """The choices for a call; each may be overridden by an option."""
    problem = call.problem
    vector = options.get("vector", _vector(call))
    if vector < 1 or _vector(call) % vector:
        raise ValueError(
            f"config: vector {vector} must divide {_vector(call)}, what strides and head dimensions allow."
        )
    widest = max(problem.head_dim, problem.head_dim_v)
    share = ROW_BYTES_PER_LANE // ITEM_SIZES[problem.lse_dtype]
    lanes = 1
    while lanes < 32 and ceil(widest / vector / lanes) * vector > share:
        lanes *= 2
    lanes = options.get("lanes", lanes)
    if lanes not in (1, 2, 4, 8, 16, 32):
        raise ValueError(f"config: lanes {lanes} must be a power of two up to 32.")
    threads = options.get("threads", THREADS)
    if threads < 1 or threads % lanes:
        raise ValueError(f"config: threads {threads} must be a multiple of lanes {lanes}.")
    strip = options.get("strip", _strip(problem))
    if not 1 <= strip <= 8:
        raise ValueError(f"config: strip {strip} must be from 1 to 8.")
    return _Build(call, arch, vector, lanes, strip, threads)


def _strip(problem: Problem) -> int:
    """Neighbours loaded at once: those that waste least at the end of a window's row, the longest first."""
    kernel, longest = problem.window.kernel_size[-1], 4 if ITEM_SIZES[problem.dtype] == 2 else 2
    return min(range(longest, 0, -1), key=lambda s: ceil(kernel / s) * s if s >= min(kernel, longest - 1) else 1 << 40)


def plan(call: Call, facts: DeviceFacts, options: Mapping[str, int]) -> Plan:
    """The plan of a call that `refusal` has passed."""
    build = _build(call, facts.arch, options)
    return _forward(build)


def _forward(build: _Build) -> Plan:
    problem = build.problem
    if problem.batch == 0:
        return Plan((), 0)
    operands = OPERANDS["forward"]
    layouts = ("q", "k", "v", "rpb", "additional_keys", "additional_values", "out", "lse")
    grid = build.blocks(build.items(problem.heads))
    scale = Scale(build.accumulator)
    return Plan((build.launch("general_forward", grid, operands, scale, build.params(layouts)),), 0)


def refusal(call: Call, facts: DeviceFacts) -> str | None:
    """Why the general kernels cannot run a call, or None."""
    problem = call.problem
    if capability(facts.arch) < 75:
        return f"{facts.arch} is too old; the general kernels run on sm_75 and later."
    if max(problem.head_dim, problem.head_dim_v) > MAX_HEAD_DIM:
        return f"head_dim {problem.head_dim}, head_dim_v {problem.head_dim_v}: at most {MAX_HEAD_DIM} are supported."
    if max(problem.spatial) > MAX_EXTENT:
        return f"the map {problem.spatial} has an axis longer than {MAX_EXTENT}."
    for name, strides in zip(call.operands, call.strides, strict=True):
        if strides is not None and name in _ROWS and strides[-1] != 1:
            return f"{name} has stride {strides[-1]} on its last axis; it must be contiguous."
    return None


_KERNELS = tuple(
    KernelInfo(name, ("sm_75+",), max_registers=168, max_shared_bytes=shared)
    for name, shared in {"general_forward": 0}.items()
)

CANDIDATE = Candidate(
    "general",
    _KERNELS,
    ("vector", "lanes", "strip", "threads"),
    refusal,
    plan,
    lambda: (),
)
