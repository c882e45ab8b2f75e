"""What a run keeps: where it ran, every figure, and the tables made of them (markdown and JSON)."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from benchmarks.shapes import ROWS, computed_scores, fitted_rate, predicted_ms, useful_scores
from benchmarks.timing import Timing

_PACKAGES = ("torch", "jax", "natten", "timm", "triton", "cuda-core", "cuda-bindings", "numpy")
#: Names of the figures that are no implementation: each other one is compared with them.
FLOOR, COPY = "memory floor", "copy of the same bytes"


@dataclass
class Figure:
    """One implementation on one row: forward, and forward with all gradients; ``error`` in place of what failed."""

    row: str
    dtype: str
    implementation: str
    forward: Timing | None = None
    both: Timing | None = None
    error: str | None = None
    kernel: str = ""


@dataclass
class Report:
    """All of one run. ``labels`` describe the rows; ``notes`` say what was left out, and why."""

    machine: dict[str, str]
    labels: dict[str, str] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def skip(self, reason: str, row: str) -> None:
        """Notes that a row was left out; rows left out for the same reason share a note."""
        if self.notes and self.notes[-1].startswith(reason):
            self.notes[-1] += f", {row}"
        else:
            self.notes.append(f"{reason} {row}")

    def find(self, row: str, dtype: str, implementation: str) -> Figure | None:
        wanted = (row, dtype, implementation)
        return next((f for f in self.figures if (f.row, f.dtype, f.implementation) == wanted), None)


def command_of(module: str, arguments: list[str]) -> str:
    """The command line that measures this again: without where its files go."""
    kept, skip = ["python3", "-m", module], False
    for word in arguments:
        if not skip and not word.startswith(("--out=", "--name=", "--commit=")):
            skip = word in ("--out", "--name", "--commit")
            kept += [] if skip else [word]
        else:
            skip = False
    return shlex.join(kept)


def machine(command: str, commit: str | None = None) -> dict[str, str]:
    """Where and when: commit, command, versions, GPU and driver."""
    import torch

    import natcore

    facts = {
        "commit": commit or _output("git", "rev-parse", "HEAD") or "unknown",
        "command": command,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "python": platform.python_version(),
        "natcore": natcore.__version__,
    }
    if commit is None and _output("git", "status", "--porcelain", "--untracked-files=no"):
        facts["commit"] += " with local changes"
    for package in _PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    facts["torch"] = torch.__version__
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts["gpu"] = (
            f"{properties.name}, {properties.multi_processor_count} SMs, {properties.L2_cache_size >> 20} MiB L2"
        )
        facts["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
        facts["CUDA of torch"] = str(torch.version.cuda)
    else:
        facts["cpu"] = f"{platform.machine()}, {os.cpu_count()} cores"
    return facts


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def machine_lines(facts: dict[str, str]) -> list[str]:
    command = [f"Command: `{facts['command']}`. Commit {facts['commit']}. {facts['date']}.", ""]
    rest = "; ".join(f"{name} {value}" for name, value in facts.items() if name not in ("command", "commit", "date"))
    return [*command, rest + ".", ""]


def markdown(report: Report, title: str) -> str:
    """The whole run as one page of tables, one per dtype."""
    lines = [f"# {title}", "", *machine_lines(report.machine)]
    if report.rates:
        lines += ["; ".join(f"{name} {value:.4g}" for name, value in report.rates.items()) + ".", ""]
    for dtype in dict.fromkeys(f.dtype for f in report.figures):
        lines += [f"## {dtype}", "", *_table(report, dtype), ""]
        predictions = _predictions(report, dtype)
        if predictions:
            lines += [f"### {dtype}: predicted and measured, natcore forward", "", *predictions, ""]
    if report.notes:
        lines += ["## Left out", "", *(f"- {note}" for note in report.notes), ""]
    return "\n".join(lines)


_HEAD = (
    ("workload", "implementation"),
    ("forward ms", "quartiles", "x floor", "x copy", "/ natcore"),
    ("forward + backward ms", "quartiles", "x floor", "x copy", "/ natcore"),
)


def table(head: tuple[str, ...] | list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def _table(report: Report, dtype: str) -> list[str]:
    rows = []
    for name in dict.fromkeys(f.row for f in report.figures if f.dtype == dtype):
        for figure in (f for f in report.figures if (f.row, f.dtype) == (name, dtype)):
            lead = f"**{name}**: {report.labels[name]}" if not rows or figure.implementation == FLOOR else ""
            rows.append([lead, figure.implementation, *figure_cells(report, figure)])
    return table([cell for part in _HEAD for cell in part], rows)


def _predictions(report: Report, dtype: str) -> list[str]:
    """Every row against max(bytes / copy bandwidth, computed scores * head_dim / rate), the rate being the median
    over NAT's own rows of this run (none measured: no table)."""
    measured = {
        row: (figure.forward.ms, figure.kernel)
        for row in (ROWS[name] for name in report.labels if name in ROWS)
        if (figure := report.find(row.name, dtype, "natcore")) and figure.forward
    }
    rates = [fitted_rate(row, ms) for row, (ms, _) in measured.items() if row.group == "nat"]
    if not rates:
        return []
    bandwidth, rate = 1e12 * report.rates["copy TB/s"], median(rates)
    rows = []
    for row, (ms, kernel) in measured.items():
        predicted = predicted_ms(row, dtype, bandwidth, rate)
        waste = computed_scores(row) / useful_scores(row)
        figures = [f"{waste:.2f}", f"{predicted:.4g}", f"{ms:.4g}", f"{ms / predicted:.2f}"]
        rows.append([row.name, row.label, kernel, *figures])
    waste = "computed / useful scores"
    head = ["row", "workload", "kernel", waste, "predicted ms", "measured ms", "measured / predicted"]
    return [f"Rate: {rate:.4g} scores times head_dim per second.", "", *table(head, rows)]


def figure_cells(report: Report, figure: Figure) -> list[str]:
    """ms, spread and ratios for forward, then for forward + backward; the error where there is no figure."""
    cells: list[str] = []
    for direction in ("forward", "both"):
        timing: Timing | None = getattr(figure, direction)
        if timing is None:
            cells += [figure.error or "-", "", "", "", ""]
            continue
        ratios = []
        for base in (FLOOR, COPY, "natcore"):
            if figure.implementation in (FLOOR, base) or (figure.implementation, base) == (COPY, "natcore"):
                ratios.append("")
                continue
            other = report.find(figure.row, figure.dtype, base)
            against: Timing | None = getattr(other, direction) if other else None
            ratios.append(f"{timing.ms / against.ms:.2f}" if against else "")
        late = "" if timing.host_ahead else " (host-bound)"
        cells += [f"{timing.ms:.4g}{late}", f"{timing.low:.4g}-{timing.high:.4g}", *ratios]
    return cells


def write(data: dict, folder: Path, name: str, page: str) -> None:
    """``name``.md and ``name``.json in ``folder``; a write that fails leaves the old files."""
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in (
        (folder / f"{name}.md", page),
        (folder / f"{name}.json", json.dumps(data, indent=1)),
    ):
        temporary = path.with_suffix(f"{path.suffix}.{os.getpid()}")
        temporary.write_text(text)
        os.replace(temporary, path)
