"""The page of benchmarks.plans, and what stands on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median

from benchmarks import report as reports
from benchmarks import shapes
from benchmarks.timing import Timing
from natcore.problem import Direction

DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")


@dataclass
class Measured:
    """One row in one direction: the planner's choice (None where its time is not known) and every other config."""

    row: str
    dtype: str
    direction: Direction
    kernel: str
    config: str
    why: str  # the preferred kernels' refusals, where the general ones take it
    moves: float = 1.0  # bytes of q's and v's size that its passes move, in floors
    clocks: float | None = None  # by its kernel's own cost model
    chosen: Timing | None = None
    others: dict[str, Timing] = field(default_factory=dict)
    error: str = ""


@dataclass
class Sweep:
    machine: dict[str, str]
    rates: dict[str, float] = field(default_factory=dict)
    measured: list[Measured] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def page(sweep: Sweep) -> str:
    lines = ["# The planner's choices", "", *reports.machine_lines(sweep.machine)]
    lines += ["; ".join(f"{name} {value:.4g}" for name, value in sweep.rates.items()) + ".", ""]
    for dtype in dict.fromkeys(m.dtype for m in sweep.measured):
        for direction in DIRECTIONS:
            chosen = [m for m in sweep.measured if (m.dtype, m.direction) == (dtype, direction)]
            lines += [f"## {dtype}, {direction}: chosen and best", "", *choices(chosen), ""]
            lines += [f"## {dtype}, {direction}: predicted and measured", "", *predictions(sweep, chosen), ""]
    errors = [f"{m.row} {m.direction}: {m.error}" for m in sweep.measured if m.error]
    return "\n".join([*lines, *(f"- {note}" for note in [*sweep.notes, *errors]), ""])


def choices(measured: list[Measured]) -> list[str]:
    rows, ratios = [], []
    for m in measured:
        if m.chosen is None or not m.others:
            continue
        name, best = min(m.others.items(), key=lambda entry: entry[1].ms)
        if best.ms >= m.chosen.ms:
            name, best = "the planner's", m.chosen
        ratios.append(m.chosen.ms / best.ms)
        figures = [f"{1e3 * m.chosen.ms:.1f}", f"{1e3 * best.ms:.1f}", f"{ratios[-1]:.2f}"]
        rows.append([m.row, *figures, str(len(m.others)), m.config, name])
    if not ratios:
        return ["Nothing was timed beside the choices."]
    head = ["row", "chosen us", "best us", "chosen / best", "others", "chosen", "best"]
    good = sum(ratio <= 1.1 for ratio in ratios)
    text = f"Within 10 % of the best: {good} of {len(ratios)}; the median is {median(ratios):.3f}."
    return [text, "", *reports.table(head, rows)]


def predictions(sweep: Sweep, measured: list[Measured]) -> list[str]:
    times = {m.row: (shapes.ROWS[m.row], m, m.chosen.ms) for m in measured if m.chosen}
    rates = [shapes.fitted_rate(row, ms) for row, _, ms in times.values() if row.group == "nat"]
    if not rates:
        return ["None of NAT's rows was timed: there is no rate."]
    bandwidth, rate, empty = 1e12 * sweep.rates["copy TB/s"], median(rates), sweep.rates["empty kernel us"]
    rows, ratios = [], []
    for row, m, ms in times.values():
        predicted = shapes.predicted_ms(row, m.dtype, bandwidth, rate, m.direction)
        ratios.append(ms / predicted)
        moving = 1e3 * m.moves * shapes.direction_bytes(row, m.dtype, m.direction) / bandwidth
        why = m.why or (_excess(m, predicted, moving, empty) if ratios[-1] > 1.6 else "")
        figures = [f"{1e3 * predicted:.1f}", f"{1e3 * ms:.1f}", f"{ratios[-1]:.2f}", f"{m.moves:.2f}"]
        rows.append([row.name, row.label, m.kernel, *figures, why])
    head = [
        "row",
        "workload",
        "kernel",
        "predicted us",
        "measured us",
        "measured / predicted",
        "floors moved",
        "remark",
    ]
    text = f"Rate: {rate:.4g} scores times head_dim per second. "
    text += f"Within 1.6x of the prediction: {sum(ratio <= 1.6 for ratio in ratios)} of {len(ratios)}."
    return [text, "", *reports.table(head, rows)]


def _excess(m: Measured, predicted: float, moving: float, empty: float) -> str:
    """Why a kernel takes so much more than was predicted, in milliseconds."""
    if 1e3 * predicted < 2 * empty:
        return "mostly launch"
    model = "" if m.clocks is None else f"; its cost model counts {m.clocks:.0f} clocks"
    return f"its passes take {1e3 * moving:.0f} us to move what they move{model}"
