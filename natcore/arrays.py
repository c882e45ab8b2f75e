"""The kinds of array that come and go through the public door: how each is read and made.

Frameworks are looked up in ``sys.modules`` and never imported: whoever hands us a torch tensor has
imported torch. `Borrowed` carries what must stay alive during the call.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np

from natcore import dlpack
from natcore.views import ITEM_SIZES, Device, View


class Borrowed(NamedTuple):
    """An array being read or written during one call."""

    ptr: int
    described: View  # its ptr is 0, so that it serves as a cache key
    read_only: bool
    keep: Any  # keeps the memory alive


class Kind(Protocol):
    """One library's arrays."""

    def device(self, name: str, array: Any) -> Device: ...

    def read(self, name: str, array: Any, stream: int | None) -> Borrowed:
        """``stream`` is where the work will run, None on the CPU; the producer's pending work on
        another stream is waited for."""
        ...

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any, device: Device, stream: int | None) -> Any:
        """Uninitialised row-major memory on ``like``'s device, for use on ``stream``."""
        ...

    def address(self, fresh: Any) -> int:
        """Where an array made by `empty` lies."""
        ...

    def namespace(self, like: Any) -> Any:
        """The module that has the library's functions."""
        ...

    def current_stream(self, device: Device) -> int: ...

    def finish(self, device: Device, stream: int | None) -> None:
        """Called after the work was enqueued, before results are handed out."""
        ...


class _DLPackKind:
    """What all producers share. Subclasses say how their arrays are made."""

    library: str

    def device(self, name: str, array: Any) -> Device:
        return dlpack.device_of(name, array)

    def read(self, name: str, array: Any, stream: int | None) -> Borrowed:
        if getattr(array, "requires_grad", False) is True:
            raise ValueError(
                f"{name} requires grad, and natcore on raw arrays records no gradients: call torch_nat "
                f"instead, or pass {name}.detach()."
            )
        # DLPack numbers CUDA's legacy default stream 1; its 0 is ambiguous and forbidden.
        capsule = dlpack.export(array, 1 if stream == 0 else stream)
        view, read_only = dlpack.view(capsule, self.device(name, array))
        return Borrowed(view.ptr, view._replace(ptr=0), read_only, capsule)

    def current_stream(self, device: Device) -> int:
        raise NotImplementedError(
            f"the current CUDA stream of {self.library} is not known to natcore: pass stream= (an int or an "
            "object with __cuda_stream__). It is known for torch and CuPy; JAX needs none."
        )

    def finish(self, device: Device, stream: int | None) -> None:
        return None


class NumPyKind(_DLPackKind):
    library = "numpy"

    def device(self, name: str, array: Any) -> Device:
        return Device("cpu")

    def read(self, name: str, array: np.ndarray, stream: int | None) -> Borrowed:
        address, read_only = array.__array_interface__["data"]
        return Borrowed(address, _describe_numpy(name, array.shape, array.strides, array.dtype), read_only, array)

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any, device: Device, stream: int | None) -> np.ndarray:
        return np.empty(shape, like.dtype if like.dtype.name == dtype else np.dtype(dtype))

    def namespace(self, like: np.ndarray) -> Any:
        return np

    def address(self, fresh: np.ndarray) -> int:
        return fresh.__array_interface__["data"][0]


@lru_cache(maxsize=4096)
def _describe_numpy(name: str, shape: tuple[int, ...], strides: tuple[int, ...], dtype: np.dtype) -> View:
    if not dtype.isnative:
        raise ValueError(f"{name} has byte order {dtype.str}; natcore reads native order: use {name}.astype(...).")
    if any(stride % dtype.itemsize for stride in strides):
        raise ValueError(f"{name} has strides of {strides} bytes, not multiples of its {dtype.itemsize}-byte items.")
    return View(0, shape, tuple(stride // dtype.itemsize for stride in strides), dtype.name, Device("cpu"))


class TorchKind(_DLPackKind):
    library = "torch"

    def __init__(self, torch: Any):
        self._torch = torch
        self._dtypes = {name: getattr(torch, name) for name in ITEM_SIZES}
        self._current_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # absent from CPU builds

    def device(self, name: str, array: Any) -> Device:
        return _torch_device(name, array.device)

    def read(self, name: str, array: Any, stream: int | None) -> Borrowed:
        described = _describe_torch(name, array.shape, array.stride(), array.dtype, array.device)
        foreign = stream is not None and stream != self._current_stream(described.device.index)
        if foreign or array.requires_grad or array.is_neg():
            return super().read(name, array, stream)  # synchronises, refuses or resolves
        return Borrowed(array.data_ptr(), described, False, array)

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any, device: Device, stream: int | None) -> Any:
        if stream is None or stream == self._current_stream(device.index):
            return self._torch.empty(shape, dtype=self._dtypes[dtype], device=like.device)
        with self._torch.cuda.stream(self._torch.cuda.ExternalStream(stream, device.index)):
            return self._torch.empty(shape, dtype=self._dtypes[dtype], device=like.device)

    def namespace(self, like: Any) -> Any:
        return self._torch

    def address(self, fresh: Any) -> int:
        return fresh.data_ptr()

    def current_stream(self, device: Device) -> int:
        return self._current_stream(device.index)


@lru_cache(maxsize=256)
def _torch_device(name: str, device: Any) -> Device:
    if device.type not in ("cpu", "cuda"):
        raise NotImplementedError(f"{name} is on {device}; natcore runs on cpu and cuda.")
    return Device(device.type, device.index or 0)


@lru_cache(maxsize=4096)
def _describe_torch(name: str, shape: Any, strides: tuple[int, ...], dtype: Any, device: Any) -> View:
    return View(0, tuple(shape), strides, str(dtype).removeprefix("torch."), _torch_device(name, device))


class CuPyKind(_DLPackKind):
    library = "cupy"

    def __init__(self, cupy: Any):
        self._cupy = cupy

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any, device: Device, stream: int | None) -> Any:
        cuda = self._cupy.cuda
        current = stream is None or stream == self.current_stream(device)
        with cuda.Device(device.index), nullcontext() if current else cuda.ExternalStream(stream, device.index):
            return self._cupy.empty(shape, like.dtype if like.dtype.name == dtype else dtype)

    def namespace(self, like: Any) -> Any:
        return self._cupy

    def address(self, fresh: Any) -> int:
        return fresh.data.ptr

    def current_stream(self, device: Device) -> int:
        with self._cupy.cuda.Device(device.index):
            return self._cupy.cuda.get_current_stream().ptr


class JaxKind(_DLPackKind):
    """Concrete jax.Arrays. JAX has no public current stream: the work runs on a stream of natcore's
    own, JAX waits on it for its inputs, and results are complete before JAX sees them."""

    library = "jax"

    def __init__(self, jax: Any):
        self._jax = jax

    def device(self, name: str, array: Any) -> Device:
        if isinstance(array, self._jax.core.Tracer):
            raise TypeError(f"{name} is traced by JAX; under jit, grad or vmap call jax_nat instead of natcore.")
        return super().device(name, array)

    def read(self, name: str, array: Any, stream: int | None) -> Borrowed:
        borrowed = super().read(name, array, stream)
        return borrowed._replace(read_only=True)

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any, device: Device, stream: int | None) -> Any:
        fresh = self._jax.numpy.empty(shape, dtype, device=next(iter(like.devices())))
        return fresh.block_until_ready()

    def namespace(self, like: Any) -> Any:
        return self._jax.numpy

    def address(self, fresh: Any) -> int:
        return fresh.unsafe_buffer_pointer()

    def current_stream(self, device: Device) -> int:
        from natcore import device as gpu

        return gpu.own_stream(device.index)

    def finish(self, device: Device, stream: int | None) -> None:
        if stream is not None:
            from natcore import device as gpu

            gpu.synchronize(device.index, stream)


class ArrayApiKind(_DLPackKind):
    """Any other producer whose namespace follows the Python array API standard."""

    library = "this array library"

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any, device: Device, stream: int | None) -> Any:
        xp = like.__array_namespace__()
        return xp.empty(shape, dtype=getattr(xp, dtype), device=like.device)

    def namespace(self, like: Any) -> Any:
        return like.__array_namespace__()

    def address(self, fresh: Any) -> int:
        return dlpack.view(dlpack.export(fresh, None), Device("cpu"))[0].ptr


_ADAPTERS = (("torch", "Tensor", TorchKind), ("cupy", "ndarray", CuPyKind), ("jax", "Array", JaxKind))
_kinds: dict[type, Kind] = {np.ndarray: NumPyKind()}


def kind_of(name: str, array: Any) -> Kind:
    """The adapter for an array. Raises TypeError for what is no array."""
    kind = _kinds.get(type(array))
    return kind if kind is not None else _kinds.setdefault(type(array), _find_kind(name, array))


def _find_kind(name: str, array: Any) -> Kind:
    if isinstance(array, np.ndarray):
        return _kinds[np.ndarray]
    for library, class_name, adapter in _ADAPTERS:
        module = sys.modules.get(library)
        if module is not None and isinstance(array, getattr(module, class_name, ())):
            return adapter(module)
    if hasattr(array, "__dlpack__") and hasattr(array, "__array_namespace__"):
        return ArrayApiKind()
    raise TypeError(
        f"{name} is a {type(array).__module__}.{type(array).__qualname__}; natcore takes NumPy arrays, and torch, "
        "CuPy, JAX or array-API arrays that have __dlpack__."
    )


def stream_handle(stream: Any) -> int:
    """A raw CUstream from an int, torch's or CuPy's stream, or any ``__cuda_stream__`` object."""
    if isinstance(stream, int):
        return stream
    if hasattr(stream, "__cuda_stream__"):
        return int(stream.__cuda_stream__()[1])
    for attribute in ("cuda_stream", "ptr"):  # torch, CuPy
        if hasattr(stream, attribute):
            return int(getattr(stream, attribute))
    raise TypeError(f"stream is a {type(stream).__qualname__}; give a raw handle (int) or a CUDA stream object.")
