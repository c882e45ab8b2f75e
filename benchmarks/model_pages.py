"""What a run of `benchmarks.models` keeps: its figures, and the page that compares them."""

from __future__ import annotations

from dataclasses import dataclass, field

from benchmarks import report as reports
from natcore.models import MODELS

CHANNELS_LAST = "@channels_last"
JAX = "jax:"


@dataclass
class ModelFigure:
    """Images per second of one model at one job ("inference" or "training") in one mode."""

    model: str
    job: str
    mode: str
    images_per_second: float | None = None
    peak_gib: float | None = None  # of the steps after the first
    first_step_seconds: float | None = None  # compilation included
    error: str | None = None


@dataclass
class ModelReport:
    machine: dict[str, str]
    figures: list[ModelFigure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def is_ours(name: str) -> bool:
    return name.removeprefix(JAX).removesuffix(CHANNELS_LAST) in MODELS


def is_jax(model: str) -> bool:
    return model.startswith(JAX)


#: What is compared: our mode beside the peer's; the best is the mode in which a model is fastest at the job.
_BEST = "best"
_COMPARED = (
    ("compiled", "compiled"), ("graphs", "graphs"), (_BEST, _BEST), ("graphs", "compiled"), ("eager", "compiled"),
    ("jit", "compiled"), ("jit", _BEST),
)  # fmt: skip


def _speed(figures: list[ModelFigure], model: str, job: str, mode: str) -> float | None:
    """Images per second, None where that was not measured."""
    known = [f for f in figures if (f.model, f.job) == (model, job) and f.images_per_second and mode in (f.mode, _BEST)]
    return max((f.images_per_second or 0 for f in known), default=None)


def ratios(figures: list[ModelFigure]) -> list[list[str]]:
    """A head, and a row for each of our models, job and pair of modes: how many times as fast as each peer."""
    models = dict.fromkeys(f.model for f in figures)
    peers = [name for name in models if not is_ours(name)]
    rows = [["model", "job", "modes", *(f"x {name}" for name in peers)]]
    for ours in (name for name in models if is_ours(name)):
        for job in dict.fromkeys(f.job for f in figures):
            for mode, other in _COMPARED:
                speed = _speed(figures, ours, job, mode) if is_jax(ours) == (mode == "jit") else None
                found = [(speed, _speed(figures, peer, job, other)) for peer in peers]
                shares = [f"{own / base:.2f}" if own and base else "" for own, base in found]
                if any(shares):
                    rows.append([ours, job, mode if mode == other else f"{mode} beside {other}", *shares])
    return rows


def page(report: ModelReport) -> str:
    """All figures, and how ours stand beside the peers' at the same job, mode by mode."""
    rows = []
    for f in report.figures:
        digits = 0 if (f.images_per_second or 0) >= 100 else 3
        speed = f"{f.images_per_second:,.{digits}f}" if f.images_per_second else f.error or "-"
        peak = f"{f.peak_gib:.2f}" if f.peak_gib else ""
        rows.append(
            [f.model, f.job, f.mode, speed, peak, f"{f.first_step_seconds:.1f}" if f.first_step_seconds else ""]
        )
    lines = ["# Whole models", "", *reports.machine_lines(report.machine)]
    lines += reports.table(["model", "job", "mode", "images / s", "peak GiB", "first step s"], rows)
    head, *compared = ratios(report.figures)
    if compared:
        lines += ["", "## Beside the peers, mode by mode", "", *reports.table(head, compared)]
    return "\n".join([*lines, "", *(f"- {note}" for note in report.notes), ""])
