"""Plans are pure values: choices, refusals, packing, workspace. No GPU needed."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest

from natcore.planning import (
    CANDIDATES,
    Config,
    Constant,
    KernelInfo,
    Operand,
    Plan,
    Scale,
    Workspace,
    choose,
    facts_for_arch,
    plan_for,
)
from natcore.planning.listed import contiguous_call
from natcore.problem import OPERANDS, RESULTS, Call, Direction, Problem, Window

FACTS = facts_for_arch("sm_90a")
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")
GENERAL = Config("general")
PROBLEM = Problem(Window.of(2, (7, 5), 2), 2, (14, 15), 4, 2, 32, 48, 3, "float16", "float32")


def with_strides(call: Call, name: str, strides: tuple[int, ...] | None) -> Call:
    entries = list(call.strides)
    entries[OPERANDS[call.direction].index(name)] = strides
    return replace(call, strides=tuple(entries))


def defines(plan: Plan, kernel: str) -> dict[str, str]:
    (launch,) = [launch for launch in plan.launches if launch.kernel.name == kernel]
    return dict(launch.kernel.defines)


def vector(call: Call) -> int:
    return int(defines(plan_for(call, FACTS, GENERAL), "general_forward")["VECTOR"])


def test_a_plan_is_a_pure_function_of_its_arguments():
    call = contiguous_call("backward", PROBLEM)
    assert plan_for(call, FACTS) == plan_for(Call.from_json(call.to_json()), FACTS)
    assert hash(plan_for(call, FACTS)) == hash(plan_for(call, FACTS))


def test_what_changes_with_the_map_is_no_define():
    """Another batch, map, head count, window of the same row length, or scale: the same kernels."""
    base = plan_for(contiguous_call("backward", PROBLEM), FACTS, GENERAL)
    other = replace(PROBLEM, batch=1, spatial=(40, 50), heads=6, heads_kv=1, window=Window.of(2, (3, 7), 1, 2, True))
    plan = plan_for(contiguous_call("backward", other), FACTS, GENERAL)
    assert {launch.kernel for launch in plan.launches} == {launch.kernel for launch in base.launches}


def test_width_of_loads_follows_strides():
    call = contiguous_call("forward", PROBLEM)
    assert vector(call) == 8
    assert vector(with_strides(call, "k", (99 * 1024, 4 * 1024, 68, 32, 1))) == 4
    assert vector(with_strides(call, "out", (99 * 1024, 4 * 1024, 257, 48, 1))) == 1
    assert vector(with_strides(call, "v", (0, -4096, -96, 48, 1))) == 8  # broadcast and backwards
    assert vector(with_strides(call, "lse", (9999, 77, 3, 1))) == 8  # its elements are read one by one
    assert vector(contiguous_call("forward", replace(PROBLEM, head_dim_v=6))) == 2
    assert vector(contiguous_call("forward", replace(PROBLEM, dtype="float64"))) == 2
    one = replace(PROBLEM, batch=1)
    assert vector(with_strides(contiguous_call("forward", one), "q", (1, 14 * 512, 512, 32, 1))) == 8  # size-1 axis


def test_alignment_is_what_the_loads_need():
    plan = plan_for(contiguous_call("forward", PROBLEM), FACTS, GENERAL)
    alignment = {p.index: p.alignment for p in plan.launches[0].params if isinstance(p, Operand)}
    names = OPERANDS["forward"]
    assert {names[i]: a for i, a in alignment.items() if a > 1} == dict.fromkeys(
        ("q", "k", "v", "additional_keys", "additional_values", "out"), 16
    )
    narrow = plan_for(contiguous_call("forward", PROBLEM), FACTS, Config("general", (("vector", 1),)))
    assert all(p.alignment <= 2 for p in narrow.launches[0].params if isinstance(p, Operand))


def test_parameters_are_packed_as_the_header_says():
    """Missing axes lead, with extent and kernel 1; absent operands have zero strides."""
    problem = replace(PROBLEM, window=Window.of(1, 5, 2, 3, True), spatial=(20,), rpb_dtype=None, extra=0)
    call = with_strides(contiguous_call("forward", problem), "lse", None)
    (launch,) = plan_for(call, FACTS, GENERAL).launches
    *pointers, scale, constant = launch.params
    assert [p.index for p in pointers if isinstance(p, Operand)] == list(range(len(OPERANDS["forward"])))
    assert scale == Scale("float32") and isinstance(constant, Constant)
    sizes = struct.unpack_from("=20i", constant.data)
    assert sizes == (1, 1, 1, 1, 0, 1, 1, 1, 1, 0, 20, 5, 2, 3, 1, 2, 4, 2, 0, 0)
    assert struct.unpack_from("=iId", constant.data, 80) == (5, 0, 1.0)  # places, dropout
    layouts = [struct.unpack_from("=5q", constant.data, 96 + 40 * i) for i in range(8)]
    assert layouts[0] == (20 * 4 * 32, 0, 0, 4 * 32, 32)
    assert layouts[2] == (20 * 2 * 48, 0, 0, 2 * 48, 48)
    assert [layouts[i] for i in (3, 4, 5, 7)] == [(0,) * 5] * 4
    assert len(constant.data) == 96 + 8 * 40


def test_workspace_parts_do_not_overlap():
    plan = plan_for(contiguous_call("backward", PROBLEM), FACTS, GENERAL)
    offsets = sorted({p.offset for launch in plan.launches for p in launch.params if isinstance(p, Workspace)})
    assert len(offsets) == 4 and offsets[0] == 0 and all(offset % 256 == 0 for offset in offsets)
    assert offsets[1] >= 2 * 14 * 15 * 4 * 4  # delta
    assert plan.workspace_bytes > offsets[-1]
    assert plan_for(contiguous_call("forward", PROBLEM), FACTS, GENERAL).workspace_bytes == 0


def test_only_wanted_gradients_are_computed():
    call = contiguous_call("backward", PROBLEM)
    for name in RESULTS["backward"]:
        if name != "dq":
            call = with_strides(call, name, None)
    names = [launch.kernel.name for launch in plan_for(call, FACTS, GENERAL).launches]
    assert names == ["general_backward_query"]
    assert plan_for(with_strides(call, "dq", None), FACTS, GENERAL).launches == ()


def test_empty_batch_still_zeroes_sums():
    empty = replace(PROBLEM, batch=0)
    assert plan_for(contiguous_call("forward", empty), FACTS) == Plan((), 0)
    (launch,) = plan_for(contiguous_call("backward", empty), FACTS).launches
    assert launch.kernel.name == "general_sum_partials"


def test_workspace_stays_linear_in_the_input():
    """A big window, a big table: the partial sums never dwarf the operands."""
    window = Window.of(3, (18, 24, 24))
    problem = Problem(window, 1, (30, 48, 80), 24, 24, 128, 128, 0, "bfloat16", "float32")
    plan = plan_for(contiguous_call("backward", problem), FACTS, GENERAL)
    assert plan.workspace_bytes < 30 * 48 * 80 * 24 * 128 * 2


def test_huge_extents_go_on_the_first_grid_axis():
    problem = Problem(Window.of(1, 3), 1, (1 << 27,), 24, 24, 8, 8, 0, "float16", None)
    for direction in DIRECTIONS:
        for launch in plan_for(contiguous_call(direction, problem), FACTS, GENERAL).launches:
            assert launch.grid[0] < 1 << 31 and launch.grid[1:] == (1, 1)
            assert dict(launch.kernel.defines)["INDEX"] == "unsigned long long"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 264}, "head_dim 264.*at most 256"),
        ({"head_dim_v": 257}, "head_dim_v 257: at most 256"),
        ({"spatial": ((1 << 30) + 1, 15)}, "longer than 1073741824"),
    ],
)
def test_refusals_name_the_nearest_supported_case(change: dict, message: str):
    call = contiguous_call("forward", replace(PROBLEM, **change))
    with pytest.raises(NotImplementedError, match=message):
        plan_for(call, FACTS)
    with pytest.raises(NotImplementedError, match=f"'general' cannot run this call: .*{message}"):
        plan_for(call, FACTS, GENERAL)


def test_old_gpus_and_strided_rows_are_refused():
    call = contiguous_call("forward", PROBLEM)
    with pytest.raises(NotImplementedError, match=r"sm_70 is too old.*sm_75"):
        plan_for(call, replace(FACTS, arch="sm_70"))
    with pytest.raises(NotImplementedError, match="v has stride 2 on its last axis"):
        plan_for(with_strides(call, "v", (2880, 192, 96, 96, 2)), FACTS)


def test_bad_configs():
    call = contiguous_call("forward", PROBLEM)
    for config, message in (
        (Config("fast"), "'fast'; there are .*general"),
        (Config("general", (("speed", 11),)), "unknown options.*speed"),
        (Config("general", (("lanes", 3),)), "lanes 3"),
        (Config("general", (("vector", 16),)), "vector 16 must divide 8"),
        (Config("general", (("vector", 3),)), "vector 3 must divide 8"),
        (Config("general", (("threads", 256),)), "threads 256.*at most 128"),
        (Config("general", (("strip", 0),)), "strip 0"),
    ):
        with pytest.raises(ValueError, match=message):
            plan_for(call, FACTS, config)


def test_the_general_kernels_are_the_last_resort():
    assert CANDIDATES[-1].name == "general"
    for arch in ("sm_75", "sm_80", "sm_90a", "sm_100a", "sm_120"):
        call = contiguous_call("forward", replace(PROBLEM, dtype="float64", rpb_dtype="float64"))
        assert choose(call, facts_for_arch(arch)).name == "general"
    assert choose(contiguous_call("forward", PROBLEM), FACTS, GENERAL).name == "general"


def test_declared_architectures():
    both = KernelInfo("x", ("sm_80+", "sm_75"), 1, 1)
    assert [both.runs_on(a) for a in ("sm_70", "sm_75", "sm_80", "sm_90a", "sm_120")] == [False, True, True, True, True]
    exact = KernelInfo("x", ("sm_90a",), 1, 1)
    assert exact.runs_on("sm_90a") and not exact.runs_on("sm_100a") and not exact.runs_on("sm_90")
    with pytest.raises(ValueError, match="unknown architecture 'sm_42'"):
        facts_for_arch("sm_42")
