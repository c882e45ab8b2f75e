"""What the host pays: imports, repeated calls, the first forward of a model.

    python3 -m benchmarks.latency --out benchmarks/results

Calls are timed back to back on a problem so small that the device keeps up; on the CPU the kernel's own time is part
of every call, so the bare executable stands beside them. The first forward of NAT-Tiny runs in fresh processes, the
first on an empty cache folder, the second on what the first left there; the framework and the device are warm by
then (a convolution, a product and a normalisation have run).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import torch

from benchmarks import report as reports
from benchmarks.ours import bind_kernels
from benchmarks.peers import Inputs
from benchmarks.shapes import Row

_SMALL = {
    "cuda": Row("small", "latency", 1, (14, 14), 2, 32, 7),
    "cpu": Row("small", "latency", 1, (4, 4), 1, 8, 3),
}
_IMPORTS = {
    "natcore": "",
    "natcore, numpy already imported": "import numpy",
    "torch_nat, torch already imported": "import torch",
    "jax_nat, jax and flax already imported": "import jax, flax.nnx",
}


@dataclass
class LatencyReport:
    """Rows of (what, figure, unit)."""

    machine: dict[str, str]
    rows: list[tuple[str, float | str, str]] = field(default_factory=list)


def import_seconds(module: str, before: str, runs: int = 3) -> float:
    """The fastest of some fresh processes, the files in the page cache."""
    code = f"{before}\nimport time\nstart = time.perf_counter()\nimport {module}\nprint(time.perf_counter() - start)"
    return min(float(_python("-c", code)) for _ in range(runs))


def _python(*arguments: str, **environment: str) -> str:
    """Last line printed by a fresh interpreter. Raises RuntimeError with the last line of its errors."""
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env={**os.environ, **environment}, timeout=600
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
    return done.stdout.strip().splitlines()[-1]


def microseconds(call: Callable[[], object], wait: Callable[[], None], calls: int = 200, blocks: int = 15) -> float:
    """Host time of one call: the median over blocks of calls, the device idle at the start of each."""
    samples = []
    for _ in range(blocks + 1):
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        samples.append((time.perf_counter() - start) / calls)
    return 1e6 * median(samples[1:])


def repeated_calls(device: torch.device) -> dict[str, float]:
    """Microseconds of the host for each way to call one small problem again."""
    import natcore
    import torch_nat

    row = _SMALL[device.type]
    inputs, kernel = Inputs.random(row, "float32" if device.type == "cpu" else "float16", device), row.kernel_size
    q, k, v, d_out, rpb = inputs
    assert rpb is not None  # the row has a bias
    leaves = [x.clone().requires_grad_() for x in (q, k, v, rpb)]

    def trained() -> object:
        q, k, v, rpb = leaves
        out = torch_nat.na2d(q, k, v, kernel, rpb=rpb)
        return torch.autograd.grad(out, leaves, d_out)

    with torch.no_grad():
        calls = {
            "bare executable": bind_kernels(row, inputs, packed=False).forward,
            "torch add": lambda: q + k,
            "natcore.na2d": lambda: natcore.na2d(q, k, v, kernel, rpb=rpb),
            "torch_nat.na2d, no grad": lambda: torch_nat.na2d(q, k, v, kernel, rpb=rpb),
        }
        wait = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
        found = {name: microseconds(call, wait) for name, call in calls.items()}
    return found | {"torch_nat.na2d, forward and backward": microseconds(trained, wait, calls=50)}


def first_forward(device_type: str, batch: int, size: int) -> None:
    """Prints seconds of the first forward of NAT-Tiny in this process, framework and device warm."""
    import torch_nat

    device = torch.device(device_type)
    dtype = torch.float16 if device_type == "cuda" else torch.float32
    wait = (lambda: torch.cuda.synchronize(device)) if device_type == "cuda" else (lambda: None)
    with torch.inference_mode():
        images = torch.randn(batch, 3, size, size, device=device, dtype=dtype)
        x = torch.nn.Conv2d(3, 32, 3, 2, 1, device=device, dtype=dtype)(images).permute(0, 2, 3, 1)
        x = torch.nn.functional.gelu(torch.nn.functional.layer_norm(x, (32,)) @ x.new_ones(32, 32))
        model = torch_nat.create_model("nat_tiny").to(device, dtype).eval()
        wait()
        start = time.perf_counter()
        model(images)
        wait()
    print(time.perf_counter() - start)


def first_forwards(device: torch.device) -> dict[str, float]:
    """Seconds on an empty cache folder, then on a filled one."""
    batch, size = (128, 224) if device.type == "cuda" else (1, 224)
    code = f"from benchmarks.latency import first_forward; first_forward({device.type!r}, {batch}, {size})"
    with tempfile.TemporaryDirectory() as folder:
        environment = {"NATCORE_CACHE_DIR": folder, "CUDA_CACHE_DISABLE": "1"}
        return {state: float(_python("-c", code, **environment)) for state in ("cold cache", "warm cache")}


def page(report: LatencyReport) -> str:
    cells = [
        [what, f"{figure:.4g}" if isinstance(figure, float) else figure, unit] for what, figure, unit in report.rows
    ]
    lines = ["# What the host pays", "", *reports.machine_lines(report.machine)]
    return "\n".join([*lines, *reports.table(["what", "figure", "unit"], cells), ""])


def main(arguments: list[str] | None = None) -> LatencyReport:
    parser = argparse.ArgumentParser("benchmarks.latency", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="folder for latency.md and latency.json")
    parser.add_argument("--name", default="latency", help="name of the two files")
    parser.add_argument("--commit", help="the commit that is measured, where git cannot tell")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    words = sys.argv[1:] if arguments is None else arguments
    report = LatencyReport(reports.machine(reports.command_of("benchmarks.latency", words), options.commit))
    parts: list[tuple[str, str, Callable[[], dict[str, float]]]] = [
        ("import", "s", lambda: {name: import_seconds(name.split(",")[0], b) for name, b in _IMPORTS.items()}),
        ("repeated call", "us", lambda: repeated_calls(device)),
        ("first forward of NAT-Tiny", "s", lambda: first_forwards(device)),
    ]
    for part, unit, measure in parts:
        try:
            report.rows += [(f"{part}: {name}", figure, unit) for name, figure in measure().items()]
        except Exception as error:  # noqa: BLE001 - one part that fails must not hide the others
            report.rows.append((part, f"{type(error).__name__}: {error}".splitlines()[0][:160].replace("|", "/"), ""))
        if options.out:  # each part as it comes
            reports.write(asdict(report), options.out, options.name, page(report))
    print(page(report))
    return report


if __name__ == "__main__":
    main()
