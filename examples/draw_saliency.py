"""Which pixels a model's answer depends on: plain and smoothed input gradients of some digits, drawn.

python examples/draw_saliency.py runs/demo/model.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path

import digits
import matplotlib
import numpy as np
import torch

import torch_nat
from torch_nat.saliency import saliency_map, smoothed_gradients

matplotlib.use("agg")
import matplotlib.pyplot as plt


def maps(model: torch.nn.Module, images: np.ndarray, samples: int, noise: float = 0.15) -> np.ndarray:
    """[count, 28, 28] -> [count, 56, 56], from 0 to 1: what the model's own answer to each digit depends on."""
    inputs = torch.from_numpy(digits.model_input(images))[:, None]
    generator = torch.Generator().manual_seed(0)
    return saliency_map(smoothed_gradients(model, inputs, samples=samples, noise=noise, generator=generator)).numpy()


def draw(images: np.ndarray, rows: dict[str, np.ndarray]) -> plt.Figure:  # type: ignore[name-defined]
    """The digits in the first row, and a row of their maps for each name."""
    count = len(images)
    size = (1.3 * count + 1, 1.4 * (len(rows) + 1))
    figure, axes = plt.subplots(len(rows) + 1, count, figsize=size, squeeze=False, layout="constrained")
    for row, (name, shown) in enumerate({"digit": images, **rows}.items()):
        axes[row, 0].set_ylabel(name)
        for axis, image in zip(axes[row], shown, strict=True):
            axis.imshow(image, cmap="magma" if row else "gray_r")
            axis.set_xticks([])
            axis.set_yticks([])
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a model.safetensors that examples/train_torch.py wrote")
    parser.add_argument("--out", type=Path, help="the picture (saliency.png beside the model)")
    parser.add_argument("--count", type=int, default=8, help="how many digits")
    parser.add_argument("--samples", type=int, default=32, help="noisy copies of each digit")
    options = parser.parse_args()
    model = torch_nat.load(options.model)
    images = digits.load(0, options.count)[1].images
    rows = {"gradient": maps(model, images, 1, noise=0), "smoothed": maps(model, images, options.samples)}
    picture = options.out or options.model.with_name("saliency.png")
    draw(images, rows).savefig(picture, dpi=120)
    print(f"{picture}: plain gradients, and their means over {options.samples} noisy copies")


if __name__ == "__main__":
    main()
