"""The planner's choices: beside other configs, and beside a prediction of what each workload should cost.

    python3 -m benchmarks.plans --budget-seconds 150 --out benchmarks/results

For every row and direction the planner's own choice is timed beside the cheapest other cuts of the map by its cost
model, some configs drawn at random, and every other kernel that takes the call: chosen / best says how good the
choice is. A second table sets the choice beside max(bytes / copy bandwidth, computed scores * head_dim / rate), the
rate being the median over NAT's own windows of the same run, one rate for each direction. Kernels are compiled in
processes of their own, the planner's choices first, and what the budget does not allow is left out and said.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import asdict
from math import prod
from pathlib import Path

import torch

from benchmarks import report as reports
from benchmarks import shapes
from benchmarks.configs import alternatives, compiled, spelled_out
from benchmarks.ours import allocate, call_on, executable_on
from benchmarks.peers import Inputs
from benchmarks.plan_pages import DIRECTIONS, Measured, Sweep, page
from benchmarks.shapes import Row
from benchmarks.timing import Clock, clock_of, copy_bandwidth
from natcore.planning import CANDIDATES, Config, DeviceFacts, Operand, choose, facts_for_arch, plan_for, refusal
from natcore.planning.listed import contiguous_call
from natcore.problem import Call, Direction
from natcore.views import ITEM_SIZES

_COMPILING = 0.55  # of the budget, at most
_GRACE = 5.0  # seconds in which a kernel whose compilation has begun may come
_SECONDS = 0.01  # of device time for one config; at least three repetitions


Key = tuple[Row, str, Direction]


def prepared(
    key: Key, facts: DeviceFacts, cheapest: int, drawn: int, deadline: float
) -> tuple[list[Config | None], bool]:
    """In a process of its own: the planner's choice (None) or, where some are asked for, other configs, those that
    are compiled by the deadline; and whether that was all."""
    row, dtype, direction = key
    call = contiguous_call(direction, row.problem(dtype))
    wanted: list[Config | None] = [None]
    if time.monotonic() < deadline and (cheapest or drawn):
        wanted = [*alternatives(call, facts, cheapest, drawn)]
    return compiled(call, facts, wanted, deadline), time.monotonic() < deadline


class Compilers:
    """Processes that plan and compile. They are started before this one touches the GPU."""

    def __init__(self, count: int) -> None:
        self.pool = ProcessPoolExecutor(count, multiprocessing.get_context("fork"))
        self.pool.submit(os.getpid).result()

    def run(
        self, keys: list[Key], options: argparse.Namespace, facts: DeviceFacts, deadline: float
    ) -> tuple[dict[Key, list[Config | None]], list[Key]]:
        """The configs of each key that were ready by the deadline, choices first; and the keys that lack some."""
        futures: dict[Future, Key] = {self.pool.submit(prepared, key, facts, 0, 0, deadline): key for key in keys}
        for key in keys:
            more = 2 if key[0].group == "nat" else 1
            counts = more * options.cheapest, more * options.drawn
            if any(counts):
                futures[self.pool.submit(prepared, key, facts, *counts, deadline)] = key
        wait(futures, timeout=max(deadline + _GRACE - time.monotonic(), 0))
        ready: dict[Key, list[Config | None]] = {key: [] for key in keys}
        late: dict[Key, None] = {}
        for future, key in futures.items():
            configs, complete = future.result() if future.done() else ([], False)
            ready[key] += configs
            late |= {} if complete else {key: None}
        self.pool.shutdown(wait=False, cancel_futures=True)
        return ready, list(late)


class Run:
    def __init__(self, clock: Clock, sweep: Sweep, facts: DeviceFacts, deadline: float) -> None:
        self.clock, self.sweep, self.facts, self.deadline = clock, sweep, facts, deadline

    def measure(self, row: Row, dtype: str, ready: dict[Direction, list[Config | None]]) -> None:
        """Both directions of a row on the same memory. What the time does not allow stays out."""
        arrays = allocate(row, Inputs.random(row, dtype, self.clock.device))
        for direction in DIRECTIONS:
            found = self._entry(row, dtype, direction)
            call = call_on(direction, row, arrays)
            for config in ready[direction]:
                if time.monotonic() > self.deadline:
                    self.sweep.notes.append(f"the time budget was spent in {row.name} {dtype} {direction}")
                    break
                try:
                    timing = self.clock.time(executable_on(call, arrays, config), _SECONDS)
                except Exception as error:  # noqa: BLE001 - a config that fails must not end the run
                    found.error = f"{_text(config)}: {type(error).__name__}: {error}".splitlines()[0][:200]
                    continue
                if config is None:
                    found.chosen = timing
                else:
                    found.others[_text(config)] = timing
        del arrays

    def _entry(self, row: Row, dtype: str, direction: Direction) -> Measured:
        for found in self.sweep.measured:
            if (found.row, found.dtype, found.direction) == (row.name, dtype, direction):
                return found
        call = contiguous_call(direction, row.problem(dtype))
        choice = choose(call, self.facts)
        kernel = choice.name
        reasons = [refusal(c, call, self.facts) for c in CANDIDATES if direction in c.directions and c.name != kernel]
        why = "; ".join(r for r in reasons if r and not r.startswith("there is no")) if kernel == "general" else ""
        found = Measured(row.name, dtype, direction, kernel, _text(spelled_out(call, self.facts)), why)
        found.moves = moved_bytes(call, self.facts) / shapes.direction_bytes(row, dtype, direction)
        found.clocks = None if choice.clocks is None else choice.clocks(call, self.facts)
        self.sweep.measured.append(found)
        return found


def moved_bytes(call: Call, facts: DeviceFacts) -> int:
    """What the planner's choice reads and writes of the tensors of q's and v's size: each once a pass."""
    names = [
        call.operands[index]
        for launch in plan_for(call, facts).launches
        for index in {p.index for p in launch.params if isinstance(p, Operand)}
    ]
    shapes_of = call.problem.shapes
    return ITEM_SIZES[call.problem.dtype] * sum(prod(shapes_of[name]) for name in names if name in _LARGE)


_LARGE = ("q", "k", "v", "out", "d_out", "dq", "dk", "dv")


def _text(config: Config | None) -> str:
    if config is None:
        return "the planner's"
    return " ".join([config.kernel, *(f"{name}={value}" for name, value in config.options)])


# ---- the command ----


def main(arguments: list[str] | None = None) -> Sweep:
    options = _parser().parse_args(arguments)
    started = time.monotonic()
    deadline = started + options.budget_seconds
    compilers = Compilers(options.compilers)
    words = sys.argv[1:] if arguments is None else arguments
    sweep = Sweep(reports.machine(reports.command_of("benchmarks.plans", words), options.commit))
    device = torch.device(options.device or ("cuda:0" if torch.cuda.is_available() else "cpu"))
    facts = _facts(device)
    rows = shapes.select(options.rows)
    keys: list[Key] = [(row, dtype, direction) for dtype in options.dtype for row in rows for direction in DIRECTIONS]
    ready, late = compilers.run(keys, options, facts, started + _COMPILING * options.budget_seconds)
    if late:
        names = ", ".join(f"{row.name} {direction}" for row, _, direction in late)
        sweep.notes.append(f"not all was compiled within {_COMPILING:.0%} of the budget: {names}")
    print(f"compiled in {time.monotonic() - started:.0f} s", flush=True)
    clock = clock_of(device)
    sweep.rates = {"copy TB/s": copy_bandwidth(clock) / 1e12, "empty kernel us": 1e3 * clock.empty().ms}
    run = Run(clock, sweep, facts, deadline)
    _save(sweep, options)
    for dtype, row, configs in _turns(options.dtype, rows, ready):
        run.measure(row, dtype, configs)
        _save(sweep, options)
    print(f"all in {time.monotonic() - started:.0f} s\n{page(sweep)}")
    return sweep


def _save(sweep: Sweep, options: argparse.Namespace) -> None:
    if options.out:
        reports.write(asdict(sweep), options.out, options.name, page(sweep))


def _turns(dtypes: list[str], rows: list[Row], ready: dict) -> Iterator[tuple[str, Row, dict]]:
    """First every choice, then what stands beside it, so that a short budget leaves the second table."""
    for chosen in (True, False):
        for dtype in dtypes:
            for row in rows:
                configs = {d: [c for c in ready[row, dtype, d] if (c is None) is chosen] for d in DIRECTIONS}
                if any(configs.values()):
                    yield dtype, row, configs


def _facts(device: torch.device) -> DeviceFacts:
    if device.type != "cuda":
        return facts_for_arch("sm_90a")
    from natcore.device import facts

    return facts(device.index or 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("benchmarks.plans", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", nargs="+", default=["nat", "sweep"], help="all, nat, large, sweep, or names of rows")
    parser.add_argument("--dtype", nargs="+", default=["float16"], choices=["float16", "bfloat16"])
    parser.add_argument("--cheapest", type=int, default=4, help="other cuts of the map, the cheapest (NAT: twice)")
    parser.add_argument("--drawn", type=int, default=2, help="configs drawn at random, seeds fixed (NAT: twice)")
    parser.add_argument("--budget-seconds", type=float, default=150.0, help="what is left then is skipped")
    parser.add_argument("--compilers", type=int, default=os.cpu_count() or 1, help="processes that compile")
    parser.add_argument("--device", help="cuda:0, or cpu where there is none")
    parser.add_argument("--out", type=Path, help="folder for plans.md and plans.json")
    parser.add_argument("--name", default="plans", help="name of the two files")
    parser.add_argument("--commit", help="the commit that is measured, where git cannot tell")
    return parser


if __name__ == "__main__":
    main()
