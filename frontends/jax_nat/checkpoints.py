"""Saving and loading NAT models: the same files as torch_nat's, in torch's names and layouts."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_nat.models import NAT
from natcore import checkpoints
from natcore.checkpoints import FilePath


def save(model: NAT, path: FilePath) -> None:
    """Write a NAT atomically, with its config inside.

    A failed write leaves the old file. Raises ValueError where parameters do not fit the config.
    """
    if not isinstance(model, NAT):
        raise TypeError(f"save takes a jax_nat.NAT, not {type(model).__name__}; for others use safetensors directly.")
    parameters = nnx.to_flat_state(nnx.state(model, nnx.Param))
    arrays = {_name(place): _to_torch(np.asarray(parameter[...])) for place, parameter in parameters}
    checkpoints.write(path, model.config, arrays)


def load(path: FilePath, *, dtype: Any = None, rngs: nnx.Rngs | None = None, **changes: object) -> NAT:
    """The model of a file that `save` or torch_nat wrote, in evaluation mode.

    Parameters keep the file's dtypes (float64 only where JAX has it enabled); ``dtype`` is that of the
    computation. ``rngs``, by default ``nnx.Rngs(0)``, seeds drop path and dropout, should training go on.
    ``changes`` are fields of its config: dilations and rates as they come; a new ``kernel_size`` resizes
    the bias tables (bicubic, as published).

    Raises ValueError, listing every mismatch, for a file that is truncated, altered or of another kind, and
    where parameters do not fit the changes.
    """
    config, _, arrays = checkpoints.read(path, **changes)
    rngs = nnx.Rngs(0) if rngs is None else rngs
    abstract = nnx.eval_shape(lambda: NAT(config, dtype=dtype, rngs=nnx.Rngs(0)))
    graph, _, rest = nnx.split(abstract, nnx.Param, ...)
    parameters = [
        (_place(name, array.ndim), nnx.Param(jnp.asarray(_from_torch(array)))) for name, array in arrays.items()
    ]
    model = nnx.merge(graph, nnx.from_flat_state(parameters), rest)
    for _, module in nnx.iter_graph(model):
        if isinstance(module, nnx.Dropout) and module.rate:
            module.rngs = rngs.dropout.fork()  # it was abstract
    model.eval()
    return model


def _name(place: tuple[Any, ...]) -> str:
    """The published name of the parameter at a place in the model."""
    *path, last = map(str, place)
    return ".".join([*path, "weight" if last in ("kernel", "scale") else last])


def _place(name: str, rank: int) -> tuple[Any, ...]:
    """The inverse of `_name`: a weight of rank 1 is a norm's."""
    *path, last = (int(part) if part.isdigit() else part for part in name.split("."))
    return (*path, ("scale" if rank == 1 else "kernel") if last == "weight" else last)


def _to_torch(array: np.ndarray) -> np.ndarray:
    """Linear [in, out] -> [out, in]; convolution [height, width, in, out] -> [out, in, height, width]."""
    return array.transpose(*_AXES_TO_TORCH.get(array.ndim, range(array.ndim)))


def _from_torch(array: np.ndarray) -> np.ndarray:
    return array.transpose(*_AXES_FROM_TORCH.get(array.ndim, range(array.ndim)))


#: By rank; vectors and bias tables (rank 1 and 3) are the same in both.
_AXES_TO_TORCH = {2: (1, 0), 4: (3, 2, 0, 1)}
_AXES_FROM_TORCH = {2: (1, 0), 4: (2, 3, 1, 0)}
