"""Arrays on the GPU between guards, whose memory may lie as strangely as is allowed; what nobody wrote is NaN."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from natcore.views import Device, View
from tests.cases import numpy_dtype

CUDA = Device("cuda", 0)
GUARD = 256  # bytes before and after every array


def view_of(tensor: Any) -> View:
    """Of a torch tensor on the GPU."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return View(tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()), dtype, CUDA)


@dataclass
class Array:
    """Device memory with guards, and a view into it."""

    memory: Any  # torch tensor of bytes, 0xFF (NaN in every float type) wherever nothing was written
    view: View
    elements: np.ndarray  # where each element lies, in bytes from the start of memory

    def get(self) -> np.ndarray:
        """The contents, after checking that the bytes around them were left alone."""
        data = self.memory.cpu().numpy()
        size = numpy_dtype(self.view.dtype).itemsize
        places = self.elements[..., None] + np.arange(size)
        outside = np.ones(data.size, bool)
        outside[places] = False
        assert (data[outside] == 0xFF).all(), "memory around the array was written"
        return data[places].view(numpy_dtype(self.view.dtype))[..., 0]


def scattered(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, values: np.ndarray | None, unit: int):
    """An array somewhere in a lake of NaN: axes in any order of memory and direction, the last one contiguous.

    ``unit``: steps and the offset are multiples of so many elements.
    """
    size, strides = numpy_dtype(dtype).itemsize, [1] * len(shape)
    step = -(-shape[-1] // unit) * unit + unit * int(rng.integers(0, 2))
    for axis in rng.permutation(len(shape) - 1):
        strides[axis] = step
        step = step * shape[axis] + unit * int(rng.integers(0, 3))
    first = 0
    for axis in range(len(shape) - 1):
        if rng.random() < 0.15:
            first += (shape[axis] - 1) * strides[axis]
            strides[axis] = -strides[axis]
    start = GUARD + (first + unit * int(rng.integers(0, 5))) * size
    return placed(shape, strides, dtype, values, start)


def placed(shape: tuple[int, ...], strides: list[int], dtype: str, values: np.ndarray | None, start: int) -> Array:
    """An array of NaN, or with ``values``, whose first element lies ``start`` bytes from the start of its memory."""
    import torch

    size = numpy_dtype(dtype).itemsize
    grid = np.indices(shape, sparse=True)
    elements = start + size * sum((i * s for i, s in zip(grid, strides, strict=True)), np.zeros(shape, np.int64))
    data = np.full(int(elements.max(initial=start)) + size + GUARD, 0xFF, np.uint8)
    if values is not None:
        data[elements[..., None] + np.arange(size)] = np.ascontiguousarray(values)[..., None].view(np.uint8)
    memory = torch.from_numpy(data).cuda()
    return Array(memory, View(memory.data_ptr() + start, shape, tuple(strides), dtype, CUDA), elements)


def packed(host: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, Array]:
    """q, k, v inside one [batch, *spatial, 3, heads, head_dim]."""
    whole = np.stack(list(host.values()), axis=-3)
    lake = scattered(rng, whole.shape, whole.dtype.name, whole, 8)
    shape, strides = lake.view.shape, lake.view.strides
    part = lake.view._replace(shape=(*shape[:-3], *shape[-2:]), strides=(*strides[:-3], *strides[-2:]))
    step = strides[-3] * whole.dtype.itemsize
    return {n: Array(lake.memory, part._replace(ptr=part.ptr + i * step), lake.elements) for i, n in enumerate(host)}


def broadcast(host: dict[str, np.ndarray], arrays: dict[str, Array], rng: np.random.Generator) -> None:
    """One input of several batch entries, all of them the first one's memory."""
    name = ("q", "k", "v", "d_out", "d_lse")[rng.integers(5)]
    host[name] = np.broadcast_to(host[name][:1], host[name].shape)
    view = arrays[name].view
    arrays[name].view = view._replace(strides=(0, *view.strides[1:]))
