"""Digits in scenes, found two ways: UPerNet labels every pixel, Cascade Mask R-CNN boxes every digit and cuts it out.

python examples/dense.py
python examples/dense.py --task upernet

On two CPU cores UPerNet takes some minutes, Cascade Mask R-CNN a quarter of an hour; it needs torchvision.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import digits
import matplotlib
import numpy as np
import torch
from torch import Tensor, nn

from natcore.models import NATConfig
from torch_nat import NAT, dense

matplotlib.use("agg")
import matplotlib.pyplot as plt

SIDE = 128  # of a scene, in pixels
BACKBONE = NATConfig(
    embed_dim=32,
    depths=(1, 2, 2, 1),
    num_heads=(1, 2, 4, 8),
    mlp_ratio=2,
    kernel_size=5,
    dilations=((1,), (1, 3), (1, 1), (1,)),
    in_chans=1,
    features_only=True,
)
CHANNELS = 64  # of the heads
_MEAN, _STD = 0.131, 0.309  # those of the digits


class Scene(NamedTuple):
    """One image with its digits."""

    image: np.ndarray  # float32 [SIDE, SIDE], black 0 to white 1
    digits: np.ndarray  # int64 [n]: what they are
    masks: np.ndarray  # uint8 [n, SIDE, SIDE]
    boxes: np.ndarray  # float32 [n, 4]: x0, y0, x1, y1, in pixels

    def labels(self) -> np.ndarray:
        """int64 [SIDE, SIDE]: 0 is the background, 1 to 10 are the digits 0 to 9."""
        return (self.masks * (1 + self.digits)[:, None, None]).max(axis=0, initial=0)

    def target(self) -> dict[str, Tensor]:
        """As torchvision's detectors take it."""
        found = {"boxes": self.boxes, "labels": 1 + self.digits, "masks": self.masks}
        return {name: torch.from_numpy(array) for name, array in found.items()}


def scene(source: digits.Digits, rng: np.random.Generator, most: int = 8) -> Scene:
    """Up to ``most`` digits, magnified 1.5 to 1.8 times and set where they do not touch."""
    image, masks, chosen = np.zeros((SIDE, SIDE), np.float32), [], []
    for index in rng.integers(len(source.labels), size=most):
        digit = _magnified(source.images[index], rng.uniform(1.5, 1.8))
        y, x = rng.integers(0, SIDE - np.array(digit.shape) + 1)
        window = np.s_[y : y + digit.shape[0], x : x + digit.shape[1]]
        if image[window].any():
            continue
        image[window] = digit
        masks.append(np.zeros((SIDE, SIDE), np.uint8))
        masks[-1][window] = digit > 0.3
        chosen.append(source.labels[index])
    rows, columns = (np.stack([mask.any(axis=axis) for mask in masks]) for axis in (1, 0))
    edges = [side for used in (columns, rows) for side in (used.argmax(1), SIDE - used[:, ::-1].argmax(1))]
    boxes = np.stack([edges[0], edges[2], edges[1], edges[3]], axis=1).astype(np.float32)
    return Scene(image, np.array(chosen), np.stack(masks), boxes)


def _magnified(digit: np.ndarray, factor: float) -> np.ndarray:
    """Bilinear, and cut to what is not black."""
    side = round(len(digit) * factor)
    large = nn.functional.interpolate(torch.from_numpy(digit)[None, None], size=(side, side), mode="bilinear")
    large = large[0, 0].numpy()
    rows, columns = (np.flatnonzero(large.any(axis=axis)) for axis in (1, 0))
    return large[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def make(task: dense.Task, **options: object) -> nn.Module:
    """A small model for the scenes; ``options`` are those of a detector."""
    if task == "upernet":
        return dense.upernet(NAT(BACKBONE), num_classes=11, channels=CHANNELS)
    build = dense.mask_rcnn if task == "mask_rcnn" else dense.cascade_mask_rcnn
    small = {
        "min_size": SIDE,
        "max_size": SIDE,
        "image_mean": [_MEAN],
        "image_std": [_STD],
        "box_batch_size_per_image": 64,
    }
    return build(NAT(BACKBONE), num_classes=10, channels=CHANNELS, **(small | options))


def possible() -> tuple[dense.Task, ...]:
    """Segmentation, and detection where there is torchvision."""
    try:
        _ = dense.cascade_mask_rcnn
    except ImportError as error:
        print(f"Cascade Mask R-CNN is left out. {error}")
        return ("upernet",)
    return "upernet", "cascade_mask_rcnn"


def losses(model: nn.Module, scenes: list[Scene]) -> dict[str, Tensor]:
    """What a model has to make small.

    Most pixels are black, and for long UPerNet would learn nothing else: it learns from one in twenty of these.
    """
    if isinstance(model, dense.UPerNet):
        labels = torch.from_numpy(np.stack([s.labels() for s in scenes]))
        return model(_input(scenes), labels.masked_fill((labels == 0) & (torch.rand(labels.shape) > 0.05), 255))
    return model([torch.from_numpy(s.image)[None] for s in scenes], [s.target() for s in scenes])


def predict(model: nn.Module, scenes: list[Scene]) -> list:
    """Per scene: labels [SIDE, SIDE] from UPerNet; a dict of boxes, labels, scores and masks from a detector."""
    model.eval()
    with torch.no_grad():
        if isinstance(model, dense.UPerNet):
            return list(model(_input(scenes)).argmax(dim=1).numpy())
        return model([torch.from_numpy(s.image)[None] for s in scenes])


def _input(scenes: list[Scene]) -> Tensor:
    return (torch.from_numpy(np.stack([s.image for s in scenes]))[:, None] - _MEAN) / _STD


def train(model: nn.Module, batches: Sequence[list[Scene]], rate: float = 1e-3) -> list[float]:
    """One step of AdamW for every batch, with warm-up and a cosine; the sums of losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=len(batches) + 1, pct_start=0.1)
    history = []
    model.train()
    for step, batch in enumerate(batches):
        loss = torch.stack(list(losses(model, batch).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        scheduler.step()
        history.append(loss.item())
        if step % 50 == 0:
            print(f"step {step:5} loss {loss.item():.3f}", flush=True)
    return history


def mean_iou(found: list[np.ndarray], scenes: list[Scene]) -> float:
    """Intersection over union of the labelled pixels of all scenes, averaged over the classes that occur."""
    truth, guess = np.stack([s.labels() for s in scenes]), np.stack(found)
    overlaps = [((truth == c) & (guess == c)).sum() / ((truth == c) | (guess == c)).sum() for c in np.unique(truth)]
    return float(np.mean(overlaps))


def f1(found: list[dict[str, Tensor]], scenes: list[Scene], iou: float = 0.5, score: float = 0.5) -> float:
    """F1 of detections: right are those whose mask overlaps one of the same digit's, not yet taken, by ``iou``."""
    right = wrong = 0
    for detections, truth in zip(found, scenes, strict=True):
        left = list(range(len(truth.digits)))
        for digit, mask in _confident(detections, score):
            overlaps = {i: (mask & (truth.masks[i] > 0)).sum() / (mask | (truth.masks[i] > 0)).sum() for i in left}
            best = max(overlaps, key=overlaps.__getitem__, default=None)
            if best is not None and overlaps[best] >= iou and truth.digits[best] == digit:
                left.remove(best)
                right += 1
            else:
                wrong += 1
        wrong += len(left)
    return 2 * right / (2 * right + wrong)


def _confident(found: dict[str, Tensor], score: float) -> list[tuple[int, np.ndarray]]:
    """Digits and their masks, bool [SIDE, SIDE], of detections with the score or more."""
    keep = found["scores"] >= score
    masks = (found["masks"][keep, 0] >= 0.5).numpy()
    return [(int(label) - 1, mask) for label, mask in zip(found["labels"][keep], masks, strict=True)]


def draw(scenes: list[Scene], results: dict[str, list], path: Path) -> None:
    """A column for each scene: the image, and a row for each model."""
    size = (2.2 * len(scenes), 2.3 * (1 + len(results)))
    figure, axes = plt.subplots(1 + len(results), len(scenes), figsize=size, squeeze=False, layout="constrained")
    colours = plt.get_cmap("tab10")
    for row, (name, found) in enumerate({"scene": [None] * len(scenes), **results}.items()):
        axes[row, 0].set_ylabel(name)
        for axis, shown, result in zip(axes[row], scenes, found, strict=True):
            axis.imshow(shown.image, cmap="gray", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
            if isinstance(result, dict):
                _draw_objects(axis, result, colours)
            elif result is not None:
                painted = np.ma.masked_equal(result, 0) - 1
                axis.imshow(painted, cmap=colours, vmin=-0.5, vmax=9.5, interpolation="nearest")
    handles = [plt.Line2D([], [], marker="s", ls="", color=colours(d), label=str(d)) for d in range(10)]
    figure.legend(handles=handles, ncols=min(10, 2 * len(scenes)), loc="outside lower center", frameon=False)
    figure.savefig(path, dpi=120)


def _draw_objects(axis: plt.Axes, found: dict[str, Tensor], colours: plt.Colormap) -> None:  # type: ignore[name-defined]
    keep = found["scores"] >= 0.5
    for (digit, mask), box, score in zip(
        _confident(found, 0.5), found["boxes"][keep], found["scores"][keep], strict=True
    ):
        x0, y0, x1, y1 = box.tolist()
        axis.imshow(np.ma.masked_equal(np.where(mask, digit, -1), -1), cmap=colours, vmin=-0.5, vmax=9.5, alpha=0.8)
        axis.add_patch(plt.Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, ec=colours(digit)))
        axis.text(x0, y0 - 2, f"{digit} {score:.2f}", color=colours(digit), fontsize=7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=("upernet", "mask_rcnn", "cascade_mask_rcnn"))
    parser.add_argument("--steps", type=int, default=500, help="of training, for each model")
    parser.add_argument("--batch", type=int, default=6, help="scenes in a step")
    parser.add_argument("--validation", type=int, default=50, help="scenes to evaluate on")
    parser.add_argument("--out", type=Path, default=Path("runs/dense"), help="where the picture goes")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    models = {task: make(task) for task in options.task or possible()}
    training, unseen = digits.load()
    rng = np.random.default_rng(0)
    held_out = [scene(unseen, np.random.default_rng((1, index))) for index in range(options.validation)]
    results: dict[str, list] = {}
    for task, model in models.items():
        train(model, [[scene(training, rng) for _ in range(options.batch)] for _ in range(options.steps)])
        results[task] = predict(model, held_out)
        measure = "mean IoU" if task == "upernet" else "F1 of masks"
        value = (mean_iou if task == "upernet" else f1)(results[task], held_out)
        print(f"{task}: {measure} {value:.3f} on {len(held_out)} scenes of unseen digits")
    picture = options.out / "dense.png"
    draw(held_out[:6], {task: found[:6] for task, found in results.items()}, picture)
    print(picture)


if __name__ == "__main__":
    main()
