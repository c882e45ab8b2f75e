"""Sixteen lanes at a time: a numba type for a SIMD vector, and the few operations on it.

LLVM is handed `<16 x T>` and splits it as the host requires (one AVX-512 register, two AVX2, four
NEON for float32), so nothing here depends on the auto-vectoriser's mood. T is the dtype of the
arithmetic, float32 or float64. Kernels see memory through typed pointers, as C does: no shapes, no
reference counts, nothing to pass along but an address. Memory of other dtypes is reached by address
and dtype code (see `KINDS`), and is converted on the way.
"""

from __future__ import annotations

import math
import operator

from llvmlite import ir
from numba import types
from numba.core.extending import intrinsic, lower_builtin, models, register_model
from numba.core.typing.templates import AbstractTemplate, infer_global, signature

LANES = 16
#: Rows of a product that are kept in registers at once (see `multiply_block`).
BLOCK = 8
#: The dtype codes of memory, in this order.
KINDS = ("float64", "float32", "float16", "bfloat16")

_I1, _I16, _I32, _I64 = (ir.IntType(n) for n in (1, 16, 32, 64))
_FAST = ("contract", "nsz")


class Vector(types.Type):
    """The numba type of 16 lanes of ``element``."""

    def __init__(self, element: types.Float):
        self.element = element
        super().__init__(name=f"Vector16({element})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, kind: Vector):
        element = manager[kind.element].get_data_type()
        super().__init__(manager, kind, ir.VectorType(element, LANES))


def _constant(kind: ir.Type, value: float) -> ir.Constant:
    return ir.Constant(kind, [value] * kind.count if isinstance(kind, ir.VectorType) else value)


def _splat(builder, value, lanes: int = LANES):
    undefined = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    first = builder.insert_element(undefined, value, _I32(0))
    return builder.shuffle_vector(first, undefined, _constant(ir.VectorType(_I32, lanes), 0))


def _at(builder, pointer, index, kind: ir.Type | None = None):
    """The address of pointer[index], as a pointer to ``kind`` (default: the element)."""
    place = builder.gep(pointer, [index])
    return place if kind is None else builder.bitcast(place, kind.as_pointer())


def _width(context, pointer_type) -> int:
    return context.get_abi_sizeof(context.get_data_type(pointer_type.dtype))


def _vector_of(context, pointer_type) -> ir.VectorType:
    return ir.VectorType(context.get_data_type(pointer_type.dtype), LANES)


@intrinsic
def pointer_to(typingctx, address, like):
    """A pointer to elements of the type of the scalar ``like``, from an address."""

    def codegen(context, builder, sig, args):
        return builder.inttoptr(args[0], context.get_value_type(sig.return_type))

    return types.CPointer(like)(types.intp, like), codegen


@intrinsic
def shifted(typingctx, pointer, index):
    """The pointer to pointer[index]."""

    def codegen(context, builder, sig, args):
        return builder.gep(args[0], [args[1]])

    return pointer(pointer, types.intp), codegen


@intrinsic
def outlined(typingctx):
    """Keeps LLVM from inlining the function that says this: one copy of its code is enough."""

    def codegen(context, builder, sig, args):
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.void(), codegen


def _arithmetic(python_operator, opcode: str) -> None:
    @infer_global(python_operator)
    class _Typing(AbstractTemplate):
        def generic(self, args, kws):
            if len(args) == 2 and isinstance(args[0], Vector) and args[0] == args[1]:
                return signature(args[0], *args)

    @lower_builtin(python_operator, Vector, Vector)
    def _lower(context, builder, sig, args):
        return getattr(builder, opcode)(*args, flags=_FAST)


for _operator, _opcode in ((operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul")):
    _arithmetic(_operator, _opcode)


@intrinsic
def load(typingctx, pointer, index):
    """Sixteen elements from pointer[index] on; no alignment is needed."""

    def codegen(context, builder, sig, args):
        place = _at(builder, *args, _vector_of(context, sig.args[0]))
        return builder.load(place, align=_width(context, sig.args[0]))

    return Vector(pointer.dtype)(pointer, types.intp), codegen


@intrinsic
def store(typingctx, pointer, index, vector):
    """Sixteen elements to pointer[index] on."""

    def codegen(context, builder, sig, args):
        builder.store(args[2], _at(builder, *args[:2], args[2].type), align=_width(context, sig.args[0]))
        return context.get_dummy_value()

    return types.void(pointer, types.intp, vector), codegen


@intrinsic
def splat(typingctx, pointer, value):
    """The scalar in every lane, in the dtype that ``pointer`` points to."""

    def codegen(context, builder, sig, args):
        return _splat(builder, context.cast(builder, args[1], sig.args[1], sig.args[0].dtype))

    return Vector(pointer.dtype)(pointer, value), codegen


@intrinsic
def maximum(typingctx, a, b):
    """Lane by lane; ``a`` where they cannot be compared."""

    def codegen(context, builder, sig, args):
        return builder.select(builder.fcmp_ordered("<", *args), args[1], args[0])

    return a(a, b), codegen


@intrinsic
def inside(typingctx, value, low, high, then, otherwise):
    """``then`` in the lanes where low <= value < high, ``otherwise`` in the others."""

    def codegen(context, builder, sig, args):
        x, lowest, end, yes, no = args
        both = builder.and_(builder.fcmp_ordered(">=", x, lowest), builder.fcmp_ordered("<", x, end))
        return builder.select(both, yes, no)

    return value(value, value, value, value, value), codegen


#: By element: mantissa bits, the lowest argument with a normal result, Taylor order.
_EXP = {types.float32: (23, -87.0, 7), types.float64: (52, -708.0, 13)}


@intrinsic
def exp(typingctx, x):
    """e ** x to about one unit in the last place; 0 below the normal numbers; x must not exceed 88.

    x = n ln 2 + r with |r| <= ln 2 / 2; e ** r by its Taylor series to the order whose remainder is
    below the rounding; n is added to the exponent bits. NaN stays NaN.
    """
    mantissa, lowest, order = _EXP[x.element]

    def codegen(context, builder, sig, args):
        kind = args[0].type
        integer = ir.VectorType(ir.IntType(64 if mantissa == 52 else 32), LANES)

        def c(value: float) -> ir.Constant:
            return _constant(kind, value)

        def fma(a, b, addend):
            return builder.fadd(builder.fmul(a, b, flags=_FAST), addend, flags=_FAST)

        tiny = builder.fcmp_ordered("<", args[0], c(lowest))
        value = builder.select(tiny, c(lowest), args[0])
        name = f"llvm.rint.v{LANES}f{64 if mantissa == 52 else 32}"
        rint = builder.module.globals.get(name) or ir.Function(builder.module, ir.FunctionType(kind, [kind]), name)
        n = builder.call(rint, [builder.fmul(value, c(1 / math.log(2)))])
        high = 0.693145751953125  # ln 2 to 16 bits, so that n * high is exact
        r = fma(n, c(-(math.log(2) - high)), fma(n, c(-high), value))
        power = c(1 / math.factorial(order))
        for k in reversed(range(order)):
            power = fma(power, r, c(1 / math.factorial(k)))
        shifted = builder.shl(builder.fptosi(n, integer), _constant(integer, mantissa))
        result = builder.bitcast(builder.add(builder.bitcast(power, integer), shifted), kind)
        return builder.select(tiny, c(0.0), result)

    return x(x), codegen


@intrinsic
def multiply_block(typingctx, c, ldc, start, lds, a, lda, b, row, column, terms):
    """BLOCK rows of a product with a 16-wide matrix, from starting values; the heart of everything.

    c[i*ldc + lane] = start[i*lds + lane] + sum over j < terms of b[i*row + j*column] * a[j*lda + lane]

    for i < BLOCK. The 16 lanes are a vector, ``b`` is broadcast: one load and BLOCK multiply-adds
    with a broadcast memory operand per j, all sums in registers.
    """

    def codegen(context, builder, sig, args):
        (c, ldc, start, lds, a, lda, b, row, column, terms) = args
        vector, align = _vector_of(context, sig.args[0]), _width(context, sig.args[0])

        def down(stride, i):
            return builder.mul(stride, _I64(i))

        rows = [_at(builder, b, down(row, i)) for i in range(BLOCK)]
        begin = [builder.load(_at(builder, start, down(lds, i), vector), align=align) for i in range(BLOCK)]
        before, loop, after = builder.block, builder.append_basic_block("terms"), builder.append_basic_block("done")
        builder.cbranch(builder.icmp_signed(">", terms, _I64(0)), loop, after)
        builder.position_at_end(loop)
        j = builder.phi(_I64)
        sums = [builder.phi(vector) for _ in range(BLOCK)]
        factor = builder.load(_at(builder, a, builder.mul(j, lda), vector), align=align)
        shift = builder.mul(j, column)
        totals = []
        for i in range(BLOCK):
            scalar = _splat(builder, builder.load(builder.gep(rows[i], [shift])))
            totals.append(builder.fadd(builder.fmul(scalar, factor, flags=_FAST), sums[i], flags=_FAST))
        following = builder.add(j, _I64(1))
        builder.cbranch(builder.icmp_signed("<", following, terms), loop, after)
        j.add_incoming(_I64(0), before)
        j.add_incoming(following, loop)
        builder.position_at_end(after)
        results = [builder.phi(vector) for _ in range(BLOCK)]
        for i in range(BLOCK):
            sums[i].add_incoming(begin[i], before)
            sums[i].add_incoming(totals[i], loop)
            results[i].add_incoming(begin[i], before)
            results[i].add_incoming(totals[i], loop)
        for i in range(BLOCK):
            builder.store(results[i], _at(builder, c, down(ldc, i), vector), align=align)
        return context.get_dummy_value()

    n = types.intp
    return types.void(c, n, start, n, a, n, b, n, n, n), codegen


@intrinsic
def transpose(typingctx, to, ldt, source, lds):
    """A 16 x 16 block: to[j*ldt + i] = source[i*lds + j], in registers (log2(16) steps)."""

    def codegen(context, builder, sig, args):
        to, ldt, source, lds = args
        vector, align = _vector_of(context, sig.args[0]), _width(context, sig.args[0])

        def at(pointer, stride, i):
            return _at(builder, pointer, builder.mul(stride, _I64(i)), vector)

        rows = [builder.load(at(source, lds, i), align=align) for i in range(LANES)]
        masks = ir.VectorType(_I32, LANES)
        for step in (1, 2, 4, 8):  # swap the off-diagonal step x step blocks
            for i in (i for i in range(LANES) if not i & step):
                upper, lower = rows[i], rows[i + step]
                left = [lane if not lane & step else LANES + lane - step for lane in range(LANES)]
                right = [lane + step if not lane & step else LANES + lane for lane in range(LANES)]
                rows[i] = builder.shuffle_vector(upper, lower, ir.Constant(masks, left))
                rows[i + step] = builder.shuffle_vector(upper, lower, ir.Constant(masks, right))
        for i in range(LANES):
            builder.store(rows[i], at(to, ldt, i), align=align)
        return context.get_dummy_value()

    return types.void(to, types.intp, source, types.intp), codegen


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
    bits = _wide(_I32, lanes)
    return builder.bitcast(builder.shl(builder.zext(memory, bits), _constant(bits, 16)), single)


def _encode(builder, value, kind: str, lanes: int):
    """From float or double to what is stored, rounded to nearest even."""
    if kind == "float64":
        return _resize(builder, value, _wide(ir.DoubleType(), lanes))
    single = _resize(builder, value, _wide(ir.FloatType(), lanes))
    if kind == "float32":
        return single
    if kind == "float16":
        return builder.fptrunc(single, _wide(ir.HalfType(), lanes))
    integer = _wide(_I32, lanes)
    bits = builder.bitcast(single, integer)
    odd = builder.and_(builder.lshr(bits, _constant(integer, 16)), _constant(integer, 1))
    rounded = builder.add(bits, builder.add(odd, _constant(integer, 0x7FFF)))
    not_a_number = builder.fcmp_unordered("uno", single, single)
    kept = builder.select(not_a_number, _constant(integer, 0x7FC00000), rounded)
    return builder.trunc(builder.lshr(kept, _constant(integer, 16)), _wide(_I16, lanes))


_STORED = {"float64": ir.DoubleType(), "float32": ir.FloatType(), "float16": ir.HalfType(), "bfloat16": _I16}
ITEM_BYTES = (8, 4, 2, 2)


def _for_each_kind(builder, kind, emit) -> None:
    """A switch over the dtype code; ``emit(name, item bytes)`` writes the code of each case."""
    after = builder.append_basic_block("converted")
    cases = [builder.append_basic_block(name) for name in KINDS]
    switch = builder.switch(kind, cases[0])
    for code, (name, block) in enumerate(zip(KINDS, cases, strict=True)):
        if code:
            switch.add_case(_I64(code), block)
        builder.position_at_end(block)
        emit(name, ITEM_BYTES[code])
        builder.branch(after)
    builder.position_at_end(after)


def _element(builder, address, index, size: int, kind: ir.Type):
    """A pointer to element ``index`` of memory at an address."""
    return builder.inttoptr(builder.add(address, builder.mul(index, _I64(size))), kind.as_pointer())


@intrinsic(prefer_literal=True)
def read(typingctx, to, address, index, kind, lanes):
    """to[index : index + lanes] = the elements ``index`` on of memory of dtype KINDS[kind]; ``lanes`` is literal."""
    count = lanes.literal_value

    def codegen(context, builder, sig, args):
        to, address, index, kind, _ = args
        target, align = _wide(context.get_data_type(sig.args[0].dtype), count), _width(context, sig.args[0])

        def emit(name: str, size: int) -> None:
            memory = builder.load(_element(builder, address, index, size, _wide(_STORED[name], count)), align=size)
            value = _resize(builder, _decode(builder, memory, name, count), target)
            builder.store(value, _at(builder, to, index, target), align=align)

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
        value = builder.load(_at(builder, source, index, given), align=_width(context, sig.args[1]))

        def emit(name: str, size: int) -> None:
            memory = _encode(builder, value, name, count)
            builder.store(memory, _element(builder, address, index, size, memory.type), align=size)

        _for_each_kind(builder, kind, emit)
        return context.get_dummy_value()

    return types.void(types.intp, source, types.intp, types.intp, lanes), codegen
