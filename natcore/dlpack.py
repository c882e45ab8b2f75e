"""Reading a DLPack capsule: somebody's array as a `View`, without owning or copying it.

Structures after the DLPack header (dmlc/dlpack, versions 0.x and 1.x). The capsule is borrowed, not
consumed: its own destructor releases the memory, so keep it alive while the view is used.
"""

from __future__ import annotations

import ctypes
from typing import Any

from natcore.views import Device, View, contiguous_strides

#: DLDeviceType -> device type. Pinned host memory is the CPU's, managed memory the GPU's.
DEVICE_TYPES = {1: "cpu", 2: "cuda", 3: "cpu", 13: "cuda"}
_CODES = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex", 6: "bool"}
_READ_ONLY = 1


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _VersionedTensor(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = (ctypes.py_object, ctypes.c_char_p)
_capsule_is = ctypes.pythonapi.PyCapsule_IsValid
_capsule_is.restype = ctypes.c_int
_capsule_is.argtypes = (ctypes.py_object, ctypes.c_char_p)


def device_of(name: str, array: Any) -> Device:
    """Where a DLPack producer's array lives. Raises NotImplementedError for other device types."""
    kind, index = array.__dlpack_device__()
    if int(kind) not in DEVICE_TYPES:
        raise NotImplementedError(f"{name} is on DLPack device type {int(kind)}; natcore runs on cpu and cuda.")
    device_type = DEVICE_TYPES[int(kind)]
    return Device(device_type, int(index) if device_type == "cuda" else 0)


def export(array: Any, stream: int | None) -> Any:
    """The producer's capsule; ``stream`` is where the consumer will work (None on the CPU)."""
    try:
        return array.__dlpack__(stream=stream, max_version=(1, 0))
    except TypeError:  # a producer from before DLPack 1.0
        return array.__dlpack__(stream=stream)


def view(capsule: Any, device: Device) -> tuple[View, bool]:
    """The view in a capsule, and whether its memory is read-only."""
    read_only = False
    if _capsule_is(capsule, b"dltensor_versioned"):
        managed = _VersionedTensor.from_address(_capsule_pointer(capsule, b"dltensor_versioned"))
        tensor, read_only = managed.tensor, bool(managed.flags & _READ_ONLY)
    else:
        tensor = _Tensor.from_address(_capsule_pointer(capsule, b"dltensor"))
    shape = tuple(tensor.shape[: tensor.ndim])
    strides = tuple(tensor.strides[: tensor.ndim]) if tensor.strides else contiguous_strides(shape)
    dtype = f"{_CODES.get(tensor.code, f'code{tensor.code}_')}{tensor.bits}"
    if tensor.lanes != 1:
        dtype += f"x{tensor.lanes}"
    return View((tensor.data or 0) + tensor.byte_offset, shape, strides, dtype, device), read_only
