"""Neighborhood attention on raw arrays: NumPy on the CPU, and torch or CuPy on a GPU, if there is one.

python examples/raw_arrays.py
"""

from __future__ import annotations

import argparse
from types import ModuleType
from typing import Any

import numpy as np

import natcore
from natcore import reference


def attend(q: Any, k: Any, v: Any, rpb: Any) -> tuple[Any, natcore.Gradients]:
    """One dilated 2-D call and its gradients; any kind of array in, the same kind out."""
    window = {"kernel_size": 5, "dilation": 2}
    out, lse = natcore.na2d(q, k, v, **window, rpb=rpb, return_lse=True)
    # The gradients of sum(out * out) / 2, whose derivative with respect to out is out.
    return out, natcore.na2d_backward(out, q, k, v, out, lse, **window, rpb=rpb)


def inputs(size: int, heads: int = 2, head_dim: int = 32) -> tuple[np.ndarray, ...]:
    """q, k, v [1, size, size, heads, head_dim] and a bias table [heads, 9, 9]."""
    rng = np.random.default_rng(0)
    shapes = 3 * [(1, size, size, heads, head_dim)] + [(heads, 9, 9)]
    return tuple(rng.standard_normal(shape, dtype=np.float32) for shape in shapes)


def gpu_arrays() -> tuple[ModuleType, Any] | None:
    """A framework that sees a GPU, and its function that copies a NumPy array there."""
    try:
        import torch

        if torch.cuda.is_available():
            return torch, lambda array: torch.from_numpy(array).cuda()
    except ImportError:
        pass
    try:
        import cupy  # pyright: ignore[reportMissingImports]

        if cupy.cuda.runtime.getDeviceCount():
            return cupy, cupy.asarray
    except (ImportError, RuntimeError):  # CuPy raises the latter where there is no driver
        pass
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=28, help="the map is size x size, at least 10 x 10")
    arrays = inputs(parser.parse_args().size)

    out, gradients = attend(*arrays)
    print(f"NumPy: out {out.shape} {out.dtype}, dq {gradients.dq.shape}, drpb {gradients.drpb.shape}")
    q, k, v, rpb = arrays
    exact, _ = reference.forward(q, k, v, natcore.Window.of(2, 5, dilation=2), rpb=rpb)
    print(f"  largest difference from the dense float64 definition: {np.abs(out - exact).max():.1e}")

    found = gpu_arrays()
    if found is None:
        print("No GPU that torch or CuPy can use: the CPU part is all.")
        return
    framework, to_gpu = found
    on_gpu, _ = attend(*map(to_gpu, arrays))
    difference = np.abs(np.asarray(on_gpu.cpu() if framework.__name__ == "torch" else on_gpu.get()) - out).max()
    print(f"{framework.__name__} on {on_gpu.device}: largest difference from the CPU {difference:.1e}")


if __name__ == "__main__":
    main()
