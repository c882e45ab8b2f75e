"""Saving and loading NAT models: safetensors that jax_nat reads as well."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from natcore import checkpoints
from natcore.checkpoints import FilePath
from torch_nat.models import NAT, relative_position_index


def save(model: nn.Module, path: FilePath) -> None:
    """Write a NAT (compiled or not) atomically, with its config inside.

    A failed write leaves the old file. Raises ValueError where parameters do not fit the config.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    if not isinstance(model, NAT):
        raise TypeError(f"save takes a torch_nat.NAT, not {type(model).__name__}; for others use safetensors directly.")
    checkpoints.write(path, model.config, {name: _to_numpy(t) for name, t in model.state_dict().items()})


def load(path: FilePath, **changes: object) -> NAT:
    """The model of a file that `save` (or jax_nat) wrote, on the CPU, in evaluation mode.

    ``changes`` are fields of its config, for a model that goes on otherwise than it was saved: dilations
    and rates as they come; a new ``kernel_size`` resizes the bias tables (bicubic, as published).

    Raises ValueError, listing every mismatch, for a file that is truncated, altered or of another
    kind, and where parameters do not fit the changes. Parameters keep the file's dtypes.
    """
    config, _, arrays = checkpoints.read(path, **changes)
    with torch.device("meta"):
        model = NAT(config)
    model.load_state_dict({name: _to_torch(array) for name, array in arrays.items()}, strict=True, assign=True)
    return model.eval()


def published_state_dict(model: NAT) -> dict[str, Tensor]:
    """A model's state dict as its published code expects it: with a ViT-rpb's index buffers."""
    state, config = dict(model.state_dict()), model.config
    if config.layout == "vit_rpb":
        for block in range(config.depths[0]):
            name = f"{config.block_name(0, block)}.attn.relative_position_index"
            state[name] = relative_position_index(config.kernel_size)
    return state


def _to_numpy(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy()
    import ml_dtypes

    return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)


def _to_torch(array: np.ndarray) -> Tensor:
    if array.dtype.name != "bfloat16":
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
