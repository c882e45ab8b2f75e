"""The XLA FFI C API, as ctypes structures: what XLA hands to a handler and what it takes back.

Source: xla/ffi/api/c_api.h (shipped by jaxlib under ``jax.ffi.include_dir()``), API version 0.1 and
later minors, which keep these offsets. Only what a handler needs is declared; offsets for native
code come from these structures, so that the layout is written down once.
"""

from __future__ import annotations

import ctypes
from ctypes import c_char_p, c_int32, c_int64, c_size_t, c_uint32, c_void_p

API_VERSION = (0, 1)  # the oldest version with these layouts; XLA accepts handlers of older minors
COMMAND_BUFFER_COMPATIBLE = 1
METADATA_EXTENSION = 1

CANCELLED, INVALID_ARGUMENT, UNIMPLEMENTED, INTERNAL = 1, 3, 12, 13

#: An XLA_FFI_Handler: takes an XLA_FFI_CallFrame*, returns an XLA_FFI_Error* or null.
HandlerType = ctypes.CFUNCTYPE(c_void_p, c_void_p)


class _Struct(ctypes.Structure):
    """Every FFI structure starts with its size and a list of extensions."""

    _fields_ = (("struct_size", c_size_t), ("extension_start", c_void_p))


class Extension(ctypes.Structure):
    _fields_ = (("struct_size", c_size_t), ("type", c_int32), ("next", c_void_p))


class ApiVersion(_Struct):
    _fields_ = (("major", c_int32), ("minor", c_int32))


class Metadata(ctypes.Structure):
    _fields_ = (("struct_size", c_size_t), ("api_version", ApiVersion), ("traits", c_uint32))


class MetadataExtension(ctypes.Structure):
    _fields_ = (("base", Extension), ("metadata", ctypes.POINTER(Metadata)))


class ErrorCreateArgs(_Struct):
    _fields_ = (("message", c_char_p), ("code", c_int32))


class ContextArgs(_Struct):
    """XLA_FFI_Stream_Get_Args and XLA_FFI_DeviceOrdinal_Get_Args: a context in, one word out."""

    _fields_ = (("ctx", c_void_p), ("out", c_int64))


ErrorCreate = ctypes.CFUNCTYPE(c_void_p, ctypes.POINTER(ErrorCreateArgs))
ContextGet = ctypes.CFUNCTYPE(c_void_p, ctypes.POINTER(ContextArgs))


class Api(_Struct):
    _fields_ = (
        ("api_version", ApiVersion),
        ("internal_api", c_void_p),
        ("error_create", ErrorCreate),
        ("error_get_message", c_void_p),
        ("error_destroy", c_void_p),
        ("handler_register", c_void_p),
        ("stream_get", ContextGet),
        *((f"_unused{i}", c_void_p) for i in range(12)),
        ("device_ordinal_get", ContextGet),
    )


class Buffer(_Struct):
    _fields_ = (("dtype", c_int32), ("data", c_void_p), ("rank", c_int64), ("dims", ctypes.POINTER(c_int64)))


class Buffers(_Struct):
    """XLA_FFI_Args and XLA_FFI_Rets."""

    _fields_ = (("size", c_int64), ("types", c_void_p), ("buffers", ctypes.POINTER(ctypes.POINTER(Buffer))))


class ByteSpan(ctypes.Structure):
    _fields_ = (("ptr", c_void_p), ("len", c_size_t))


class Scalar(ctypes.Structure):
    _fields_ = (("dtype", c_int32), ("value", c_void_p))


class Attributes(_Struct):
    """Sorted by name."""

    _fields_ = (("size", c_int64), ("types", c_void_p), ("names", c_void_p), ("values", ctypes.POINTER(c_void_p)))


class CallFrame(_Struct):
    _fields_ = (
        ("api", ctypes.POINTER(Api)),
        ("ctx", c_void_p),
        ("stage", c_int32),
        ("args", Buffers),
        ("rets", Buffers),
        ("attrs", Attributes),
    )


def answer_metadata(frame: CallFrame) -> bool:
    """Answers XLA's question about version and traits, if that is what this call is."""
    extension = frame.extension_start
    while extension:
        base = Extension.from_address(extension)
        if base.type == METADATA_EXTENSION:
            metadata = MetadataExtension.from_address(extension).metadata.contents
            metadata.api_version.major, metadata.api_version.minor = API_VERSION
            metadata.traits = COMMAND_BUFFER_COMPATIBLE
            return True
        extension = base.next
    return False


def integer_attribute(frame: CallFrame, position: int) -> int:
    """The int64 attribute at ``position`` in the order of names."""
    return c_int64.from_address(Scalar.from_address(frame.attrs.values[position]).value).value


def text_attribute(frame: CallFrame, position: int) -> str:
    span = ByteSpan.from_address(frame.attrs.values[position])
    return ctypes.string_at(span.ptr, span.len).decode()


def device_ordinal(frame: CallFrame) -> int:
    """The ordinal of the GPU on which a handler must run."""
    arguments = ContextArgs(ctypes.sizeof(ContextArgs), None, frame.ctx, 0)
    if frame.api.contents.device_ordinal_get(ctypes.byref(arguments)):
        raise RuntimeError("XLA does not say on which device natcore's handler runs.")
    return arguments.out & 0xFFFFFFFF  # an int32


def make_error(frame: CallFrame, code: int, message: str) -> int:
    """An XLA_FFI_Error with a copy of this message; XLA owns it once it is returned."""
    arguments = ErrorCreateArgs(ctypes.sizeof(ErrorCreateArgs), None, message.encode(), code)
    return frame.api.contents.error_create(ctypes.byref(arguments))


def address_of(function: object) -> int:
    """The address of a ctypes function."""
    address = ctypes.cast(function, c_void_p).value  # type: ignore[arg-type]
    assert address is not None
    return address
