"""compute-sanitizer over the tensor core kernels: memcheck, racecheck and initcheck, forward and backward.

    python3 -m tests.sanitize --out runs/sanitizer

Every case of tests/test_fast_forward.py and tests/test_fast_backward.py, and some of tests/test_marching_backward.py,
runs through each tensor core kernel that takes it, and one of them under other configs, too. Cases run without a
framework, on memory of the driver's own: inputs are copied in, results are filled with NaN, and the workspace is left
as it comes, so that initcheck sees whoever reads what nobody wrote. Only natcore's tensor core kernels are
instrumented. Results are checked against the reference, too. Two more processes have a planted fault each (an
allocation too short, an input never written): the tools must report them.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import count, repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.configs import alternatives, compiled
from natcore.backends import prepare
from natcore.device import check as checked
from natcore.device import current, driver, facts
from natcore.planning import CANDIDATES, Config, DeviceFacts, candidates, plan_for
from natcore.planning.listed import contiguous_call
from natcore.problem import OPERANDS, RESULTS, Call, Direction, Problem, call_of
from natcore.views import Device, View, contiguous_strides
from tests import test_fast_backward, test_fast_forward, test_marching_backward
from tests.cases import Case, check, expected, inputs, numpy_dtype

TOOLS = {
    "memcheck": ("--report-api-errors", "no", "--padding", "512"),
    "racecheck": (),
    "initcheck": ("--check-api-memory-access", "no"),
}
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")
SHARDS = 3  # processes of one tool and direction
FAULTS = {"memcheck": "short", "initcheck": "unwritten"}  # planted, to see that the tool reports them
_NUMBERS = count()  # of processes: each gets ports of its own
CASES_OF = {
    "forward": test_fast_forward.ABLE + test_fast_forward.MORE,
    "backward": test_fast_backward.ABLE + test_fast_backward.MORE + test_marching_backward.UNEVEN,
}


@dataclass(frozen=True)
class Job:
    """One case in one direction: its dtype and its config (a kernel's name alone: as that kernel cuts the map)."""

    case: Case
    direction: Direction
    dtype: str
    config: Config

    @property
    def problem(self) -> Problem:
        return test_fast_backward.problem_for(self.case, self.dtype)

    @property
    def call(self) -> Call:
        return contiguous_call(self.direction, self.problem)


def jobs(direction: Direction, device: DeviceFacts) -> list[Job]:
    """Every ugly case with each tensor core kernel that takes it, in turn in float16 and bfloat16; then, of one case,
    other configs."""
    cases = [case for case in CASES_OF[direction] if case.batch]
    found = [Job(case, direction, ("float16", "bfloat16")[i % 2], Config("general")) for i, case in enumerate(cases)]
    able = [
        replace(job, config=Config(candidate.name))
        for job in found
        for candidate in candidates(job.call, device)
        if candidate.name != "general"
    ]
    base = next(job for job in able if job.case.name == "several_regions")
    base = replace(base, case=replace(base.case, batch=4))
    configs = list(test_fast_forward.CONFIGS.values()) if direction == "forward" else []
    configs += [c for c in alternatives(base.call, device, cheapest=1, drawn=3) if c.kernel != "general"]
    for config in configs:
        try:
            plan_for(base.call, device, config)
        except (ValueError, NotImplementedError):
            continue
        able.append(replace(base, config=config))
    return able


# ---- in the process under the tool ----


class Memory:
    """Device memory of the driver's own, freed together."""

    def __init__(self) -> None:
        self._addresses: list[Any] = []

    def take(self, size: int) -> int:
        address = checked(driver().cuMemAlloc(max(size, 1)), f"cuMemAlloc({size})")
        self._addresses.append(address)
        return int(address)

    def free(self) -> None:
        for address in self._addresses:
            checked(driver().cuMemFree(address), "cuMemFree")
        self._addresses.clear()


def run(job: Job, fault: str | None = None) -> None:
    """The job on fresh memory. Raises AssertionError where a result is wrong."""
    memory = Memory()
    try:
        _run(job, fault, memory)
    finally:
        memory.free()


def _run(job: Job, fault: str | None, memory: Memory) -> None:
    case, problem = job.case, job.problem
    host = inputs(case, job.dtype)
    if job.direction == "backward":
        forward = expected(case, host)
        host |= {n: forward[n].astype(numpy_dtype(problem.dtype_of(n))) for n in ("out", "lse")}
    views: dict[str, View] = {}
    for name in OPERANDS[job.direction]:
        if not problem.has(name):
            continue
        shape, dtype = problem.shapes[name], problem.dtype_of(name)
        size = int(np.prod(shape)) * numpy_dtype(dtype).itemsize
        planted = fault if name == "k" else None
        address = memory.take(size // 2 if planted == "short" else size)
        views[name] = View(address, shape, contiguous_strides(shape), dtype, Device("cuda", 0))
        if name in RESULTS[job.direction]:
            checked(driver().cuMemsetD8(address, 0xFF, size), "cuMemsetD8")
        elif planted is None:
            data = np.ascontiguousarray(host[name])
            checked(driver().cuMemcpyHtoD(address, data.ctypes.data, size), f"copying {name}")
    if case.packed:
        views |= _packed(host, views, memory)
    executable = prepare(call_of(job.direction, problem, views), Device("cuda", 0), job.config)
    workspace = memory.take(executable.workspace_bytes)
    scale = problem.default_scale if case.scale is None else case.scale
    executable([views[n].ptr if n in views else 0 for n in OPERANDS[job.direction]], scale, 0, workspace)
    checked(driver().cuCtxSynchronize(), "cuCtxSynchronize")
    results = {n: _read(views[n]) for n in RESULTS[job.direction] if n in views}
    check(case, job.dtype, host, results, saved_out=job.direction == "backward")


def _packed(host: dict[str, np.ndarray], views: dict[str, View], memory: Memory) -> dict[str, View]:
    """q, k and v as views of one [batch, *spatial, 3, heads, head_dim]."""
    whole = np.ascontiguousarray(np.stack([host[n] for n in "qkv"], axis=-3))
    address, strides = memory.take(whole.nbytes), contiguous_strides(whole.shape)
    checked(driver().cuMemcpyHtoD(address, whole.ctypes.data, whole.nbytes), "copying qkv")
    step = strides[-3] * whole.dtype.itemsize
    inner = (*strides[:-3], *strides[-2:])
    return {n: views[n]._replace(ptr=address + i * step, strides=inner) for i, n in enumerate("qkv")}


def _read(view: View) -> np.ndarray:
    data = np.empty(view.shape, numpy_dtype(view.dtype))
    checked(driver().cuMemcpyDtoH(data.ctypes.data, view.ptr, data.nbytes), "copying back")
    return data


def child(mine: Path, fault: str | None) -> int:
    """Runs pickled jobs; prints a line for each. Returns how many gave wrong results."""
    wrong = 0
    with current(0):
        for job in pickle.loads(mine.read_bytes()):
            try:
                run(job, fault)
                print(json.dumps({"case": job.case.name}), flush=True)
            except AssertionError as error:
                wrong += 1
                print(json.dumps({"case": job.case.name, "wrong": str(error)}), flush=True)
    return wrong


# ---- the processes ----


@dataclass
class Process:
    """One process under one tool, its log and what came out."""

    tool: str
    direction: str
    fault: str | None
    shard: int
    log: Path
    running: subprocess.Popen

    def finish(self, deadline: float) -> Outcome:
        try:
            output, _ = self.running.communicate(timeout=max(deadline - time.monotonic(), 0.1))
            said = self.log.with_suffix(".stderr").read_text(errors="replace").strip().splitlines() or [""]
            ended = f"exit code {self.running.returncode}: {said[-1][:200]}" if self.running.returncode else ""
        except subprocess.TimeoutExpired:
            os.killpg(self.running.pid, signal.SIGKILL)
            output, _ = self.running.communicate()
            ended = "stopped, the time was spent"
        lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        reports, kinds = parse(text)
        return Outcome(len(lines), [x for x in lines if "wrong" in x], reports, kinds, ended)


@dataclass(frozen=True)
class Outcome:
    ran: int
    wrong: list[dict]
    reports: int | None  # None: the tool wrote no summary
    kinds: Counter[str]
    ended: str


def parse(log: str) -> tuple[int | None, Counter[str]]:
    """The number of reports of a log (None without a summary), and how often each kind was printed."""
    totals = [int(n) for n in re.findall(r"ERROR SUMMARY: (\d+) error", log)]
    totals += [int(n) for n in re.findall(r"RACECHECK SUMMARY: (\d+) hazard", log)]
    kinds: Counter[str] = Counter()
    lines = [line.removeprefix("=========").strip() for line in log.splitlines()]
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if re.match(r"(Invalid|Uninitialized|Error: |Warning: |Program hit|Target application|Out-of)", line):
            place = re.match(r"at (\S+?)[+(]", following)
            kinds[re.sub(r"0x[0-9a-f]+", "..", line) + (f" at {place[1]}" if place else "")] += 1
    return (sum(totals) if totals else None), kinds


def start(tool: str, direction: str, fault: str | None, shard: int, mine: list[Job], folder: Path) -> Process:
    names = sorted({info.name for c in CANDIDATES if c.name != "general" for info in c.kernels})
    stem = f"{tool}_{direction}_{fault or shard}"
    (folder / f"{stem}.jobs").write_bytes(pickle.dumps(mine))
    command = [sanitizer(), "--tool", tool, *TOOLS[tool], "--log-file", str(folder / f"{stem}.log")]
    command += ["--port", str(49152 + 16 * next(_NUMBERS)), "--launch-timeout", "120"]
    command += ["--print-limit", "200", "--show-backtrace", "device"]
    command += [word for name in names for word in ("--kernel-name", f"kernel_substring={name}")]
    command += [sys.executable, "-m", "tests.sanitize", "--child", str(folder / f"{stem}.jobs")]
    command += ["--fault", fault] if fault else []
    with (folder / f"{stem}.stderr").open("w") as errors:
        running = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
        )  # fmt: skip
    return Process(tool, direction, fault, shard, folder / f"{stem}.log", running)


def sanitizer() -> str:
    found = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if found is None:
        raise FileNotFoundError("compute-sanitizer was not found; it comes with the CUDA toolkit.")
    return found


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.child:
        return child(options.child, options.fault)
    deadline = time.monotonic() + options.budget_seconds
    folder = options.out or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    planned = {direction: jobs(direction, facts(0)) for direction in DIRECTIONS}
    with ProcessPoolExecutor(os.cpu_count(), get_context("fork")) as pool:  # into the disk cache, for all processes
        every = [job for found in planned.values() for job in found]
        list(pool.map(compiled, [job.call for job in every], repeat(facts(0)), [[job.config] for job in every]))
    wanted = [(t, d, None, s, planned[d][s::SHARDS]) for t in options.tools for d in DIRECTIONS for s in range(SHARDS)]
    wanted += [(t, "forward", FAULTS[t], 0, planned["forward"][:1]) for t in options.tools if t in FAULTS]
    processes = [start(*which, folder) for which in wanted]
    outcomes = {(p.tool, p.direction, p.fault, p.shard): p.finish(deadline) for p in processes}
    page, clean = summary(outcomes, {d: len(found) for d, found in planned.items()})
    (folder / "sanitizer.md").write_text(page)
    print(page)
    return 0 if clean else 1


def summary(outcomes: dict[tuple, Outcome], counts: dict[str, int]) -> tuple[str, bool]:
    """The table, what was reported, and whether all is as it should be."""
    from benchmarks.report import table  # brings torch, which the processes under the tools do without

    rows, remarks, clean = [], [], True
    for tool, direction, fault in dict.fromkeys(key[:3] for key in outcomes):
        shards = [outcome for key, outcome in outcomes.items() if key[:3] == (tool, direction, fault)]
        reports = [shard.reports for shard in shards]
        ran, total = sum(shard.ran for shard in shards), counts[direction] if fault is None else 1
        known = None not in reports
        found = sum(n for n in reports if n is not None)
        name = direction if fault is None else f"{direction}, planted: {fault}"
        rows.append([tool, name, f"{ran} of {total}" if fault is None else "", str(found) if known else "no summary"])
        clean &= (known and found == 0 and ran == total) if fault is None else found > 0
        for shard in shards:
            remarks += [f"- {tool} {name}: {times} x {kind}" for kind, times in shard.kinds.most_common(10)]
            remarks += [f"- {tool} {name}: {x['case']}: {x['wrong']}" for x in shard.wrong]
            remarks += [f"- {tool} {name}: {shard.ended}"] if shard.ended and fault is None else []
        clean &= fault is not None or not any(shard.wrong for shard in shards)
    lines = ["# compute-sanitizer", "", *table(["tool", "direction", "cases run", "reports"], rows), "", *remarks, ""]
    return "\n".join(lines), clean


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("tests.sanitize", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tools", nargs="+", default=list(TOOLS), choices=list(TOOLS))
    parser.add_argument("--budget-seconds", type=float, default=140.0, help="what runs longer is stopped")
    parser.add_argument("--out", type=Path, help="folder for the logs and sanitizer.md")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--fault", choices=list(FAULTS.values()), help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
