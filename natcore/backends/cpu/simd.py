"""Sixteen lanes at a time: a numba type for a SIMD vector, and the few operations on it.

LLVM is handed `<16 x T>` and splits it as the host requires (one AVX-512 register, two AVX2, four
NEON for float32), so nothing here depends on the auto-vectoriser's mood. T is the dtype of the
arithmetic, float32 or float64. Kernels see memory through typed pointers, as C does: no shapes, no
reference counts, nothing to pass along but an address.
"""

from __future__ import annotations

import math
import operator
import struct
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import extending
from numba.core.extending import lower_builtin, models, register_model
from numba.core.typing.templates import AbstractTemplate, infer_global, signature

#: Untyped: a kernel calls an intrinsic without the first parameter that its definition has.
intrinsic: Any = extending.intrinsic

LANES = 16
I16, I32, I64 = (ir.IntType(n) for n in (16, 32, 64))
FAST = ("contract", "nsz")


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


def constant(kind: ir.Type, value: float) -> ir.Constant:
    return ir.Constant(kind, [value] * kind.count if isinstance(kind, ir.VectorType) else value)


def broadcast(builder, value, lanes: int = LANES):
    undefined = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    first = builder.insert_element(undefined, value, I32(0))
    return builder.shuffle_vector(first, undefined, constant(ir.VectorType(I32, lanes), 0))


def element_at(builder, pointer, index, kind: ir.Type | None = None):
    """The address of pointer[index], as a pointer to ``kind`` (default: the element)."""
    place = builder.gep(pointer, [index])
    return place if kind is None else builder.bitcast(place, kind.as_pointer())


def item_bytes(context, pointer_type) -> int:
    return context.get_abi_sizeof(context.get_data_type(pointer_type.dtype))


def vector_of(context, pointer_type) -> ir.VectorType:
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
def address_of(typingctx, pointer, index):
    """The address of pointer[index]."""

    def codegen(context, builder, sig, args):
        return builder.ptrtoint(builder.gep(args[0], [args[1]]), I64)

    return types.intp(pointer, types.intp), codegen


@intrinsic
def outlined(typingctx):
    """Keeps LLVM from inlining the function that says this: one copy of its code is enough."""

    def codegen(context, builder, sig, args):
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.void(), codegen


def _arithmetic(python_operator, opcode: str) -> None:
    register: Any = infer_global(python_operator)

    @register
    class _Typing(AbstractTemplate):
        def generic(self, args, kws):
            if len(args) == 2 and isinstance(args[0], Vector) and args[0] == args[1]:
                return signature(args[0], *args)

    @lower_builtin(python_operator, Vector, Vector)
    def _lower(context, builder, sig, args):
        return getattr(builder, opcode)(*args, flags=FAST)


for _operator, _opcode in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _arithmetic(_operator, _opcode)


@intrinsic
def load(typingctx, pointer, index):
    """Sixteen elements from pointer[index] on; no alignment is needed."""

    def codegen(context, builder, sig, args):
        place = element_at(builder, args[0], args[1], vector_of(context, sig.args[0]))
        return builder.load(place, align=item_bytes(context, sig.args[0]))

    return Vector(pointer.dtype)(pointer, types.intp), codegen


@intrinsic
def store(typingctx, pointer, index, vector):
    """Sixteen elements to pointer[index] on."""

    def codegen(context, builder, sig, args):
        place = element_at(builder, args[0], args[1], args[2].type)
        builder.store(args[2], place, align=item_bytes(context, sig.args[0]))
        return context.get_dummy_value()

    return types.void(pointer, types.intp, vector), codegen


@intrinsic
def splat(typingctx, pointer, value):
    """The scalar in every lane, in the dtype that ``pointer`` points to."""

    def codegen(context, builder, sig, args):
        return broadcast(builder, context.cast(builder, args[1], sig.args[1], sig.args[0].dtype))

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


#: By element: mantissa bits, exponent bias, the lowest argument with a normal result, order of the polynomial.
_EXP = {types.float32: (23, 127, -87.0, 6), types.float64: (52, 1023, -708.0, 12)}
#: By element: mantissa bits, highest power of the series.
_LOG = {types.float32: (23, 9), types.float64: (52, 21)}


@intrinsic
def exp(typingctx, x):
    """e ** x to a few units in the last place; 0 below the normal numbers; for x <= 88.

    x = n ln 2 + r with |r| <= ln 2 / 2; e ** r by a polynomial that interpolates it at Chebyshev nodes.
    Adding 3/2 * 2 ** mantissa rounds to an integer, which then stands in the low bits: n plus the
    exponent's bias, so that a shift makes 2 ** n of it. NaN stays NaN.
    """
    mantissa, bias, lowest, order = _EXP[x.element]
    fit = np.polynomial.Chebyshev.interpolate(np.exp, order, domain=[-math.log(2) / 2, math.log(2) / 2])
    coefficients = fit.convert(kind=np.polynomial.Polynomial).coef

    def codegen(context, builder, sig, args):
        kind = args[0].type
        integer = ir.VectorType(ir.IntType(64 if mantissa == 52 else 32), LANES)

        def c(value: float) -> ir.Constant:
            return constant(kind, float(value))

        def fma(a, b, addend):
            return builder.fadd(builder.fmul(a, b, flags=FAST), addend, flags=FAST)

        magic = 1.5 * 2.0**mantissa + bias
        shifted_n = fma(args[0], c(1 / math.log(2)), c(magic))
        r = fma(builder.fsub(shifted_n, c(magic)), c(-math.log(2)), args[0])
        power = c(coefficients[-1])
        for coefficient in coefficients[-2::-1]:
            power = fma(power, r, c(coefficient))
        scale = builder.bitcast(builder.shl(builder.bitcast(shifted_n, integer), constant(integer, mantissa)), kind)
        result = builder.fmul(power, scale)
        return builder.select(builder.fcmp_ordered("<", args[0], c(lowest)), c(0.0), result)

    return x(x), codegen


@intrinsic
def log(typingctx, x):
    """The natural logarithm of positive normal numbers, to about one unit in the last place.

    x = 2 ** n * m with sqrt(1/2) <= m < sqrt(2); log m = 2 artanh s, s = (m - 1) / (m + 1), by its
    Taylor series to the order whose remainder is below the rounding.
    """
    mantissa, order = _LOG[x.element]

    def codegen(context, builder, sig, args):
        kind = args[0].type
        integer = ir.VectorType(ir.IntType(64 if mantissa == 52 else 32), LANES)

        def c(value: float) -> ir.Constant:
            return constant(kind, value)

        bits = builder.bitcast(args[0], integer)
        half = struct.unpack("<q", struct.pack("<d", 0.5**0.5))[0] if mantissa == 52 else 0x3F3504F3
        n = builder.ashr(builder.sub(bits, constant(integer, half)), constant(integer, mantissa))
        m = builder.bitcast(builder.sub(bits, builder.shl(n, constant(integer, mantissa))), kind)
        s = builder.fdiv(builder.fsub(m, c(1.0)), builder.fadd(m, c(1.0)))
        square, series = builder.fmul(s, s), c(1 / order)
        for k in range(order - 2, 0, -2):
            series = builder.fadd(builder.fmul(series, square, flags=FAST), c(1 / k), flags=FAST)
        whole = builder.fmul(builder.sitofp(n, kind), c(math.log(2)))
        return builder.fadd(builder.fmul(builder.fadd(s, s), series, flags=FAST), whole, flags=FAST)

    return x(x), codegen
