"""One jax_nat model under jit, in this process: prints one line of JSON. `benchmarks.models` starts it.

python3 -m benchmarks.jax_model nat_tiny 128 224
"""

from __future__ import annotations

import json
import sys
import time

import jax
import jax.numpy as jnp
from flax import nnx

import jax_nat
from benchmarks.models import images_per_second


def main(name: str, batch: int, size: int) -> None:
    """float16 inference, weights in float16, images NHWC."""
    model = jax_nat.create_model(name, rngs=nnx.Rngs(0))
    model.eval()
    graph, state = nnx.split(model)
    state = jax.tree.map(lambda x: x.astype(jnp.float16) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)
    images = jax.random.normal(jax.random.key(1), (batch, size, size, 3), jnp.float16)

    @jax.jit
    def infer(state: nnx.State, images: jax.Array):
        return nnx.merge(graph, state)(images)

    last = []

    def step() -> None:
        last[:] = [infer(state, images)]

    start = time.perf_counter()
    step()
    last[0].block_until_ready()
    first = time.perf_counter() - start
    if last[0].dtype != jnp.float16:
        raise TypeError(f"the logits are {last[0].dtype}, so some of the model did not run in float16")
    speed = images_per_second(step, lambda: last[0].block_until_ready(), batch)
    print(json.dumps({"images_per_second": speed, "first_step_seconds": first}))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
