"""The attention kernels of a whole model, before its first layer runs."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from natcore.ahead import load_kernels
from natcore.models import NATConfig
from torch_nat import launch
from torch_nat.casting import autocast_dtype


def prepare(config: NATConfig, parameter: Tensor, images: Tensor) -> None:
    """Compiles and loads what a model with such parameters needs for images on a GPU, the first time it gets their
    shape. Without this, stage after stage would wait for its kernels to be compiled.
    """
    if type(images) is not Tensor or not images.is_cuda:
        return
    cast_to = autocast_dtype(images)
    dtypes = (parameter.dtype if cast_to is None else cast_to, parameter.dtype)
    trained = torch.is_grad_enabled() and parameter.requires_grad
    with_lse = trained or cast_to is not None  # the dispatcher's operations always give it
    _prepare(config, images.shape, dtypes, images.device.index, with_lse, trained)


@lru_cache(maxsize=256)
def _prepare(
    config: NATConfig,
    shape: torch.Size,
    dtypes: tuple[torch.dtype, torch.dtype],
    device_index: int,
    with_lse: bool,
    trained: bool,
) -> None:
    dtype, rpb_dtype = map(launch.name_of, dtypes)
    batch, _, height, width = shape
    problems = config.attentions(batch, height, width, dtype, rpb_dtype)
    load_kernels(problems, device_index, with_lse, trained)
