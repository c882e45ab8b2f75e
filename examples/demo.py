"""The main job, end to end: train a NAT in PyTorch, run its file in JAX, draw what it does.

    python examples/demo.py

Writes model.safetensors, checkpoint.pt and picture.png to --out (runs/demo). Takes the options of
examples/train_torch.py; interrupted, it goes on where it was.
"""

from __future__ import annotations

import os
import time
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch uses the same GPU

import digits
import infer_jax
import matplotlib
import numpy as np
import torch
import train_torch

import torch_nat
from natcore import reference
from natcore.problem import Window

matplotlib.use("agg")
import matplotlib.pyplot as plt

AGREEMENT = 1e-4  # largest difference of logits, relative to the largest logit


def compare(ours: np.ndarray, theirs: np.ndarray) -> str:
    """How well PyTorch's and JAX's logits agree. Raises SystemExit where they do not."""
    difference = np.abs(ours - theirs).max() / np.abs(ours).max()
    equal = int((ours.argmax(axis=1) == theirs.argmax(axis=1)).sum())
    text = f"PyTorch and JAX name {equal} of {len(ours)} digits alike; logits differ by {difference:.1e} of the largest"
    if difference > AGREEMENT:
        raise SystemExit(f"{text}, more than {AGREEMENT:.0e}.")
    return text


@torch.no_grad()
def attention(model: torch.nn.Module, images: torch.Tensor, block: int, query: tuple[int, int]) -> np.ndarray:
    """What one query of a block of the first stage attends to in each image: [count, heads, height, width].

    The operation itself tells: with one-hot vectors for values, its output is the row of weights.
    """
    attn: Any = model.get_submodule(f"levels.0.blocks.{block}.attn")
    seen: list[torch.Tensor] = []
    hook = attn.qkv.register_forward_hook(lambda module, args, output: seen.append(output))
    model(images)
    hook.remove()
    count, height, width, channels = seen[0].shape
    heads = digits.CONFIG.num_heads[0]
    q, k, _ = seen[0].view(count, height, width, 3, heads, channels // 3 // heads).unbind(dim=3)
    one_hot = torch.eye(height * width, device=q.device).view(1, height, width, 1, -1)
    weights: Any = torch_nat.na2d(
        q, k, one_hot.expand(count, -1, -1, heads, -1).contiguous(),
        digits.CONFIG.kernel_size, dilation=digits.CONFIG.dilation(0, block), rpb=attn.rpb,
    )  # fmt: skip
    return weights[:, *query].view(count, heads, height, width).cpu().numpy()


def neighborhood(block: int, query: tuple[int, int], side: int) -> np.ndarray:
    """bool [side, side]: the keys of a query of the first stage, by the definition."""
    window = Window.of(2, digits.CONFIG.kernel_size, dilation=digits.CONFIG.dilation(0, block))
    return reference.window_mask(window, (side, side))[query[0] * side + query[1]].reshape(side, side)


def draw(trainer: train_torch.Trainer, jax_model: Any, logits: np.ndarray) -> Any:
    """Predictions in the first row; one digit's neighbourhoods, attention and saliency in the second."""
    chosen = trainer.validation_digits
    figure, axes = plt.subplots(2, 6, figsize=(13, 5), layout="constrained")
    names = logits.argmax(axis=1)
    wrong_first = np.argsort(names == chosen.labels, kind="stable")
    for axis, i in zip(axes[0], [*wrong_first[:2], *wrong_first[-4:]], strict=True):
        axis.imshow(chosen.images[i], cmap="gray_r")
        right = names[i] == chosen.labels[i]
        axis.set_title(f"{names[i]}" if right else f"{names[i]}, is {chosen.labels[i]}", color="k" if right else "r")
    shown = int(wrong_first[-1])
    image = digits.model_input(chosen.images[shown : shown + 1])
    tensor = torch.from_numpy(image)[:, None].to(trainer.device)
    query = _brightest_cell(chosen.images[shown])
    _image(axes[1, 0], image[0], "the digit and a query", query)
    for block in (0, 1):
        weights = attention(trainer.model, tensor, block, query)[0].mean(axis=0)
        keys = neighborhood(block, query, len(weights))
        dilation = digits.CONFIG.dilation(0, block)
        _image(axes[1, 1 + 2 * block], image[0], f"its keys, dilation {dilation}", query, keys)
        axes[1, 2 + 2 * block].imshow(np.where(keys, weights, np.nan), cmap="viridis")
        axes[1, 2 + 2 * block].set_title("attention")
    axes[1, 5].imshow(
        infer_jax.saliency(jax_model, chosen.images[shown : shown + 1], names[shown : shown + 1])[0], cmap="magma"
    )
    axes[1, 5].set_title(f"|d score of {names[shown]} / d pixel|")
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    return figure


def _brightest_cell(image: np.ndarray) -> tuple[int, int]:
    """The cell of the 14x14 map with the most ink."""
    cells = image.reshape(14, 2, 14, 2).sum(axis=(1, 3))
    row, column = np.unravel_index(cells.argmax(), cells.shape)
    return int(row), int(column)


def _image(axis: Any, image: np.ndarray, title: str, query: tuple[int, int], keys: np.ndarray | None = None) -> None:
    """The input, four pixels to a cell of the first map, with the query and its keys framed."""
    axis.imshow(image, cmap="gray_r")
    axis.set_title(title)
    for row, column in np.argwhere(keys) if keys is not None else ():
        axis.add_patch(plt.Rectangle((4 * column - 0.5, 4 * row - 0.5), 4, 4, fc="tab:blue", ec="w", alpha=0.45))
    axis.add_patch(plt.Rectangle((4 * query[1] - 0.5, 4 * query[0] - 0.5), 4, 4, fc="none", ec="tab:red", lw=2))


def main(arguments: list[str] | None = None) -> None:
    started = time.perf_counter()
    parser = train_torch.parser()
    parser.description = __doc__
    parser.set_defaults(out=train_torch.Path("runs/demo"))
    options = parser.parse_args(arguments)
    trainer = train_torch.train(options)
    ours = trainer.logits(trainer.validation_digits).cpu().numpy()

    jax_model = infer_jax.load(options.out / "model.safetensors")
    theirs = infer_jax.logits(jax_model, trainer.validation_digits.images)
    print(compare(ours, theirs))

    picture = options.out / "picture.png"
    draw(trainer, jax_model, theirs).savefig(picture, dpi=120)
    print(
        f"Validation accuracy {trainer.accuracies[-1]:.2%} on {len(ours)} digits. See {picture}. "
        f"That took {time.perf_counter() - started:.0f} s."
    )


if __name__ == "__main__":
    main()
