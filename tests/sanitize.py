"""compute-sanitizer over the tensor core kernels: memcheck, racecheck and initcheck, forward and backward.

    python3 -m tests.sanitize --out runs/sanitizer
    python3 -m tests.sanitize --only "*:axial:tiled*" "backward:ragged_dilation:whole*" --tools racecheck

Every job of tests/sanitize_jobs.py runs under each tool; only natcore's tensor core kernels are instrumented, and
results are checked against the reference, too. One more process of each tool has a planted fault, which it must report.

The compute-sanitizer of CUDA 13.0 (2025.3.1) reports hazards across named barriers and mbarriers (whole maps) that
2026.4.0 does not; the first one on the PATH is taken.

Kernels are compiled and references computed by processes beside the tools', and each tool has some processes that take
the next job that is ready. A process that ends at a job (after an invalid access nothing else runs in it) is followed
by another one.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatch
from importlib import import_module
from itertools import count, zip_longest
from math import ceil
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from queue import Queue
from threading import Lock

from natcore.device import facts
from natcore.planning import CANDIDATES, DeviceFacts
from tests.sanitize_data import Ready, ready
from tests.sanitize_process import FAULTS, FAULTY, Job, serve

TOOLS = {
    "memcheck": ("--report-api-errors", "no", "--padding", "512"),
    "racecheck": (),
    "initcheck": ("--check-api-memory-access", "no"),
}
PROCESSES = {"memcheck": 3, "racecheck": 9, "initcheck": 3}  # at a time
#: For the tools' processes: their work is the GPU's, and dozens of threads each would stand in each other's way.
ENVIRONMENT = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
GRACE = 10.0  # seconds from the deadline until processes end themselves
_NUMBERS = count()  # of processes: each gets ports of its own


# ---- processes under a tool ----


@dataclass
class Outcome:
    """What came out under a tool."""

    ran: list[tuple[str, float]] = field(default_factory=list)  # jobs, and the seconds that they took
    wrong: list[str] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)  # jobs at which a process ended, and how
    reports: list[int | None] = field(default_factory=list)  # of each process; None: the tool wrote no summary
    kinds: Counter[str] = field(default_factory=Counter)


class Process:
    """A process under a tool, which takes jobs."""

    def __init__(self, tool: str, folder: Path, deadline: float) -> None:
        number = next(_NUMBERS)
        self.log = folder / f"{tool}_{number}.log"
        address = Path(tempfile.gettempdir()) / f"natcore_{os.getpid()}_{number}_{secrets.token_hex(4)}"
        names = sorted({info.name for c in CANDIDATES if c.name != "general" for info in c.kernels})
        command = [sanitizer(), "--tool", tool, *TOOLS[tool], "--log-file", str(self.log)]
        command += ["--port", str(49152 + 16 * (number % 800)), "--launch-timeout", "120"]
        command += ["--print-limit", "200", "--show-backtrace", "device"]
        command += [word for name in names for word in ("--kernel-name", f"kernel_substring={name}")]
        command += [sys.executable, "-m", "tests.sanitize", "--serve", str(address)]
        command += ["--budget-seconds", str(max(deadline - time.monotonic(), 0) + GRACE)]
        with socket.socket(socket.AF_UNIX) as door, self.log.with_suffix(".output").open("w") as output:
            door.bind(str(address))
            door.listen()
            self.running = subprocess.Popen(
                command, stdout=output, stderr=output, start_new_session=True, env=os.environ | ENVIRONMENT
            )
            self.connection = self._accept(door, deadline)
        address.unlink()

    def _accept(self, door: socket.socket, deadline: float) -> Connection:
        door.settimeout(0.5)
        while True:
            try:
                return Connection(door.accept()[0].detach())
            except TimeoutError:
                if self.running.poll() is not None or time.monotonic() > deadline:
                    self.kill()
                    raise RuntimeError(f"a process under a tool did not start: {self.said()}") from None

    def run(self, task: Ready, fault: str | None, deadline: float) -> tuple[str, float]:
        """What is wrong, and seconds. EOFError where the process ended, TimeoutError at the deadline."""
        self.connection.send((task.job, str(task.data), fault))
        if not self.connection.poll(max(deadline - time.monotonic(), 0)):
            raise TimeoutError
        return self.connection.recv()

    def finish(self, patience: float) -> None:
        """Lets it end, and if it does not, ends it."""
        with contextlib.suppress(OSError):
            self.connection.send(None)
        self.connection.close()
        try:
            self.running.wait(max(patience, 1))
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.running.pid, signal.SIGKILL)
        self.running.wait()

    def said(self) -> str:
        lines = self.log.with_suffix(".output").read_text(errors="replace").strip().splitlines()
        return lines[-1][:200] if lines else ""


class Tool:
    """All that runs under one tool: its processes share a queue."""

    def __init__(self, name: str, folder: Path, deadline: float) -> None:
        self.name, self.folder, self.deadline = name, folder, deadline
        self.queue: Queue[Ready | None] = Queue()
        self.outcome, self._lock = Outcome(), Lock()

    def work(self) -> None:
        """Runs jobs of the queue until None comes or the time is spent."""
        process = None
        while (task := self.queue.get()) is not None and time.monotonic() < self.deadline:
            process = process or Process(self.name, self.folder, self.deadline)
            if not self.step(process, task, None):
                self.end(process)
                process = None
        if process is not None:
            self.end(process)

    def planted(self, task: Ready) -> Outcome:
        """What comes out at this job with the tool's planted fault."""
        other = Tool(self.name, self.folder, self.deadline)
        process = Process(self.name, self.folder, self.deadline)
        other.step(process, task, FAULTS[self.name])
        other.end(process)
        return other.outcome

    def step(self, process: Process, task: Ready, fault: str | None) -> bool:
        """Runs a job; whether the process goes on."""
        name, outcome = task.job.name, self.outcome
        try:
            wrong, seconds = process.run(task, fault, self.deadline)
        except (EOFError, OSError) as error:
            with self._lock:
                how = "time was spent" if isinstance(error, TimeoutError) else f"process ended: {process.said()}"
                outcome.ended.append(f"{name}: {how}")
            return False
        with self._lock:
            outcome.ran.append((name, seconds))
            outcome.wrong += [f"{name}: {wrong}"] if wrong else []
        return True

    def end(self, process: Process) -> None:
        process.finish(self.deadline + GRACE - time.monotonic())
        text = process.log.read_text(errors="replace") if process.log.exists() else ""
        reports, kinds = parse(text)
        with self._lock:
            self.outcome.reports.append(reports)
            self.outcome.kinds += kinds


def parse(log: str) -> tuple[int | None, Counter[str]]:
    """The number of reports of a log (None without a summary), and how often each kind was printed."""
    totals = [int(n) for n in re.findall(r"ERROR SUMMARY: (\d+) error", log)]
    totals += [int(n) for n in re.findall(r"RACECHECK SUMMARY: (\d+) hazard", log)]
    kinds: Counter[str] = Counter()
    lines = [line.removeprefix("=========").strip() for line in log.splitlines()]
    for line, following in zip_longest(lines, lines[1:], fillvalue=""):
        if re.match(r"(Invalid|Uninitialized|Error: |Warning: |Program hit|Target application|Out-of)", line):
            place = re.match(r"at (\S+?)[+(]", following)
            kinds[re.sub(r"0x[0-9a-f]+", "..", line) + (f" at {place[1]}" if place else "")] += 1
    return (sum(totals) if totals else None), kinds


def sanitizer() -> str:
    found = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if found is None:
        raise FileNotFoundError("compute-sanitizer was not found; it comes with the CUDA toolkit.")
    return found


# ---- the command ----


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.serve:
        signal.alarm(ceil(options.budget_seconds))  # which ends the process wherever it is
        serve(options.serve)
        return 0
    from tests.sanitize_jobs import DIRECTIONS, jobs  # brings much that the other processes do without

    deadline = time.monotonic() + options.budget_seconds
    folder = options.out or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    device = facts(0)
    every = [job for direction in DIRECTIONS for job in jobs(direction, device)]
    wanted = {job for job in every if any(fnmatch(job.name, pattern) for pattern in options.only)}
    faulty = next(job for job in every if job.direction == "forward" and job.config.kernel == FAULTY)
    tools = [Tool(name, folder, deadline) for name in options.tools]
    faults = run_all(wanted, faulty, tools, device)
    page, clean = summary({tool.name: tool.outcome for tool in tools}, faults, len(wanted))
    (folder / "sanitizer.md").write_text(page)
    seconds = [f"{took:.1f} {tool.name} {name}\n" for tool in tools for name, took in tool.outcome.ran]
    (folder / "seconds.txt").write_text("".join(seconds))
    print(page)
    return 0 if clean else 1


def run_all(wanted: set[Job], faulty: Job, tools: list[Tool], device: DeviceFacts) -> dict[str, Outcome]:
    """Runs the jobs under each tool, and another one with each tool's planted fault, whose outcomes are returned."""
    os.environ.update(ENVIRONMENT)
    planted: dict[str, Future[Outcome]] = {}
    with (
        ThreadPoolExecutor(sum(PROCESSES.values()) + len(FAULTS) + 1) as threads,
        ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool,
    ):
        workers = [threads.submit(tool.work) for tool in tools for _ in range(PROCESSES[tool.name])]
        threads.submit(import_module, "benchmarks.report")  # brings torch, which takes long
        try:
            for task in ready([*wanted | {faulty}], device, tools[0].folder, pool, tools[0].deadline):
                for tool in tools:
                    if task.job in wanted:
                        tool.queue.put(task)
                    if task.job == faulty:
                        planted[tool.name] = threads.submit(tool.planted, task)
        finally:
            for tool in tools:
                for _ in range(PROCESSES[tool.name]):
                    tool.queue.put(None)
        for worker in workers:
            worker.result()
        return {name: outcome.result() for name, outcome in planted.items()}


def summary(outcomes: dict[str, Outcome], faults: dict[str, Outcome], total: int) -> tuple[str, bool]:
    """The table, what was reported, and whether all is as it should be."""
    from benchmarks.report import table

    rows, remarks, clean = [], [], True
    for tool, outcome in outcomes.items():
        counts = [n for n in outcome.reports if n is not None]
        known = len(counts) == len(outcome.reports)
        rows.append(
            [tool, f"{len(outcome.ran)} of {total}", f"{sum(counts)}{'' if known else ', some without summary'}"]
        )
        clean &= known and sum(counts) == 0 and len(outcome.ran) == total and not outcome.wrong
        remarks += [f"- {tool}: {times} x {kind}" for kind, times in outcome.kinds.most_common(40)]
        remarks += [f"- {tool}: {what}" for what in [*outcome.wrong, *outcome.ended]]
    for tool, outcome in faults.items():
        found = sum(outcome.kinds.values())
        rows.append([f"{tool}, planted: {FAULTS[tool]}", "", str(found)])
        clean &= found > 0
    clean &= faults.keys() == FAULTS.keys() & outcomes.keys()
    lines = ["# compute-sanitizer", "", *table(["tool", "jobs run", "reports"], rows), "", *remarks, ""]
    return "\n".join(lines), clean


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("tests.sanitize", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tools", nargs="+", default=list(TOOLS), choices=list(TOOLS))
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of names of jobs, as direction:case:kernel")
    parser.add_argument("--budget-seconds", type=float, default=140.0, help="what runs longer is stopped")
    parser.add_argument("--out", type=Path, help="folder for the logs and sanitizer.md")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
