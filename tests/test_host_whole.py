"""The whole-map kernels' own sources, run on the host lane by lane (see tests/host), against the reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from natcore.planning import Config, DeviceFacts
from natcore.problem import Direction
from tests import host
from tests.cases import Case, check_same_bits
from tests.host.cases import Arrays, run_and_check
from tests.test_host_marching import FACTS, OLDER
from tests.test_whole_maps import BY_NAME, DIRECTIONS, OPTIONS, able

pytestmark = pytest.mark.skipif(host.COMPILER is None, reason="needs a C++ compiler")
STAGE = BY_NAME["stage"]
ONE = replace(FACTS, multiprocessors=1)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("host_whole")


def judge(
    direction: Direction,
    case: Case,
    dtype: str,
    folder: Path,
    options: dict[str, int] | None = None,
    facts: DeviceFacts = FACTS,
    **how,
) -> Arrays:
    """See `run_and_check`."""
    return run_and_check(direction, case, dtype, folder, Config("whole", tuple((options or {}).items())), facts, **how)


CASES = [(direction, name) for direction in DIRECTIONS for name, case in BY_NAME.items() if able(direction, case)]
# Launches other than the planner's.
OTHERS = [
    ("stage", "two stages"),
    ("stage", "three stages"),
    ("packed", "heads side by side"),
    ("full_groups", "one warp"),
]


@pytest.mark.parametrize(("direction", "name"), CASES)
def test_cases(direction: Direction, name: str, folder: Path) -> None:
    judge(direction, replace(BY_NAME[name], batch=min(BY_NAME[name].batch, 5)), "float16", folder)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("name", "options"), OTHERS)
def test_other_launches(name: str, options: str, direction: Direction, folder: Path) -> None:
    judge(direction, BY_NAME[name], "bfloat16", folder, OPTIONS[options])


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_rounds(direction: Direction, folder: Path) -> None:
    """Warps that take several maps, and some that have none left."""
    judge(direction, replace(STAGE, batch=21), "float16", folder, facts=ONE)


@pytest.mark.parametrize("absent", [("d_lse",), ("dk",), ("dv", "drpb"), ("dq", "drpb"), ("dq", "dk", "dv")])
def test_what_may_be_absent(absent: tuple[str, ...], folder: Path) -> None:
    results = judge("backward", STAGE, "float16", folder, absent=absent)
    assert set(results) == {"dq", "dk", "dv", "drpb"} - set(absent)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("order", [host.Order.EAGER, 2, 3])
def test_any_order(direction: Direction, order: int, folder: Path) -> None:
    """Whichever thread is first and whenever copies land, the results are the same to the bit."""
    first, again = judge(direction, STAGE, "float16", folder), judge(direction, STAGE, "float16", folder, order=order)
    check_same_bits(first, again)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_older_architecture(direction: Direction, folder: Path) -> None:
    judge(direction, STAGE, "bfloat16", folder, facts=OLDER)


# ---- that defects are noticed ----

# Direction and case, in which file, what becomes what, and how it shows in which order.
DEFECTS = {
    "nobody waits for a map": (
        ("forward", "stage"),
        "kernels/whole_forward.cu",
        "    mbarrier_wait(copies.barrier(team, slot, false), parity);",
        "",
        "not finite|error",
        host.Order.LATE,
    ),
    "nobody waits for values": (
        ("forward", "stage"),
        "kernels/whole_forward.cu",
        "mbarrier_wait(copies.barrier(team, slot, true), parity);",
        ";",
        "not finite|error",
        host.Order.LATE,
    ),
    "maps are overwritten too soon": (
        ("forward", "rounds"),
        "kernels/whole_forward.cu",
        "      team_sync(team);",
        "",
        "not finite|error",
        2,
    ),
    "the rest of a team's last tile is not cleared": (
        ("forward", "stage"),
        "common/whole_team.cuh",
        "make_uint4(0, 0, 0, 0)",
        "make_uint4(~0u, 0, 0, 0)",
        "not finite",
        host.Order.LATE,
    ),
    "the bias is read too soon": (
        ("forward", "stage"),
        "kernels/whole_forward.cu",
        "  mbarrier_wait(barriers + BIAS_AT, 0);",
        "",
        "not finite|error",
        2,
    ),
    "the rest of the last tile is not cleared": (
        ("backward", "stage"),
        "common/whole_map.cuh",
        "  if (TILE_ROWS == 8) return;",
        "  return;",
        "not finite",
        host.Order.LATE,
    ),
    "tokens that the map lacks are seen": (
        ("forward", "stage"),
        "common/whole_scores.cuh",
        "return exists[e] ? widen(its[i][e]) * factor : masked(factor);",
        "return widen(its[i][e]) * factor;",
        "error",
        host.Order.LATE,
    ),
    "delta with the wrong sign": (
        ("backward", "stage"),
        "kernels/whole_backward.cu",
        "delta[e] -= e == 0",
        "delta[e] += e == 0",
        "dq: error",
        host.Order.LATE,
    ),
    "one warp's sums are left out": (
        ("backward", "stage"),
        "kernels/whole_backward.cu",
        "for (int w = 0; w < AT_ONCE; ++w) sum",
        "for (int w = 1; w < AT_ONCE; ++w) sum",
        "drpb: error",
        host.Order.LATE,
    ),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_defects_are_noticed(defect: str, folder: Path, tmp_path: Path) -> None:
    (direction, name), file, text, replacement, error, order = DEFECTS[defect]
    sources = host.with_defect(tmp_path, file, text, replacement)
    with pytest.raises((host.BlockError, AssertionError), match=error):
        judge(direction, BY_NAME[name], "float16", folder, order=order, sources=sources)
