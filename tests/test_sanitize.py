"""The harness of tests/sanitize.py without a GPU: a driver made of host memory, and logs as the tools write them."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from natcore import compiling
from natcore.backends import prepare
from natcore.planning import facts_for_arch
from natcore.problem import Direction
from natcore.views import Device
from tests import sanitize, sanitize_jobs, sanitize_process

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


def on_host(monkeypatch: pytest.MonkeyPatch) -> HostDriver:
    driver = HostDriver()
    monkeypatch.setattr(sanitize_process, "driver", lambda: driver)
    monkeypatch.setattr(sanitize_process, "checked", lambda result, what: result[1] if len(result) > 1 else None)
    monkeypatch.setattr(sanitize_process, "prepare", lambda call, device, config: prepare(call, Device("cpu", 0)))
    monkeypatch.setattr(sanitize_process, "current", lambda index: nullcontext())
    monkeypatch.setattr(sanitize_process, "planned_for", lambda job: nullcontext())
    return driver


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> HostDriver:
    return on_host(monkeypatch)


@pytest.mark.parametrize("direction", sanitize_jobs.DIRECTIONS)
def test_jobs_run_and_are_checked(host: HostDriver, direction: Direction) -> None:
    """Every ugly case is among the jobs; some of them run here, and leave no memory behind."""
    found = sanitize_jobs.jobs(direction, FACTS)
    cases = {case.name for case in sanitize_jobs.CASES_OF[direction] if case.batch}
    assert {job.case.name for job in found} == cases and len(set(found)) == len(found)
    assert sum(bool(job.config.options) for job in found) >= 4 and not any(j.config.kernel == "general" for j in found)
    assert {job.config.kernel for job in found if job.multiprocessors == 1} == {job.config.kernel for job in found}
    for job in [*found[:4], found[-1]]:
        sanitize_process.run(job, sanitize_process.data_of(job.case, direction, job.dtype))
    assert not host.held
    first = found[0]
    with pytest.raises(AssertionError, match="not finite"):
        sanitize_process.run(first, sanitize_process.data_of(first.case, direction, first.dtype), "unwritten")
    assert not host.held


def test_a_barrier_is_left_out() -> None:
    """Of what is compiled meanwhile, and of nothing afterwards."""
    name = "kernels/tiled_forward.cu"
    before = compiling.sources_of("tiled_forward")[name]
    with sanitize_process.unsynchronised():
        assert compiling.sources_of("tiled_forward")[name] == before.replace(sanitize_process.BARRIER, "") != before
    assert compiling.sources_of("tiled_forward")[name] == before


def test_children_bring_no_framework() -> None:
    code = "import sys, tests.sanitize; sys.exit(bool({'torch', 'jax'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# In place of compute-sanitizer: runs its target on the host, which ends at jobs of axial windows, as after an invalid
# access.
TOOL = f"""#!{sys.executable}
import os, sys
import pytest
from tests import sanitize, sanitize_process, test_sanitize
test_sanitize.on_host(pytest.MonkeyPatch())
run = sanitize_process.run
sanitize_process.run = lambda job, *rest: os._exit(3) if job.case.name == "axial" else run(job, *rest)
words = sys.argv
log = open(words[words.index("--log-file") + 1], "w")
sanitize.main(words[words.index("--serve"):])
print("========= ERROR SUMMARY: 0 errors", file=log)
"""


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A process that ends at a job costs that job alone, and shows. (Its kernels need NVRTC, but no GPU.)"""
    tool = tmp_path / "tool"
    tool.write_text(TOOL)
    tool.chmod(0o755)
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parents[1]}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setattr(sanitize, "sanitizer", lambda: str(tool))
    monkeypatch.setattr(sanitize, "facts", lambda index: FACTS)
    monkeypatch.setattr(sanitize, "PROCESSES", {"racecheck": 1})
    names = ["*:axial:tiled", "*:kernel_one:tiled*"]
    assert sanitize.main(["--tools", "racecheck", "--only", *names, "--out", str(tmp_path / "out")]) == 1
    page = capsys.readouterr().out
    assert "| racecheck | 2 of 3 | 0, some without summary |" in page
    assert "- racecheck: forward:axial:tiled: process ended" in page


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


def outcome(ran: int, *reports: int | None, wrong: tuple[str, ...] = ()) -> sanitize.Outcome:
    return sanitize.Outcome([("job", 1.0)] * ran, list(wrong), [], list(reports))


def test_the_table_says_what_is_not_clean() -> None:
    found = sanitize.Outcome(kinds=Counter({"Invalid": 3}))
    page, clean = sanitize.summary({"memcheck": outcome(5, 0, 0)}, {"memcheck": found}, 5)
    assert clean and "| memcheck | 5 of 5 | 0 |" in page and "| memcheck, planted: short |  | 3 |" in page
    others = (outcome(4, 0), outcome(5, 2), outcome(5, 0, None), outcome(5, 0, wrong=("dq",)))
    assert not any(sanitize.summary({"memcheck": other}, {"memcheck": found}, 5)[1] for other in others)
    assert not sanitize.summary({"memcheck": outcome(5, 0)}, {"memcheck": sanitize.Outcome()}, 5)[1]
    assert not sanitize.summary({"memcheck": outcome(5, 0)}, {}, 5)[1]
