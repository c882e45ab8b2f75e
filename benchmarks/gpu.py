"""natcore beside its peers, on one device.

    python3 -m benchmarks.gpu --rows nat --dtype float16 bfloat16 --out benchmarks/results

Every figure is a median of device time (see `benchmarks.timing`) and stands beside the memory floor (the bytes
that must move over the copy bandwidth of the same run), a plain copy of the same bytes in the same harness, and
the peers. natcore is measured with RPB where the row has it, with LSE, and with every gradient.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from benchmarks import report as reports
from benchmarks import shapes
from benchmarks.ours import OURS
from benchmarks.peers import PEERS, Implementation, Inputs, missing
from benchmarks.report import COPY, FLOOR, Figure, Report
from benchmarks.shapes import Row
from benchmarks.timing import Clock, Timing, clock_of, copy_bandwidth, copy_time, graphed, matmul_rate


def main(arguments: list[str] | None = None) -> Report:
    options = _parser().parse_args(arguments)
    rows = shapes.select(options.rows)
    device = torch.device(options.device)
    words = sys.argv[1:] if arguments is None else arguments
    report = Report(reports.machine(reports.command_of("benchmarks.gpu", words), options.commit))
    run = Run(clock_of(device), report, time.monotonic() + options.budget_seconds, options)
    run.rates()
    for dtype in options.dtype:
        run.baselines(rows, dtype)
        for implementation in _implementations(options.peers, report.notes):
            for row in rows:
                if implementation.applies(row):
                    run.measure(row, dtype, implementation)
            run.save()
    print(reports.markdown(_ordered(report), "natcore beside its peers"))
    return report


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", nargs="+", default=["nat"], help="all, nat, large, sweep, or names of rows")
    parser.add_argument(
        "--dtype", nargs="+", default=["float16", "bfloat16"], choices=["float16", "bfloat16", "float32", "float64"]
    )
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS), help="none: --peers alone")
    parser.add_argument("--budget-seconds", type=float, default=float("inf"), help="what is left then is skipped")
    parser.add_argument("--graph", action="store_true", help="time replays of CUDA graphs instead of calls")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="folder for gpu.md and gpu.json")
    parser.add_argument("--name", default="gpu", help="name of the two files")
    parser.add_argument("--commit", help="the commit that is measured, where git cannot tell")
    return parser


def _implementations(peers: list[str], notes: list[str]) -> list[Implementation]:
    """natcore first, the peers that compile last, so that a short budget leaves the cheap figures."""
    chosen = list(OURS)
    for peer in PEERS:
        if peer in peers:
            absent = missing(peer)
            chosen += [] if absent else PEERS[peer]
            if absent and absent not in notes:
                notes.append(absent)
    return chosen


class Run:
    """One run: what measures, what is kept, and when to stop."""

    def __init__(self, clock: Clock, report: Report, deadline: float, options: argparse.Namespace) -> None:
        self.clock, self.report, self.deadline, self.options = clock, report, deadline, options
        self.bandwidth = 0.0

    def rates(self) -> None:
        self.bandwidth = copy_bandwidth(self.clock)
        self.report.rates = {
            "copy TB/s": self.bandwidth / 1e12,
            "matmul TFLOP/s": matmul_rate(self.clock) / 1e12,
            "empty kernel us": 1e3 * self.clock.empty().ms,
        }
        print(self.report.rates, flush=True)

    def baselines(self, rows: list[Row], dtype: str) -> None:
        """The memory floor and a copy of the same bytes, for every row."""
        for row in rows:
            self.report.labels[row.name] = row.label
            forward, both = (shapes.floor_bytes(row, dtype, backward) for backward in (False, True))
            floors = [Timing.of([1e3 * size / self.bandwidth]) for size in (forward, both)]
            copies = [copy_time(self.clock, size) for size in (forward, both)]
            for name, (first, second) in ((FLOOR, floors), (COPY, copies)):
                self.report.figures.append(Figure(row.name, dtype, name, forward=first, both=second))

    def measure(self, row: Row, dtype: str, implementation: Implementation) -> None:
        """One figure, or the reason why there is none."""
        if time.monotonic() > self.deadline:
            self.report.skip(f"the time budget was spent before {implementation.name} ({dtype}) on", row.name)
            return
        figure = Figure(row.name, dtype, implementation.name)
        self.report.figures.append(figure)
        try:
            self._fill(figure, row, implementation)
        except Exception as error:  # noqa: BLE001 - one that fails must not end the run: its error is its figure
            message = f"{type(error).__name__}: {str(error).strip() or 'no message'}"
            figure.error = message.splitlines()[0][:160].replace("|", "/")  # a bar would end the table's cell
        gc.collect()
        if self.clock.device.type == "cuda":
            torch.cuda.empty_cache()
        print(row.name, dtype, implementation.name, *reports.figure_cells(self.report, figure), sep=" | ", flush=True)

    def _fill(self, figure: Figure, row: Row, implementation: Implementation) -> None:
        bound = implementation.bind(row, Inputs.random(row, figure.dtype, self.clock.device))
        figure.kernel = bound.kernel
        figure.forward = self.clock.time(self._replayed(bound.forward))
        figure.both = self.clock.time(self._replayed(bound.both))

    def _replayed(self, work: Callable[[], object]) -> Callable[[], object]:
        return graphed(work) if self.options.graph else work

    def save(self) -> None:
        if self.options.out:
            ordered = _ordered(self.report)
            page = reports.markdown(ordered, "natcore beside its peers")
            reports.write(asdict(ordered), self.options.out, self.options.name, page)


def _ordered(report: Report) -> Report:
    """The figures of one row together, rows in the order in which they were first seen."""
    order = {name: place for place, name in enumerate(dict.fromkeys(f.row for f in report.figures))}
    figures = sorted(report.figures, key=lambda f: order[f.row])
    return replace(report, figures=figures)


if __name__ == "__main__":
    main()
