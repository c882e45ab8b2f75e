"""The execute stage on CUDA as machine code: loads, comparisons and calls through addresses.

Numba sees 64-bit integers only; the intrinsics below are all that it knows of memory, and the layouts
come from `ffi_abi` and `flat_plan`. Parameters, the launch configuration and the arguments of FFI calls
live on the stack, so that concurrent calls share nothing.
"""

from __future__ import annotations

import ctypes
from collections import namedtuple
from typing import Any

from llvmlite import ir
from numba import cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from jax_nat import ffi_abi, flat_plan

_word = ir.IntType(64)


def _loader(bits: int) -> Any:
    def load(typing_context, address):
        def generate(context, builder, signature, args):
            value = builder.load(builder.inttoptr(args[0], ir.IntType(bits).as_pointer()))
            return value if bits == 64 else builder.sext(value, _word)

        return types.int64(types.int64), generate

    return intrinsic(load)


def _storer(bits: int) -> Any:
    def store(typing_context, address, value):
        def generate(context, builder, signature, args):
            value = args[1] if bits == 64 else builder.trunc(args[1], ir.IntType(bits))
            builder.store(value, builder.inttoptr(args[0], ir.IntType(bits).as_pointer()))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), generate

    return intrinsic(store)


load, load32, store, store32 = _loader(64), _loader(32), _storer(64), _storer(32)


def _call(typing_context, function, arguments):
    """Calls the C function at an address with a tuple of words; the result is a word."""
    count = len(arguments)

    def generate(context, builder, signature, args):
        pointer = ir.FunctionType(_word, [_word] * count).as_pointer()
        words = [builder.extract_value(args[1], i) for i in range(count)]
        return builder.call(builder.inttoptr(args[0], pointer), words)

    return types.int64(types.int64, types.UniTuple(types.int64, count)), generate


call: Any = intrinsic(_call)


def _stack(typing_context, words):
    """The address of a block of so many words (a constant) that lives until the caller returns."""
    count = words.literal_value

    def generate(context, builder, signature, args):
        return builder.ptrtoint(cgutils.alloca_once(builder, ir.ArrayType(_word, count)), _word)

    return types.int64(words), generate


stack: Any = intrinsic(prefer_literal=True)(_stack)


def _offsets(struct: type[ctypes.Structure]) -> Any:
    """The offset of every field, as a named tuple that numba reads as constants; ``size`` is the struct's."""
    names = [name for base in reversed(struct.__mro__) for name, *_ in vars(base).get("_fields_", ())]
    fields = {name: getattr(struct, name).offset for name in names if not name.startswith("_")}
    return namedtuple(struct.__name__, ["sizeof", *fields])(ctypes.sizeof(struct), **fields)


_FRAME, _BUFFERS, _BUFFER = map(_offsets, (ffi_abi.CallFrame, ffi_abi.Buffers, ffi_abi.Buffer))
_ATTRIBUTES, _SCALAR, _API = map(_offsets, (ffi_abi.Attributes, ffi_abi.Scalar, ffi_abi.Api))
_EXTENSION, _METADATA_EXTENSION, _METADATA, _VERSION = map(
    _offsets, (ffi_abi.Extension, ffi_abi.MetadataExtension, ffi_abi.Metadata, ffi_abi.ApiVersion)
)
_CONTEXT, _ERROR = map(_offsets, (ffi_abi.ContextArgs, ffi_abi.ErrorCreateArgs))
_CONTEXT_WORDS, _ERROR_WORDS = _CONTEXT.sizeof // 8, _ERROR.sizeof // 8
_MAJOR, _MINOR = ffi_abi.API_VERSION
_METADATA_TYPE, _TRAITS = ffi_abi.METADATA_EXTENSION, ffi_abi.COMMAND_BUFFER_COMPATIBLE
_INTERNAL = ffi_abi.INTERNAL
_ALIGNMENT, _MESSAGES = flat_plan.ALIGNMENT, flat_plan.MESSAGES

_PLAN = flat_plan.BLOCK
_LAUNCH = flat_plan.LAUNCH
_STREAM_WORD, _CONFIG_WORDS = flat_plan.CONFIG_STREAM, flat_plan.CONFIG_WORDS
_ARGUMENT, _RESULT, _WORKSPACE = flat_plan.ARGUMENT, flat_plan.RESULT, flat_plan.WORKSPACE
_PARAMETER_WORDS, _MAX_PARAMETERS = flat_plan.PARAMETER_WORDS, flat_plan.MAX_PARAMETERS


@njit
def _answer_metadata(frame):
    extension = load(frame + _FRAME.extension_start)
    while extension != 0:
        if load32(extension + _EXTENSION.type) == _METADATA_TYPE:
            metadata = load(extension + _METADATA_EXTENSION.metadata)
            store32(metadata + _METADATA.api_version + _VERSION.major, _MAJOR)
            store32(metadata + _METADATA.api_version + _VERSION.minor, _MINOR)
            store32(metadata + _METADATA.traits, _TRAITS)
            return True
        extension = load(extension + _EXTENSION.next)
    return False


@njit
def _error(frame, message):
    """An XLA error from a C string."""
    arguments = stack(_ERROR_WORDS)
    store(arguments + _ERROR.struct_size, _ERROR.sizeof)
    store(arguments + _ERROR.extension_start, 0)
    store(arguments + _ERROR.message, message)
    store32(arguments + _ERROR.code, _INTERNAL)
    return call(load(load(frame + _FRAME.api) + _API.error_create), (arguments,))


@njit
def _find(cell, key, device):
    """The block of a plan, or 0 (see `flat_plan.PlanTable`)."""
    table = load(cell)
    mask = load(table)
    entry = (key + device) & mask
    while True:
        block = load(table + 8 + 8 * entry)
        if block == 0 or (load(block + _PLAN.key) == key and load(block + _PLAN.device) == device):
            return block
        entry = (entry + 1) & mask


@njit
def _buffer(frame, group, index):
    """The XLA_FFI_Buffer at a place among the arguments or the results."""
    return load(load(frame + group + _BUFFERS.buffers) + 8 * index)


@njit
def _workspace(frame, block):
    """The aligned address of the workspace; 0 where the plan needs none, -1 where it is too small."""
    needed, index = load(block + _PLAN.workspace_bytes), load(block + _PLAN.workspace_result)
    if needed == 0:
        return 0
    if load(frame + _FRAME.rets + _BUFFERS.size) <= index:
        return -1
    buffer = _buffer(frame, _FRAME.rets, index)
    if load(load(buffer + _BUFFER.dims)) < needed + _ALIGNMENT - 1:
        return -1
    return (load(buffer + _BUFFER.data) + _ALIGNMENT - 1) & -_ALIGNMENT


@njit
def _launch(frame, launch, stream, workspace, cu_launch):
    """Launches one kernel; its CUresult."""
    config = stack(_CONFIG_WORDS)
    values = stack(_MAX_PARAMETERS)
    pointers = stack(_MAX_PARAMETERS)
    for word in range(_CONFIG_WORDS):
        store(config + 8 * word, load(launch + _LAUNCH.config + 8 * word))
    store(config + 8 * _STREAM_WORD, stream)
    for i in range(load(launch + _LAUNCH.parameters)):
        parameter = launch + _LAUNCH.first_parameter + 8 * _PARAMETER_WORDS * i
        kind, value, offset = load(parameter), load(parameter + 8), load(parameter + 16)
        pointer = values + 8 * i
        if kind == _ARGUMENT:
            store(pointer, load(_buffer(frame, _FRAME.args, value) + _BUFFER.data) + offset)
        elif kind == _RESULT:
            store(pointer, load(_buffer(frame, _FRAME.rets, value) + _BUFFER.data) + offset)
        elif kind == _WORKSPACE:
            store(pointer, workspace + offset)
        else:
            pointer = value
        store(pointers + 8 * i, pointer)
    # int cuLaunchKernelEx(const CUlaunchConfig*, CUfunction, void** kernelParams, void** extra)
    return call(cu_launch, (config, load(launch + _LAUNCH.kernel), pointers, 0)) & 0xFFFFFFFF


@njit
def _run(frame, block, cu_launch, workspace_message, messages):
    """All launches of a plan on the call's stream; an XLA error or 0."""
    workspace = _workspace(frame, block)
    if workspace == -1:
        return _error(frame, workspace_message)
    arguments = stack(_CONTEXT_WORDS)
    store(arguments + _CONTEXT.struct_size, _CONTEXT.sizeof)
    store(arguments + _CONTEXT.extension_start, 0)
    store(arguments + _CONTEXT.ctx, load(frame + _FRAME.ctx))
    error = call(load(load(frame + _FRAME.api) + _API.stream_get), (arguments,))
    if error != 0:
        return error
    stream = load(arguments + _CONTEXT.out)
    launch = block + _PLAN.first_launch
    for _ in range(load(block + _PLAN.launches)):
        code = _launch(frame, launch, stream, workspace, cu_launch)
        if code != 0:
            return _error(frame, load(messages + 8 * min(code, _MESSAGES - 1)))
        launch += _LAUNCH.first_parameter + 8 * _PARAMETER_WORDS * load(launch + _LAUNCH.parameters)
    return 0


def compile_handler(*, cell: int, prepare: int, cu_launch: int, workspace_message: int, messages: int) -> int:
    """The address of the C handler, which is never freed. All arguments are addresses, compiled into it:

    the cell of the plan table, the handler that prepares a missing call, cuLaunchKernelEx, the message for a
    workspace that is too small, and an array of `flat_plan.MESSAGES` messages, by CUresult.
    """

    def execute(frame):
        if _answer_metadata(frame):
            return 0
        arguments = stack(_CONTEXT_WORDS)
        store(arguments + _CONTEXT.struct_size, _CONTEXT.sizeof)
        store(arguments + _CONTEXT.extension_start, 0)
        store(arguments + _CONTEXT.ctx, load(frame + _FRAME.ctx))
        error = call(load(load(frame + _FRAME.api) + _API.device_ordinal_get), (arguments,))
        if error != 0:
            return error
        device = load32(arguments + _CONTEXT.out)
        key = load(load(load(load(frame + _FRAME.attrs + _ATTRIBUTES.values)) + _SCALAR.value))
        block = _find(cell, key, device)
        if block == 0:
            error = call(prepare, (frame,))
            if error != 0:
                return error
            block = _find(cell, key, device)
        return _run(frame, block, cu_launch, workspace_message, messages)

    handler: Any = cfunc(types.int64(types.int64))(execute)
    _forever.append(handler)
    return handler.address


_forever: list[Any] = []
