"""Memory of any dtype, by address and dtype code, from and to the dtype of the arithmetic."""

from __future__ import annotations

from llvmlite import ir
from numba import types

from natcore.backends.cpu.simd import I16, I32, I64, constant, element_at, intrinsic, item_bytes

#: The dtype codes of memory, in this order, and their sizes.
KINDS = ("float64", "float32", "float16", "bfloat16")
ITEM_BYTES = (8, 4, 2, 2)


def _wide(kind: ir.Type, lanes: int) -> ir.Type:
    return kind if lanes == 1 else ir.VectorType(kind, lanes)


def _resize(builder, value, kind: ir.Type):
    """Between float and double."""
    source, target = (t.element if isinstance(t, ir.VectorType) else t for t in (value.type, kind))
    if source == target:
        return value
    return builder.fpext(value, kind) if isinstance(target, ir.DoubleType) else builder.fptrunc(value, kind)


def _decode(builder, memory, kind: str, lanes: int):
    """float or double from loaded memory."""
    if kind in ("float64", "float32"):
        return memory
    single = _wide(ir.FloatType(), lanes)
    if kind == "float16":
        return builder.fpext(memory, single)
    bits = _wide(I32, lanes)
    return builder.bitcast(builder.shl(builder.zext(memory, bits), constant(bits, 16)), single)


def _encode(builder, value, kind: str, lanes: int):
    """From float or double to what is stored, rounded to nearest even."""
    if kind == "float64":
        return _resize(builder, value, _wide(ir.DoubleType(), lanes))
    single = _resize(builder, value, _wide(ir.FloatType(), lanes))
    if kind == "float32":
        return single
    if kind == "float16":
        return builder.fptrunc(single, _wide(ir.HalfType(), lanes))
    integer = _wide(I32, lanes)
    bits = builder.bitcast(single, integer)
    odd = builder.and_(builder.lshr(bits, constant(integer, 16)), constant(integer, 1))
    rounded = builder.add(bits, builder.add(odd, constant(integer, 0x7FFF)))
    not_a_number = builder.fcmp_unordered("uno", single, single)
    kept = builder.select(not_a_number, constant(integer, 0x7FC00000), rounded)
    return builder.trunc(builder.lshr(kept, constant(integer, 16)), _wide(I16, lanes))


_STORED = {"float64": ir.DoubleType(), "float32": ir.FloatType(), "float16": ir.HalfType(), "bfloat16": I16}


def _for_each_kind(builder, kind, emit) -> None:
    """A switch over the dtype code; ``emit(name, item bytes)`` writes the code of each case."""
    after = builder.append_basic_block("converted")
    cases = [builder.append_basic_block(name) for name in KINDS]
    switch = builder.switch(kind, cases[0])
    for code, (name, block) in enumerate(zip(KINDS, cases, strict=True)):
        if code:
            switch.add_case(I64(code), block)
        builder.position_at_end(block)
        emit(name, ITEM_BYTES[code])
        builder.branch(after)
    builder.position_at_end(after)


def _element(builder, address, index, size: int, kind: ir.Type):
    """A pointer to element ``index`` of memory at an address."""
    return builder.inttoptr(builder.add(address, builder.mul(index, I64(size))), kind.as_pointer())


@intrinsic(prefer_literal=True)
def read(typingctx, to, address, index, kind, lanes):
    """to[index : index + lanes] = the elements ``index`` on of memory of dtype KINDS[kind]; ``lanes`` is literal."""
    count = lanes.literal_value

    def codegen(context, builder, sig, args):
        to, address, index, kind, _ = args
        target, align = (_wide(context.get_data_type(sig.args[0].dtype), count), item_bytes(context, sig.args[0]))

        def emit(name: str, size: int) -> None:
            memory = builder.load(_element(builder, address, index, size, _wide(_STORED[name], count)), align=size)
            value = _resize(builder, _decode(builder, memory, name, count), target)
            builder.store(value, element_at(builder, to, index, target), align=align)

        _for_each_kind(builder, kind, emit)
        return context.get_dummy_value()

    return types.void(to, types.intp, types.intp, types.intp, lanes), codegen


@intrinsic(prefer_literal=True)
def write(typingctx, address, source, index, kind, lanes):
    """The way back: memory of dtype KINDS[kind] = source[index : index + lanes]."""
    count = lanes.literal_value

    def codegen(context, builder, sig, args):
        address, source, index, kind, _ = args
        given = _wide(context.get_data_type(sig.args[1].dtype), count)
        value = builder.load(element_at(builder, source, index, given), align=item_bytes(context, sig.args[1]))

        def emit(name: str, size: int) -> None:
            memory = _encode(builder, value, name, count)
            builder.store(memory, _element(builder, address, index, size, memory.type), align=size)

        _for_each_kind(builder, kind, emit)
        return context.get_dummy_value()

    return types.void(types.intp, source, types.intp, types.intp, lanes), codegen
