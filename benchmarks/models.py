"""Whole models: NAT beside Swin and ConvNeXt of timm, images per second and peak memory.

    python3 -m benchmarks.models --out benchmarks/results

Inference runs in float16 with the weights in float16. A training step is forward under bfloat16 autocast,
cross-entropy, backward and AdamW (fused on CUDA), at the same drop path rate for every model. Figures are medians
over blocks of steps by the host's clock, the device synchronised at the ends of a block, so launch gaps count.
"eager" is the model as it stands, "compiled" torch.compile with its defaults (NAT with fullgraph=True), "graphs"
torch.compile(mode="reduce-overhead"), which replays the same kernels as CUDA graphs, so that the host launches a few
graphs and not a thousand kernels; the optimizer's step is outside of them. The ratios compare like with like: default
mode with default mode, graphs with graphs, and the best mode of each model. jax_nat's model runs in a process of its
own, under jit.

What torch compiles is compiled beforehand, every model and run in a process of its own, all at once; the figures
then come one after the other, alone on the device, the most wanted first, and each is written as it comes. "First
step" is that of the measuring process, which finds compiled code in the cache; choices that were timed while others
were at work (tuning of Triton's kernels) are forgotten in between.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median

import torch
from torch import nn

from benchmarks import report as reports
from benchmarks.model_pages import CHANNELS_LAST, JAX, ModelFigure, ModelReport, is_jax, is_ours, page

_DROP_PATH = 0.2
_COMPILED = {"compiled": None, "graphs": "reduce-overhead"}
RUNS = ("inference:compiled", "training:compiled", "training:graphs", "inference:graphs", "inference:eager")
MORE_RUNS = ("training:eager",)
_COMPILING = 0.45  # of the budget, at most


def build(name: str) -> nn.Module:
    """A torch model with random weights: torch_nat's if the name is one of NAT's, else timm's."""
    if is_ours(name):
        import torch_nat

        return torch_nat.create_model(name, drop_path_rate=_DROP_PATH)
    import timm  # type: ignore[import-not-found]

    return timm.create_model(name, drop_path_rate=_DROP_PATH)


def images_per_second(step: Callable[[], object], wait: Callable[[], None], batch: int) -> float:
    """Median over 5 blocks of about a quarter of a second each, after a warm-up."""
    for _ in range(2):
        step()
    wait()
    start = time.perf_counter()
    step()
    wait()
    count = max(1, round(0.25 / (time.perf_counter() - start)))
    blocks = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(count):
            step()
        wait()
        blocks.append((time.perf_counter() - start) / count)
    return batch / median(blocks)


class Bench:
    """The device, the batch and the time that is left."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device = torch.device(options.device)
        self.batch, self.size = options.batch, options.image_size
        self.deadline = time.monotonic() + options.budget_seconds

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def measure(self, figure: ModelFigure) -> None:
        """Fills the figure, or its error."""
        cuda = self.device.type == "cuda"
        torch.compiler.reset()
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            step = (self._inference if figure.job == "inference" else self._training)(figure.model, figure.mode)
            start = time.perf_counter()
            step()
            self.wait()
            figure.first_step_seconds = time.perf_counter() - start
            if cuda:
                torch.cuda.reset_peak_memory_stats()  # the first step also tries out algorithms
            figure.images_per_second = images_per_second(step, self.wait, self.batch)
            figure.peak_gib = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
        except Exception as error:  # noqa: BLE001 - one model that fails must not end the run
            figure.error = f"{type(error).__name__}: {error}".splitlines()[0][:160].replace("|", "/")

    def warm(self, figure: ModelFigure) -> None:
        """One step, for what it compiles."""
        (self._inference if figure.job == "inference" else self._training)(figure.model, figure.mode)()
        self.wait()

    def _model(self, name: str, dtype: torch.dtype) -> tuple[nn.Module, torch.Tensor, bool]:
        plain = name.removesuffix(CHANNELS_LAST)
        layout = torch.channels_last if plain != name else torch.contiguous_format
        model = build(plain).to(self.device, dtype, memory_format=layout)  # type: ignore[call-overload]
        images = torch.randn(self.batch, 3, self.size, self.size, device=self.device, dtype=dtype)
        return model, images.to(memory_format=layout), is_ours(plain)

    def _inference(self, name: str, mode: str) -> Callable[[], object]:
        model, images, ours = self._model(name, torch.float16)
        model.eval()
        call = model if mode == "eager" else torch.compile(model, fullgraph=ours, mode=_COMPILED[mode])

        def step() -> object:
            with torch.inference_mode():
                return call(images)

        return step

    def _training(self, name: str, mode: str) -> Callable[[], object]:
        model, images, ours = self._model(name, torch.float32)
        labels = torch.randint(0, 1000, (self.batch,), device=self.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=self.device.type == "cuda")
        call = model if mode == "eager" else torch.compile(model, fullgraph=ours, mode=_COMPILED[mode])

        def step() -> object:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(self.device.type, dtype=torch.bfloat16):
                loss = nn.functional.cross_entropy(call(images), labels)
            loss.backward()
            optimizer.step()
            return loss

        return step


def compile_ahead(figures: list[ModelFigure], options: argparse.Namespace, deadline: float) -> list[str]:
    """Steps of all figures that compile, each in a process of its own, at once. Returns what did not come in time
    or failed: that is then compiled, and its error shown, where it is measured."""
    wanted = [f for f in figures if f.mode in _COMPILED]
    threads = max(2, (os.cpu_count() or 1) // max(len(wanted), 1))
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
    running = []
    for f in wanted:
        command = [sys.executable, "-m", "benchmarks.models", "--warm", f"{f.job}:{f.mode}", "--models", f.model]
        command += ["--batch", str(options.batch), "--image-size", str(options.image_size), "--device", options.device]
        quiet = subprocess.DEVNULL
        running.append(subprocess.Popen(command, env=environment, stdout=quiet, stderr=quiet, start_new_session=True))
    late = []
    for figure, process in zip(wanted, running, strict=True):
        try:
            failed = process.wait(max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            failed = True
        late += [f"{figure.model} {figure.job} {figure.mode}"] if failed else []
    for tuned in Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).rglob("*.best_config"):
        tuned.unlink(missing_ok=True)
    return late


def measure_jax(figure: ModelFigure, options: argparse.Namespace, deadline: float) -> None:
    """jax_nat's model in a process of its own: two frameworks would fight over the memory."""
    name = figure.model.removeprefix(JAX)
    command = [sys.executable, "-m", "benchmarks.jax_model", name, str(options.batch), str(options.image_size)]
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if options.device == "cpu":
        environment["JAX_PLATFORMS"] = "cpu"
    limit = min(600.0, max(deadline - time.monotonic(), 0) + 60)
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=limit)
        found = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
    except subprocess.TimeoutExpired:
        figure.error = f"no answer within {limit:.0f} s"
        return
    if found is None:
        figure.error = (done.stderr.strip().splitlines() or ["no message"])[-1][:160].replace("|", "/")
        return
    figure.images_per_second, figure.first_step_seconds = found["images_per_second"], found["first_step_seconds"]


def main(arguments: list[str] | None = None) -> ModelReport:
    options = _parser().parse_args(arguments)
    torch.backends.cudnn.benchmark = True
    started = time.monotonic()
    bench = Bench(options)
    if options.warm:
        job, mode = options.warm.split(":")
        bench.warm(ModelFigure(options.models[0], job, mode))
        return ModelReport({})
    words = sys.argv[1:] if arguments is None else arguments
    report = ModelReport(reports.machine(reports.command_of("benchmarks.models", words), options.commit))
    figures = _figures(options)
    if options.compile_ahead:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", tempfile.mkdtemp())
        late = compile_ahead(figures, options, started + min(_COMPILING * options.budget_seconds, 600))
        report.notes += [f"{name} was not compiled ahead" for name in late]
        print(f"compiled in {time.monotonic() - started:.0f} s", flush=True)
    for figure in figures:
        if time.monotonic() > bench.deadline:
            report.notes.append(f"{figure.model} {figure.job} {figure.mode}: the time budget was spent")
            continue
        report.figures.append(figure)
        measure_jax(figure, options, bench.deadline) if is_jax(figure.model) else bench.measure(figure)
        print(f"{time.monotonic() - started:.0f} s", asdict(figure), flush=True)
        if options.out:
            reports.write(asdict(report), options.out, options.name, page(report))
    print(page(report))
    return report


def _figures(options: argparse.Namespace) -> list[ModelFigure]:
    """In the order of the runs; jax_nat's, inference alone, before CUDA graphs and eager calls."""
    figures = [
        ModelFigure(model, *run.split(":")) for run in options.runs for model in options.models if not is_jax(model)
    ]
    if any(run.startswith("inference") for run in options.runs):
        place = next((i for i, f in enumerate(figures) if f.mode != "compiled"), len(figures))
        figures[place:place] = [ModelFigure(model, "inference", "jit") for model in options.models if is_jax(model)]
    return figures


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("benchmarks.models", description=(__doc__ or "").splitlines()[0])
    models = ["nat_tiny", "swin_tiny_patch4_window7_224", "convnext_tiny", f"{JAX}nat_tiny"]
    text = f"names of torch_nat or timm; {CHANNELS_LAST} after a name sets its layout, {JAX} before it takes jax_nat's"
    parser.add_argument("--models", nargs="+", default=models, help=text)
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=[*RUNS, *MORE_RUNS])
    parser.add_argument(
        "--compile-ahead", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available(),
        help="compile in processes of their own first (with a GPU, the default)",
    )  # fmt: skip
    parser.add_argument("--warm", choices=[*RUNS, *MORE_RUNS], help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--budget-seconds", type=float, default=float("inf"), help="what is left then is skipped")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="folder for models.md and models.json")
    parser.add_argument("--name", default="models", help="name of the two files")
    parser.add_argument("--commit", help="the commit that is measured, where git cannot tell")
    return parser


if __name__ == "__main__":
    main()
