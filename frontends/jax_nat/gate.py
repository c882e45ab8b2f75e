"""Python called by XLA's threads, until the interpreter ends.

A thread that asks for the interpreter while it shuts down never returns, and JAX, which waits at exit for
its threads, would hang. So a few instructions of machine code stand before every Python handler: they
count who is inside, and turn callers away once the gate is closed. At exit, before JAX takes itself down,
the gate closes and waits until everybody has left.
"""

from __future__ import annotations

import atexit
import ctypes
import time
from array import array
from collections.abc import Callable
from typing import Any

from llvmlite import binding, ir

from jax_nat import ffi_abi
from jax_nat.ffi_abi import CANCELLED, Api, CallFrame, ErrorCreateArgs

_word, _int = ir.IntType(64), ir.IntType(32)
_handler_type = ir.FunctionType(_word, [_word])

_state = array("q", [0, 0])  # closed, number of callers inside
_CLOSED, _INSIDE = (_state.buffer_info()[0] + 8 * i for i in range(2))
_MESSAGE = ctypes.create_string_buffer(b"natcore: the Python interpreter is shutting down.")
_forever: list[object] = []


def guarded(body: Callable[[CallFrame], object]) -> int:
    """The address of a C handler made from a Python function; it is never freed, for XLA may call it for ever.

    It answers metadata itself and turns exceptions into XLA errors.
    """

    def handler(address: int) -> int | None:
        frame = CallFrame.from_address(address)
        try:
            if not ffi_abi.answer_metadata(frame):
                body(frame)
            return None
        except BaseException as error:  # noqa: BLE001 - nothing may cross into C++
            codes = {ValueError: ffi_abi.INVALID_ARGUMENT, NotImplementedError: ffi_abi.UNIMPLEMENTED}
            code = codes.get(type(error), ffi_abi.INTERNAL)
            return ffi_abi.make_error(frame, code, f"natcore: {type(error).__name__}: {error}")

    function = ffi_abi.HandlerType(handler)
    address, engine = _gate(ffi_abi.address_of(function))
    _forever.append((function, engine))
    return address


def _gate(handler: int) -> tuple[int, binding.ExecutionEngine]:
    """The address of code that calls the C handler at ``handler`` while the gate is open, and its owner."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    module = ir.Module("jax_nat_gate")
    module.triple = binding.get_default_triple()
    _generate(ir.Function(module, _handler_type, "gate"), handler)
    machine = binding.Target.from_default_triple().create_target_machine()
    engine = binding.create_mcjit_compiler(binding.parse_assembly(str(module)), machine)
    engine.finalize_object()
    return engine.get_function_address("gate"), engine


def _generate(gate: ir.Function, handler: int) -> None:
    """inside += 1; result = closed ? error : handler(frame); inside -= 1; return result"""
    builder: Any = ir.IRBuilder(gate.append_basic_block())
    (frame,) = gate.args
    inside = _pointer(builder, _word(_INSIDE), _word)
    builder.atomic_rmw("add", inside, _word(1), "seq_cst")  # before the look at closed: nobody slips through
    closed = builder.load_atomic(_pointer(builder, _word(_CLOSED), _word), "seq_cst", 8)
    with builder.if_else(builder.icmp_unsigned("!=", closed, _word(0))) as (turned_away, let_in):
        with turned_away:
            error, away = _error(builder, frame), builder.block
        with let_in:
            result, home = builder.call(_pointer(builder, _word(handler), _handler_type), [frame]), builder.block
    answer = builder.phi(_word)
    answer.add_incoming(error, away)
    answer.add_incoming(result, home)
    builder.atomic_rmw("sub", inside, _word(1), "seq_cst")
    builder.ret(answer)


def _error(builder: Any, frame: Any) -> Any:
    """An XLA error, by the frame's own function."""
    block = builder.alloca(ir.ArrayType(_word, ctypes.sizeof(ErrorCreateArgs) // 8))
    arguments = builder.ptrtoint(block, _word)

    def put(offset: int, value: Any) -> None:
        builder.store(value, _pointer(builder, builder.add(arguments, _word(offset)), value.type))

    put(ErrorCreateArgs.struct_size.offset, _word(ctypes.sizeof(ErrorCreateArgs)))
    put(ErrorCreateArgs.extension_start.offset, _word(0))
    put(ErrorCreateArgs.message.offset, _word(ctypes.addressof(_MESSAGE)))
    put(ErrorCreateArgs.code.offset, _int(CANCELLED))
    api = builder.load(_pointer(builder, builder.add(frame, _word(CallFrame.api.offset)), _word))
    create = builder.load(_pointer(builder, builder.add(api, _word(Api.error_create.offset)), _word))
    return builder.call(_pointer(builder, create, _handler_type), [arguments])


def _pointer(builder: Any, address: Any, target: Any) -> Any:
    return builder.inttoptr(address, target.as_pointer())


@atexit.register  # after JAX's own, so it runs before them
def _close() -> None:
    _state[0] = 1
    while _state[1]:
        time.sleep(0.001)  # lets the others have the interpreter
