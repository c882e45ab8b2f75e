"""The three products that all arithmetic is made of, and the 16 x 16 transposition.

A tile is a matrix [n, 16]: one column, one SIMD lane, per query. Keys and values are rows in memory,
found by lists of addresses, and read where they are: one element of a row is broadcast to all lanes.

    multiply_keys   scores [keys, 16]  = start + keys [keys, d] @ lanes [d, 16]
    add_weighted    out [d, 16]       += values.T [d, keys] @ weights [keys, 16]
    add_to_keys     sums [keys, d]    += weights [keys, 16] @ rows [16, d]
"""

from __future__ import annotations

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types

from natcore.backends.cpu.simd import FAST, I32, I64, LANES, broadcast, element_at, intrinsic, item_bytes, vector_of

#: Rows of a product that are kept in registers at once: 8 vectors of float32 in half of AVX-512's 32 registers, 4
#: in half of AVX2's or NEON's. Row counts are rounded up to it.
BLOCK = 8 if get_host_cpu_features().get("avx512f") else 4


def _sums(builder, begin: list, terms, factor, scalar) -> list:
    """begin[i] + sum over j < terms of factor(j) * scalar(i, j) for every i, all sums in registers.

    ``factor`` emits a vector and ``scalar`` a number that is broadcast: per j one load and one
    multiply-add with a broadcast memory operand per i. This loop is the heart of everything.
    """
    before, loop, after = (builder.block, builder.append_basic_block("terms"), builder.append_basic_block("sums"))
    builder.cbranch(builder.icmp_signed(">", terms, I64(0)), loop, after)
    builder.position_at_end(loop)
    j = builder.phi(I64)
    sums = [builder.phi(x.type) for x in begin]
    vector = factor(j)
    totals = []
    for i, total in enumerate(sums):
        product = builder.fmul(broadcast(builder, scalar(i, j)), vector, flags=FAST)
        totals.append(builder.fadd(product, total, flags=FAST))
    following = builder.add(j, I64(1))
    end = builder.block
    builder.cbranch(builder.icmp_signed("<", following, terms), loop, after)
    j.add_incoming(I64(0), before)
    j.add_incoming(following, end)
    builder.position_at_end(after)
    results = [builder.phi(x.type) for x in begin]
    for first, total, new, result in zip(begin, sums, totals, results, strict=True):
        total.add_incoming(first, before)
        total.add_incoming(new, end)
        result.add_incoming(first, before)
        result.add_incoming(new, end)
    return results


class _Rows:
    """Emits access to rows of 16 lanes, ``stride`` elements apart."""

    def __init__(self, context, builder, pointer_type):
        self.builder, self.width = builder, item_bytes(context, pointer_type)
        self.vector = vector_of(context, pointer_type)
        self.element = context.get_value_type(pointer_type)

    def place(self, pointer, stride, i):
        return element_at(self.builder, pointer, self.builder.mul(stride, i), self.vector)

    def load(self, pointer, stride, i):
        return self.builder.load(self.place(pointer, stride, i), align=self.width)

    def store(self, value, pointer, stride, i) -> None:
        self.builder.store(value, self.place(pointer, stride, i), align=self.width)

    def listed(self, addresses, i):
        """The pointer whose address is addresses[i]."""
        return self.builder.inttoptr(self.builder.load(self.builder.gep(addresses, [i])), self.element)


@intrinsic
def multiply_keys(typingctx, scores, start, stride, lanes, keys, count):
    """scores[i, lane] = start[i * stride + lane] + sum over j < count of keys[i][j] * lanes[j, lane], for i < BLOCK.

    ``keys`` lists the addresses of BLOCK rows of ``count`` elements.
    """

    def codegen(context, builder, sig, args):
        scores, start, stride, lanes, keys, count = args
        access, sixteen = _Rows(context, builder, sig.args[0]), I64(LANES)
        rows = [access.listed(keys, I64(i)) for i in range(BLOCK)]
        begin = [access.load(start, stride, I64(i)) for i in range(BLOCK)]

        def scalar(i, j):
            return builder.load(builder.gep(rows[i], [j]))

        sums = _sums(builder, begin, count, lambda j: access.load(lanes, sixteen, j), scalar)
        for i, total in enumerate(sums):
            access.store(total, scores, sixteen, I64(i))
        return context.get_dummy_value()

    n = types.intp
    return types.void(scores, start, n, lanes, keys, n), codegen


@intrinsic
def add_weighted(typingctx, out, weights, values, first, keys):
    """out[i, lane] += sum over j < keys of values[j][first + i] * weights[j, lane], for i < BLOCK.

    ``values`` lists the addresses of rows.
    """

    def codegen(context, builder, sig, args):
        out, weights, values, first, keys = args
        access, sixteen, row = _Rows(context, builder, sig.args[0]), I64(LANES), {}

        def factor(j):
            row[0] = builder.gep(access.listed(values, j), [first])
            return access.load(weights, sixteen, j)

        def scalar(i, j):
            return builder.load(builder.gep(row[0], [I64(i)]))

        begin = [access.load(out, sixteen, I64(i)) for i in range(BLOCK)]
        for i, total in enumerate(_sums(builder, begin, keys, factor, scalar)):
            access.store(total, out, sixteen, I64(i))
        return context.get_dummy_value()

    n = types.intp
    return types.void(out, weights, values, n, n), codegen


@intrinsic
def add_to_keys(typingctx, sums, first, weights, rows, pitch):
    """sums[i][first + 0 ... 15] += sum over lanes of weights[i, lane] * rows[lane * pitch + 0 ... 15], for i < BLOCK.

    ``sums`` lists the addresses of rows.
    """

    def codegen(context, builder, sig, args):
        sums, first, weights, rows, pitch = args
        access, zero = _Rows(context, builder, sig.args[2]), I64(0)
        targets = [builder.gep(access.listed(sums, I64(i)), [first]) for i in range(BLOCK)]

        def scalar(i, j):
            return builder.load(builder.gep(weights, [builder.add(I64(i * LANES), j)]))

        begin = [access.load(target, zero, zero) for target in targets]
        totals = _sums(builder, begin, I64(LANES), lambda j: access.load(rows, pitch, j), scalar)
        for total, target in zip(totals, targets, strict=True):
            access.store(total, target, zero, zero)
        return context.get_dummy_value()

    n = types.intp
    return types.void(sums, n, weights, rows, n), codegen


@intrinsic
def transpose(typingctx, to, ldt, source, lds):
    """A 16 x 16 block: to[j*ldt + i] = source[i*lds + j], in registers (log2(16) steps)."""

    def codegen(context, builder, sig, args):
        to, ldt, source, lds = args
        access, masks = _Rows(context, builder, sig.args[0]), ir.VectorType(I32, LANES)
        rows = [access.load(source, lds, I64(i)) for i in range(LANES)]
        for step in (1, 2, 4, 8):  # swap the off-diagonal step x step blocks
            for i in (i for i in range(LANES) if not i & step):
                upper, lower = rows[i], rows[i + step]
                left = [lane if not lane & step else LANES + lane - step for lane in range(LANES)]
                right = [lane + step if not lane & step else LANES + lane for lane in range(LANES)]
                rows[i] = builder.shuffle_vector(upper, lower, ir.Constant(masks, left))
                rows[i + step] = builder.shuffle_vector(upper, lower, ir.Constant(masks, right))
        for i in range(LANES):
            access.store(rows[i], to, ldt, I64(i))
        return context.get_dummy_value()

    return types.void(to, types.intp, source, types.intp), codegen
