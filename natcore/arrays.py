"""The kinds of array that come and go through the public door: how each is read and made.

Frameworks are looked up in ``sys.modules`` and never imported: whoever hands us a torch tensor has
imported torch.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from natcore import dlpack
from natcore.recent import Likeness, torch_likeness
from natcore.views import ITEM_SIZES, Device, View, contiguous_strides

#: All that is to be known of an array but its address, as its library says it: a function, and what that
#: function takes after the operand's name to give the View (with address 0) and whether it is read-only.
#: Signatures are cheap and hashable: a repeated call is looked up by those of its operands.
Signature = tuple[Any, ...]

#: An array during one call: its address, its signature, and what keeps its memory alive.
Borrowed = tuple[int, Signature, Any]


def described(name: str, signature: Signature) -> tuple[View, bool]:
    """What a signature says of the operand ``name``: its view, and whether it is read-only."""
    describe, *details = signature
    return describe(name, *details)


def known(name: str, view: View, read_only: bool) -> tuple[View, bool]:
    """The describing function of what is a View already."""
    return view, read_only


class Kind(Protocol):
    """One library's arrays."""

    #: The library's own fast test whether arrays have the same signatures, if it has one.
    likeness: Likeness | None

    def device(self, name: str, array: Any) -> Device: ...

    def read(self, name: str, array: Any, stream: int | None, foreign: bool) -> Borrowed:
        """``stream`` is where the work will run, None on the CPU, and ``foreign`` says whether that may be
        another than the library's current one: then the producer's pending work is waited for."""
        ...

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any, device: Device, stream: int | None) -> Any:
        """Uninitialised row-major memory on ``like``'s device, for use on ``stream`` (None: the current one)."""
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
    immutable = False  # whether nothing may ever be written
    likeness: Likeness | None = None

    def device(self, name: str, array: Any) -> Device:
        return dlpack.device_of(name, array)

    def read(self, name: str, array: Any, stream: int | None, foreign: bool) -> Borrowed:
        if getattr(array, "requires_grad", False) is True:
            raise ValueError(
                f"{name} requires grad, and natcore on raw arrays records no gradients: call torch_nat "
                f"instead, or pass {name}.detach()."
            )
        # DLPack numbers CUDA's legacy default stream 1; its 0 is ambiguous and forbidden.
        capsule = dlpack.export(array, 1 if stream == 0 else stream)
        view, read_only = dlpack.view(capsule, self.device(name, array))
        return view.ptr, (known, view._replace(ptr=0), read_only or self.immutable), capsule

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

    def read(self, name: str, array: np.ndarray, stream: int | None, foreign: bool) -> Borrowed:
        address, read_only = array.__array_interface__["data"]
        return address, (_describe_numpy, array.shape, array.strides, array.dtype, read_only), array

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any, device: Device, stream: int | None) -> np.ndarray:
        return np.empty(shape, like.dtype if like.dtype.name == dtype else np.dtype(dtype))

    def namespace(self, like: np.ndarray) -> Any:
        return np

    def address(self, fresh: np.ndarray) -> int:
        return fresh.__array_interface__["data"][0]


def _describe_numpy(
    name: str, shape: tuple[int, ...], strides: tuple[int, ...], dtype: np.dtype, read_only: bool
) -> tuple[View, bool]:
    if not dtype.isnative:
        raise ValueError(f"{name} has byte order {dtype.str}; natcore reads native order: use {name}.astype(...).")
    if any(stride % dtype.itemsize for stride in strides):
        raise ValueError(f"{name} has strides of {strides} bytes, not multiples of its {dtype.itemsize}-byte items.")
    elements = tuple(stride // dtype.itemsize for stride in strides)
    return View(0, shape, elements, dtype.name, Device("cpu")), read_only


class TorchKind(_DLPackKind):
    library = "torch"

    def __init__(self, torch: Any):
        self._torch = torch
        self._dtypes = {name: getattr(torch, name) for name in ITEM_SIZES}
        self._current_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # absent from CPU builds
        self.likeness = torch_likeness(torch)
        self.address = torch.Tensor.data_ptr

    def device(self, name: str, array: Any) -> Device:
        return _torch_device(name, array.device)

    def read(self, name: str, array: Any, stream: int | None, foreign: bool) -> Borrowed:
        if array.is_neg():  # DLPack would hand over what lies in memory
            raise ValueError(f"{name} is a negative view of its memory: pass {name}.resolve_neg().")
        if array.requires_grad or (foreign and self._is_foreign(name, array, stream)):
            return super().read(name, array, stream, foreign)  # refuses or synchronises
        strides = array.is_contiguous() or array.stride()  # True is asked for and compared faster than strides
        return array.data_ptr(), (_describe_torch, array.shape, strides, array.dtype, array.device), array

    def _is_foreign(self, name: str, array: Any, stream: int | None) -> bool:
        return stream is not None and stream != self._current_stream(self.device(name, array).index)

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any, device: Device, stream: int | None) -> Any:
        if stream is not None and stream != self._current_stream(device.index):
            with self._torch.cuda.stream(self._torch.cuda.ExternalStream(stream, device.index)):
                return like.new_empty(shape, dtype=self._dtypes[dtype])
        # Takes half the time of new_empty.
        return like.new_empty_strided(shape, _strides_of(shape), dtype=self._dtypes[dtype])

    def namespace(self, like: Any) -> Any:
        return self._torch

    def current_stream(self, device: Device) -> int:
        return self._current_stream(device.index)


_strides_of = lru_cache(maxsize=4096)(contiguous_strides)


@lru_cache(maxsize=256)
def _torch_device(name: str, device: Any) -> Device:
    if device.type not in ("cpu", "cuda"):
        raise NotImplementedError(f"{name} is on {device}; natcore runs on cpu and cuda.")
    return Device(device.type, device.index or 0)


def _describe_torch(name: str, shape: Any, strides: Any, dtype: Any, device: Any) -> tuple[View, bool]:
    shape = tuple(shape)
    strides = contiguous_strides(shape) if strides is True else strides
    return View(0, shape, strides, str(dtype).removeprefix("torch."), _torch_device(name, device)), False


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
    immutable = True

    def __init__(self, jax: Any):
        self._jax = jax

    def device(self, name: str, array: Any) -> Device:
        if isinstance(array, self._jax.core.Tracer):
            raise TypeError(f"{name} is traced by JAX; under jit, grad or vmap call jax_nat instead of natcore.")
        return super().device(name, array)

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
