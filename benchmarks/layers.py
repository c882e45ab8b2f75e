"""Two layers of NA beside W-MSA and SW-MSA, over map sides: speed and memory, as the NAT paper compares them.

    python3 -m benchmarks.layers --out benchmarks/results

A pair of attention layers, projections and relative positional bias included, window and kernel 7, 32 channels per
head: NA + NA; W-MSA + SW-MSA as Swin writes them (roll, partition, scores in memory, mask); and the same two
windows through natcore's kernels. Every pair sees about the same number of tokens, whatever the side of its map.
Memory is the peak of one forward and backward above inputs and weights. Times are `benchmarks.timing`'s.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import report as reports
from benchmarks.peers import map_of, windows_of
from benchmarks.timing import Clock, Timing, clock_of
from natcore.problem import Window
from natcore.reference import rpb_index
from torch_nat import NeighborhoodAttention2D
from torch_nat.patterns import WindowAttention2D

WINDOW, HEAD_DIM = 7, 32
SIDES = (7, 14, 28, 56, 112, 224, 448, 896)
NA, SWIN, BLOCKED = "NA + NA", "W-MSA + SW-MSA, as Swin is written", "W-MSA + SW-MSA through natcore"
PAPER = (
    "Hassani et al. (CVPR 2023) report of their kernels: NA up to 40 % faster than Swin's attention (speed 1.40), with "
    "up to 25 % less memory (0.75)."
)


class SwinAttention(nn.Module):
    """W-MSA or SW-MSA on square maps ``[batch, side, side, dim]``, step by step as Liu et al. (ICCV 2021) compute it.

    Its parameters are those of WindowAttention2D, so that both can be given the same.
    """

    mask: Tensor | None
    index: Tensor

    def __init__(self, dim: int, num_heads: int, shift: int, side: int) -> None:
        super().__init__()
        self.num_heads, self.shift = num_heads, shift if side > WINDOW else 0
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.rpb = nn.Parameter(torch.randn(num_heads, 2 * WINDOW - 1, 2 * WINDOW - 1) * 0.02)
        size = (WINDOW, WINDOW)
        self.register_buffer("index", torch.from_numpy(rpb_index(Window.of(2, size), size)))
        self.register_buffer("mask", self._mask(side) if self.shift else None)

    def _mask(self, side: int) -> Tensor:
        """[windows, 1, tokens, tokens]: -100 between tokens that only the roll has brought together."""
        edge = torch.zeros(side)
        edge[-WINDOW : -self.shift], edge[-self.shift :] = 1, 2
        regions = windows_of((3 * edge[:, None] + edge).view(1, side, side, 1, 1), (WINDOW, WINDOW))
        return torch.where(regions == regions.transpose(-1, -2), 0.0, -100.0)

    def forward(self, x: Tensor) -> Tensor:
        spatial, size = tuple(x.shape[1:3]), (WINDOW, WINDOW)
        if self.shift:
            x = x.roll((-self.shift, -self.shift), (1, 2))
        windows = windows_of(x.unsqueeze(-2), size).squeeze(1)  # [batch * windows, tokens, dim]
        qkv = self.qkv(windows).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        scores = scores + self.rpb.flatten(1)[:, self.index]
        if self.mask is not None:
            scores = (scores.unflatten(0, (-1, len(self.mask))) + self.mask).flatten(0, 1)
        out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = map_of(self.proj(out).unsqueeze(1), size, spatial).squeeze(-2)
        return x.roll((self.shift, self.shift), (1, 2)) if self.shift else x


def pair(name: str, dim: int, side: int) -> nn.Sequential:
    """Both layers of one implementation."""
    heads, shifts = dim // HEAD_DIM, (0, WINDOW // 2)
    if name == NA:
        return nn.Sequential(*(NeighborhoodAttention2D(dim, heads, WINDOW, rel_pos_bias=True) for _ in shifts))
    if name == BLOCKED:
        return nn.Sequential(*(WindowAttention2D(dim, heads, WINDOW, shift, rel_pos_bias=True) for shift in shifts))
    return nn.Sequential(*(SwinAttention(dim, heads, shift, side) for shift in shifts))


@dataclass
class LayerFigure:
    """One implementation on one side; ``error`` in place of what failed."""

    side: int
    batch: int
    implementation: str
    forward: Timing | None = None
    both: Timing | None = None
    peak_mib: float | None = None
    error: str | None = None


@dataclass
class LayerReport:
    machine: dict[str, str]
    dtype: str
    dim: int
    figures: list[LayerFigure] = field(default_factory=list)

    def find(self, side: int, implementation: str) -> LayerFigure | None:
        return next((f for f in self.figures if (f.side, f.implementation) == (side, implementation)), None)


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The most memory that ``work`` holds at once beyond what is held already, by torch's own account."""
    work()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    held = most = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()  # type: ignore[attr-defined]
            most = max(most, held)
    return most


def measure(figure: LayerFigure, dim: int, dtype: torch.dtype, clock: Clock) -> None:
    """Fills the figure, or its error."""
    device = clock.device
    try:
        torch.manual_seed(0)
        layers = pair(figure.implementation, dim, figure.side).to(device, dtype)
        x = torch.randn(figure.batch, figure.side, figure.side, dim, device=device, dtype=dtype, requires_grad=True)
        d_out, leaves = torch.randn_like(x), [x, *layers.parameters()]

        def forward() -> Tensor:
            with torch.no_grad():
                return layers(x)

        def both() -> tuple[Tensor, ...]:
            return torch.autograd.grad(layers(x), leaves, d_out)

        figure.peak_mib = peak_bytes(both, device) / 2**20
        figure.forward, figure.both = clock.time(forward), clock.time(both)
    except (RuntimeError, ValueError, NotImplementedError) as error:  # out of memory is a RuntimeError
        figure.error = f"{type(error).__name__}: {error}".splitlines()[0][:160].replace("|", "/")


def page(report: LayerReport) -> str:
    """One table. Speed and memory are relative to Swin as it is written: above 1 is faster, below 1 is less."""
    lines = ["# Pairs of attention layers", "", *reports.machine_lines(report.machine)]
    lines += [f"{report.dtype}, {report.dim} channels, window {WINDOW}. {PAPER}", ""]
    head = ["map", "batch", "layers", "forward ms", "speed", "forward + backward ms", "speed", "peak MiB", "memory"]
    rows = []
    for figure in report.figures:
        lead = [f"{figure.side} x {figure.side}", str(figure.batch), figure.implementation]
        base = report.find(figure.side, SWIN)
        if figure.forward is None or figure.both is None or figure.peak_mib is None:
            rows.append([*lead, figure.error or "-", *[""] * 5])
            continue
        forward, both, memory = (f"{x:.4g}" for x in (figure.forward.ms, figure.both.ms, figure.peak_mib))
        relative = ["", "", ""]
        if base and base.forward and base.both and base.peak_mib:
            speeds = base.forward.ms / figure.forward.ms, base.both.ms / figure.both.ms
            relative = [f"{x:.2f}" for x in (*speeds, figure.peak_mib / base.peak_mib)]
        rows.append([*lead, forward, relative[0], both, relative[1], memory, relative[2]])
    return "\n".join([*lines, *reports.table(head, rows), ""])


def main(arguments: list[str] | None = None) -> LayerReport:
    options = _parser().parse_args(arguments)
    device = torch.device(options.device)
    cuda = device.type == "cuda"
    dtype = options.dtype or ("float16" if cuda else "float32")
    tokens = options.tokens or (128 if cuda else 4) * 56 * 56
    words = sys.argv[1:] if arguments is None else arguments
    machine = reports.machine(reports.command_of("benchmarks.layers", words), options.commit)
    report, clock = LayerReport(machine, dtype, options.dim), clock_of(device)
    for side in options.sides:
        if side % WINDOW:
            raise SystemExit(f"side {side} is not a multiple of the window, {WINDOW}.")
        for name in (SWIN, NA, BLOCKED):
            figure = LayerFigure(side, max(1, tokens // side**2), name)
            measure(figure, options.dim, getattr(torch, dtype), clock)
            report.figures.append(figure)
            if options.out:
                reports.write(asdict(report), options.out, options.name, page(report))
            gc.collect()
            if cuda:
                torch.cuda.empty_cache()
    print(page(report))
    return report


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("benchmarks.layers", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--sides", nargs="+", type=int, default=SIDES, help="of the square maps: multiples of 7")
    add("--dim", type=int, default=64, help="channels, 32 per head")
    add("--tokens", type=int, help="per call: the batch is this over the map's (401,408 on CUDA, 12,544 on the CPU)")
    add("--dtype", choices=["float32", "float16", "bfloat16"], help="float16 on CUDA, float32 on the CPU")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", type=Path, help="folder for layers.md and layers.json")
    add("--name", default="layers", help="name of the two files")
    add("--commit", help="the commit that is measured, where git cannot tell")
    return parser


if __name__ == "__main__":
    main()
