"""The tiled backward's own sources, run on the host lane by lane (see tests/host), against the reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from natcore.planning import Config, DeviceFacts, plan_for, refusal, tiled_backward
from natcore.planning.listed import contiguous_call
from natcore.problem import OPERANDS, call_of, problem_of
from tests import host
from tests.cases import CASES, Case, check
from tests.test_fast_backward import fitting, problem_for
from tests.test_general_kernels import view
from tests.test_host_backward import Arrays, execute, prepared
from tests.test_host_marching import FACTS

pytestmark = pytest.mark.skipif(host.COMPILER is None, reason="needs a C++ compiler")
PLAIN = {"head_dim": 16, "head_dim_v": 16}
OWN = [
    Case("map", (13, 22), 5, heads=2, heads_kv=2, batch=2, rpb="float32", **PLAIN),
    Case("line", (90,), 13, rpb="float32", batch=2, **PLAIN),
    Case("video", (4, 9, 10), (3, 3, 5), rpb="float32", head_dim=24, head_dim_v=8),
    Case("grouped", (9, 11), (3, 5), heads=6, heads_kv=2, rpb="same", **PLAIN),
    Case("large", (18, 19), 15, batch=2, rpb="float32", **PLAIN),
    Case("strides", (13, 21), (5, 6), stride=(2, 3), rpb="float32", **PLAIN),
    Case("ragged_video", (5, 7, 13), (3, 4, 5), dilation=(1, 1, 2), stride=(2, 1, 2), rpb="same", **PLAIN),
    Case("causal_line", (50,), 9, stride=2, is_causal=True, dilation=2, rpb="float32", **PLAIN),
]
#: Few multiprocessors, so that a block has many regions.
FEW = replace(FACTS, multiprocessors=1)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("host_tiled_backward")


def able(case: Case) -> bool:
    return refusal(tiled_backward.CANDIDATE, contiguous_call("backward", problem_for(case, "float16")), FACTS) is None


def judge(
    case: Case,
    dtype: str,
    folder: Path,
    options: dict[str, int] | None = None,
    facts: DeviceFacts = FEW,
    absent: tuple[str, ...] = (),
    **how,
) -> Arrays:
    """Runs a case, checks it and returns its results; ``how`` is for `run_blocks`."""
    arrays, results = prepared(case, dtype, absent)
    present = {n: x for n, x in (arrays | results).items() if n not in absent}
    views = {n: view(present[n]) for n in OPERANDS["backward"] if n in present}
    call = call_of("backward", problem_of(case.window, views), views)
    plan = plan_for(call, facts, Config("tiled_backward", tuple((options or {}).items())))
    execute(case, plan, arrays | results, folder, absent, **how)
    check(case, dtype, arrays, results, saved_out=True)
    return results


@pytest.mark.parametrize("case", [*OWN, *(fitting(c) for c in CASES if able(fitting(c)))], ids=lambda case: case.name)
def test_cases(case: Case, folder: Path) -> None:
    judge(case, "float16", folder)
