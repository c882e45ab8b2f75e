"""natcore beside its peers on the CPU, in one run.

    python -m benchmarks.cpu                     # every row, float32
    python -m benchmarks.cpu --rows nat_56 --repeats 20

Milliseconds per image, and how many times natcore's time that is. The implementations take turns, so that all of
them meet the same machine, and the least of their times counts: what disturbs a CPU only ever adds. torch and
natcore use all the cores that this process may run on. natcore computes the LSE, and has no bias here, as its peers.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.ours import bind_kernels
from benchmarks.peers import Bound, Inputs, bind_sdpa, bind_swin, differentiable
from benchmarks.shapes import Row

ROWS = (
    Row("nat_56", "nat", 8, (56, 56), 2, 32, 7, rpb=False),
    Row("nat_28", "nat", 8, (28, 28), 4, 32, 7, rpb=False),
    Row("nat_14", "nat", 8, (14, 14), 8, 32, 7, rpb=False),
    Row("nat_7", "nat", 8, (7, 7), 16, 32, 7, rpb=False),
    Row("dinat_56", "dilated", 8, (56, 56), 2, 32, 7, dilation=8, rpb=False),
    Row("large_window", "large", 1, (64, 64), 2, 64, 33, rpb=False),
)
NATCORE = "natcore"


def bind_gather(row: Row, inputs: Inputs) -> Bound:
    """NA in plain torch: every query's keys and values gathered side by side, in memory."""
    index = torch.from_numpy(row_major_keys(row))

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = (x.flatten(1, -3)[:, index] for x in (k, v))  # [batch, tokens, window, heads, d]
        scores = torch.einsum("bthd,btwhd->bthw", q.flatten(1, -3) * row.head_dim**-0.5, keys)
        return torch.einsum("bthw,btwhd->bthd", scores.softmax(-1), values).view_as(q)

    return Bound(*differentiable(attention, list(inputs[:3]), inputs.d_out), lambda x: x)


def row_major_keys(row: Row):
    """int64 [tokens, window]: the keys that each query sees."""
    from natcore.reference import window_mask

    return window_mask(row.window, row.spatial).nonzero()[1].reshape(row.tokens, -1)


def neighborhood_mask(row: Row) -> Callable[..., Tensor]:
    """FlexAttention's mask_mod of a two-dimensional row: plain arithmetic on indices, which its CPU code likes best."""
    width = row.spatial[1]

    def sees(axis: int, i: Tensor, j: Tensor) -> Tensor:
        extent, reach, dilation = row.spatial[axis], row.window.kernel_size[axis] // 2, row.window.dilation[axis]
        if dilation == 1:
            return (i.clamp(reach, extent - 1 - reach) - j).abs() <= reach
        last = (extent - i % dilation + dilation - 1) // dilation - 1 - reach
        center = torch.minimum((i // dilation).clamp(min=reach), last)
        return (i % dilation == j % dilation) & ((center - j // dilation).abs() <= reach)

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return sees(0, query // width, key // width) & sees(1, query % width, key % width)

    return mask


def bind_flex(row: Row, inputs: Inputs) -> Bound:
    """Compiled FlexAttention; on the CPU it has no backward."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch.compiler.reset()
    mask = create_block_mask(neighborhood_mask(row), None, None, row.tokens, row.tokens, device="cpu")
    compiled = torch.compile(flex_attention, dynamic=False)
    tensors = [x.flatten(1, -3).transpose(1, 2).contiguous() for x in inputs[:3]]

    def forward() -> Tensor:
        with torch.no_grad():
            return compiled(*tensors, block_mask=mask)  # type: ignore[return-value]

    return Bound(forward, lambda: (), lambda x: x.transpose(1, 2).unflatten(1, row.spatial))


def candidates(row: Row) -> Iterator[tuple[str, Callable[[Row, Inputs], Bound], bool]]:
    """Name, how to bind it, and whether it has a backward."""
    yield NATCORE, lambda row, inputs: bind_kernels(row, inputs, packed=False), True
    if all(n % k == 0 and n > k for n, k in zip(row.spatial, row.window.kernel_size, strict=True)):
        yield "Swin windows through SDPA (same bytes)", lambda row, inputs: bind_swin(row, inputs, "plain"), True
    yield "FlexAttention, compiled", bind_flex, False
    yield "full self attention (SDPA)", bind_sdpa, True
    if row.tokens * row.window.kernel_size[0] ** 2 < 1e6:
        yield "NA by gathering windows in torch", bind_gather, True


def turns(bounds: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The least time of each, in seconds; one call of each per round, after one to warm up.

    The pause lets OpenMP's threads, which go on spinning after their work, fall asleep.
    """
    best = dict.fromkeys(bounds, float("inf"))
    for round_ in range(repeats + 1):
        for name, run in bounds.items():
            time.sleep(0.02)
            start = time.perf_counter()
            run()
            if round_:
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def measure(row: Row, repeats: int) -> dict[str, dict[str, float | None]]:
    """Milliseconds per image by implementation: forward, and forward with all gradients."""
    inputs = Inputs.random(row, "float32", torch.device("cpu"))
    bound = {name: (bind(row, inputs), differentiates) for name, bind, differentiates in candidates(row)}
    expected = bound[NATCORE][0]
    for name, (other, _) in bound.items():
        if "Swin" not in name and "full" not in name:
            torch.testing.assert_close(other.heads_last(other.forward()), expected.forward(), rtol=1e-4, atol=1e-5)
    forward = turns({name: other.forward for name, (other, _) in bound.items()}, repeats)
    both = turns({name: other.both for name, (other, differentiates) in bound.items() if differentiates}, repeats)
    scale = 1e3 / row.batch
    return {
        name: {"forward": forward[name] * scale, "both": both[name] * scale if name in both else None} for name in bound
    }


def table(row: Row, figures: dict[str, dict[str, float | None]]) -> str:
    lines = [f"\n{row.name}: {row.label}", f"{'ms per image':40s} {'forward':>9s} {'':8s} {'fwd + bwd':>9s}"]
    for name, times in figures.items():
        cells = []
        for direction in ("forward", "both"):
            here, ours = times[direction], figures[NATCORE][direction]
            cells.append(f"{'-':>9s} {'':8s}" if here is None or not ours else f"{here:9.3f} {here / ours:6.1f} x")
        lines.append(f"{name:40s} " + " ".join(cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=[row.name for row in ROWS], default=[row.name for row in ROWS])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    options = parser.parse_args()
    machine = {
        "processor": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    figures = {}
    for row in ROWS:
        if row.name in options.rows:
            figures[row.name] = measure(row, options.repeats)
            print(table(row, figures[row.name]), flush=True)
    if options.out:
        partial = options.out.with_suffix(".partial")
        partial.write_text(json.dumps({"machine": machine, "ms_per_image": figures}, indent=1))
        os.replace(partial, options.out)


if __name__ == "__main__":
    main()
