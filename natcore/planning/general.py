"""Plans for the general kernels (cuda_src/kernels/general_*.cu): every valid problem, no tensor cores.

Attention, forward and backward; unfused attention is in `natcore.planning.unfused`, and what all of
them are made of in `natcore.planning.build`.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil, prod

from natcore.planning import listed, unfused
from natcore.planning.build import ROWS, SPAN, Build, Space, build_for, slices_of, sum_partials
from natcore.planning.plan import Candidate, DeviceFacts, KernelInfo, Launch, Plan, Scale, Workspace, capability
from natcore.problem import OPERANDS, RESULTS, Call

MAX_HEAD_DIM = 256
MAX_EXTENT = 1 << 30  # positions on an axis are 32-bit in the kernels


def plan(call: Call, facts: DeviceFacts, options: Mapping[str, int]) -> Plan:
    """The plan of a call that `refusal` has passed."""
    build = build_for(call, facts.arch, options)
    if call.direction in unfused.PLANS:
        return unfused.PLANS[call.direction](build)
    return _forward(build) if call.direction == "forward" else _backward(build)


def _forward(build: Build) -> Plan:
    problem = build.problem
    if problem.batch == 0:
        return Plan((), 0)
    layouts = ("q", "k", "v", "rpb", "additional_keys", "additional_values", "out", "lse")
    grid = build.blocks(build.items(problem.heads))
    scale = Scale(build.accumulator)
    return Plan((build.launch("general_forward", grid, OPERANDS["forward"], scale, build.params(layouts)),), 0)


def _backward(build: Build) -> Plan:
    """delta with dq, then each other gradient that is wanted; sums over many queries in two passes."""
    problem, call = build.problem, build.call
    wanted = {n for n, s in zip(call.operands, call.strides, strict=True) if s is not None and n in RESULTS["backward"]}
    if problem.batch == 0:
        return Plan(sum_partials(build, "drpb", Workspace(0), 0) if "drpb" in wanted else (), 0)
    if not wanted:
        return Plan((), 0)
    space = Space()
    delta = space.take(build.items(problem.heads), build.accumulator)
    scale = Scale(build.accumulator)
    query_blocks, key_blocks = (build.blocks(build.items(heads)) for heads in (problem.heads, problem.heads_kv))
    common = ("d_out", "q", "k", "v", "lse")
    optional = ("d_lse", "rpb", "additional_keys", "additional_values")
    params = build.params((*common, *optional, "delta", "dq"))
    pointers = (*common, *optional, "dropout_seed", delta, "dq")
    launches = [build.launch("general_backward_query", query_blocks, pointers, scale, params)]
    if wanted & {"dk", "dv"}:
        params = build.params((*common, "delta", "rpb", "dk", "dv"))
        pointers = (*common, delta, "rpb", "dropout_seed", "dk", "dv")
        launches.append(build.launch("general_backward_key", key_blocks, pointers, scale, params))
    if "drpb" in wanted:
        launches += _bias_launches(build, space, delta)
    if wanted & {"d_additional_keys", "d_additional_values"}:
        launches += _additional_launches(build, space, delta, wanted)
    return Plan(tuple(launches), space.bytes)


def _bias_launches(build: Build, space: Space, delta: Workspace) -> tuple[Launch, ...]:
    problem = build.problem
    *rows, row_length = problem.shapes["rpb"]
    blocks = prod(rows) * ceil(row_length / SPAN)
    slices = slices_of(build, build.items(1), blocks)
    partials = space.take(slices * prod(problem.shapes["rpb"]), build.accumulator)
    first = build.launch(
        "general_backward_bias",
        (blocks * slices, 1, 1),
        ("d_out", "q", "k", "v", "lse", delta, "rpb", "dropout_seed", partials),
        Scale(build.accumulator),
        build.params(("d_out", "q", "k", "v", "lse", "delta", "rpb"), slices),
    )
    return (first, *sum_partials(build, "drpb", partials, slices))


def _additional_launches(build: Build, space: Space, delta: Workspace, wanted: set[str]) -> tuple[Launch, ...]:
    problem = build.problem
    sums = problem.batch * problem.extra * problem.heads_kv
    queries = prod(problem.spatial) * problem.heads // problem.heads_kv
    slices = slices_of(build, queries, sums)
    partials = {
        name: space.take(slices * prod(problem.shapes[name]), build.accumulator)
        for name in ("d_additional_keys", "d_additional_values")
    }
    first = build.launch(
        "general_backward_additional",
        (sums * slices, 1, 1),
        ("d_out", "q", "lse", delta, "additional_keys", "additional_values", "dropout_seed", *partials.values()),
        Scale(build.accumulator),
        build.params(("d_out", "q", "lse", "delta", "additional_keys", "additional_values"), slices),
    )
    sums_of = [sum_partials(build, name, start, slices) for name, start in partials.items() if name in wanted]
    return (first, *(launch for launches in sums_of for launch in launches))


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
        if problem.batch and strides is not None and name in ROWS and strides[-1] != 1:
            return f"{name} has stride {strides[-1]} on its last axis; it must be contiguous."
    return None


_KERNELS = tuple(
    KernelInfo(name, ("sm_75+",), max_registers, max_shared_bytes)
    for name, max_registers, max_shared_bytes in (
        ("general_forward", 255, 0),
        ("general_backward_query", 255, 0),
        ("general_backward_key", 255, 0),
        ("general_backward_bias", 255, 32 << 10),
        ("general_backward_additional", 168, 8 << 10),
        ("general_sum_partials", 40, 0),
        ("general_qk", 255, 0),
        ("general_av", 255, 0),
        ("general_av_key", 255, 0),
        ("general_av_additional", 168, 8 << 10),
        ("general_qk_bias", 64, 32 << 10),
    )
)

CANDIDATE = Candidate(
    "general",
    _KERNELS,
    ("vector", "lanes", "strip", "threads"),
    refusal,
    plan,
    listed.general,
    directions=("forward", "backward", *unfused.PLANS),
    dropout=True,
)
