"""The harness of tests/sanitize.py without a GPU: a driver made of host memory, and logs as the tools write them."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from natcore.backends import prepare
from natcore.planning import facts_for_arch
from natcore.views import Device
from tests import sanitize

FACTS = facts_for_arch("sm_90a")


class HostDriver:
    """The few calls that the harness makes, on host memory."""

    def __init__(self) -> None:
        self.held: dict[int, np.ndarray] = {}

    def cuMemAlloc(self, size: int) -> tuple:
        memory = np.full(size, 0xFF, np.uint8)
        self.held[memory.ctypes.data] = memory
        return 0, memory.ctypes.data

    def cuMemFree(self, address: int) -> tuple:
        del self.held[address]
        return (0,)

    def cuMemsetD8(self, address: int, byte: int, size: int) -> tuple:
        ctypes.memset(address, byte, size)
        return (0,)

    def cuMemcpyHtoD(self, target: int, source: int, size: int) -> tuple:
        ctypes.memmove(target, source, size)
        return (0,)

    cuMemcpyDtoH = cuMemcpyHtoD

    def cuCtxSynchronize(self) -> tuple:
        return (0,)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> HostDriver:
    driver = HostDriver()
    monkeypatch.setattr(sanitize, "driver", lambda: driver)
    monkeypatch.setattr(sanitize, "checked", lambda result, what: result[1] if len(result) > 1 else None)
    monkeypatch.setattr(sanitize, "prepare", lambda call, device, config: prepare(call, Device("cpu", 0)))
    return driver


@pytest.mark.parametrize("direction", sanitize.DIRECTIONS)
def test_jobs_run_and_are_checked(host: HostDriver, direction: str) -> None:
    """Every ugly case is among the jobs; some of them run here, and leave no memory behind."""
    found = sanitize.jobs(direction, FACTS)
    assert {job.case.name for job in found} == {case.name for case in sanitize.CASES_OF[direction] if case.batch}
    assert sum(bool(job.config.options) for job in found) >= 4 and not any(j.config.kernel == "general" for j in found)
    for job in [*found[:4], found[-1]]:
        sanitize.run(job)
    assert not host.held
    with pytest.raises(AssertionError, match="not finite"):
        sanitize.run(found[0], "unwritten")
    assert not host.held


def test_children_bring_no_framework() -> None:
    code = "import sys, tests.sanitize; sys.exit(bool({'torch', 'jax'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


MEMCHECK = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 16 bytes
=========     at tiled_forward+0x1a0
=========     by thread (3,0,0) in block (1,0,0)
=========     Access at 0x7f0000001000 is out of bounds
=========
========= ERROR SUMMARY: 1 error
"""
RACECHECK = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at tiled_queries+0x80
=========     and Read access at tiled_queries+0x90 [4096 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""


def test_logs_are_counted() -> None:
    total, kinds = sanitize.parse(MEMCHECK)
    assert total == 1 and kinds == {"Invalid __global__ read of size 16 bytes at tiled_forward": 1}
    total, kinds = sanitize.parse(RACECHECK)
    assert total == 1 and sum(kinds.values()) == 1
    assert sanitize.parse("========= ERROR SUMMARY: 0 errors\n") == (0, Counter())
    assert sanitize.parse("========= COMPUTE-SANITIZER\n")[0] is None


def outcome(ran: int, reports: int | None) -> sanitize.Outcome:
    return sanitize.Outcome(ran, [], reports, Counter(), "")


def test_the_table_says_what_is_not_clean() -> None:
    keys = [("memcheck", "forward", None, 0), ("memcheck", "forward", "short", 0)]
    page, clean = sanitize.summary(dict(zip(keys, (outcome(5, 0), outcome(1, 3)), strict=True)), {"forward": 5})
    assert clean and "| memcheck | forward | 5 of 5 | 0 |" in page
    assert "| memcheck | forward, planted: short |  | 3 |" in page
    for first, second in (((4, 0), (1, 3)), ((5, 2), (1, 3)), ((5, None), (1, 3)), ((5, 0), (1, 0))):
        outcomes = dict(zip(keys, (outcome(*first), outcome(*second)), strict=True))
        assert not sanitize.summary(outcomes, {"forward": 5})[1]
