"""Run a model file in JAX: name the validation digits, and ask which pixels matter.

python examples/infer_jax.py runs/digits/model.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path

import digits
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

import jax_nat


def load(path: Path) -> jax_nat.NAT:
    """The model that examples/train_torch.py saved, ready for inference."""
    model = jax_nat.load(path)
    model.eval()  # no drop path
    return model


@nnx.jit
def _logits(model: jax_nat.NAT, images: ArrayLike) -> jax.Array:
    return jnp.asarray(model(jnp.asarray(images)))


@nnx.jit
def _score_gradient(model: jax_nat.NAT, images: ArrayLike, classes: ArrayLike) -> jax.Array:
    def score(x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(jnp.asarray(model(x)), jnp.asarray(classes)[:, None], axis=1).sum()

    return jax.grad(score)(jnp.asarray(images))


def logits(model: jax_nat.NAT, images: np.ndarray, batch: int = 250) -> np.ndarray:
    """[count, 28, 28] -> [count, 10], in full float32."""
    inputs = digits.model_input(images)[..., None]  # [count, 56, 56, 1]
    with jax.default_matmul_precision("highest"):
        return np.concatenate([_logits(model, inputs[i : i + batch]) for i in range(0, len(inputs), batch)])


def saliency(model: jax_nat.NAT, images: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """|d logit of the class / d pixel|, [count, 56, 56]: how much each input pixel matters to the score."""
    inputs = digits.model_input(images)[..., None]
    return np.abs(_score_gradient(model, inputs, classes)[..., 0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a model.safetensors that examples/train_torch.py wrote")
    parser.add_argument("--validation", type=int, default=1000, help="how many validation digits")
    options = parser.parse_args()
    _, validation = digits.load(0, options.validation)
    model = load(options.model)
    named = logits(model, validation.images).argmax(axis=1)
    print(f"JAX on {jax.devices()[0].platform}: accuracy {(named == validation.labels).mean():.2%}")
    worth = saliency(model, validation.images[:1], validation.labels[:1])[0]
    row, column = np.unravel_index(worth.argmax(), worth.shape)
    print(f"The score of the first digit, a {validation.labels[0]}, depends most on pixel ({row}, {column}).")


if __name__ == "__main__":
    main()
