"""Activations for the integer and bfloat16 products: one scale per token and group of k.

    scale = max |x| / 127        q = rint(x / scale)        x is about scale * q, q in -127..127

A few values of a token are far larger than the rest: a scale for all of them would leave the others few
steps. A group with a NaN or an infinity gets the scale NaN, so the outputs of its row are NaN and no other
row notices. How the q of a row lie in memory depends on the instruction that will read them; the last group
is padded with zeros:

======== ============================================= =====================================
layout   values of a quad of k                         read by
======== ============================================= =====================================
bytes    int8:   x0 x1 x2 x3                           ``vpdpbusd``, ``pmaddubsw``
pairs    int16:  x0 x2 x1 x3                           ``pmaddwd``: even k, then odd k
bfloat16 uint16: x0 x1 x2 x3 (K padded to pairs only)  ``vdpbf16ps``
======== ============================================= =====================================

After the q of an integer row come float32 scales, one for each group, and then the groups' sums::

    -128 * sum of q, int32        for int8, whose bytes are weight + 128
    scale * sum of q, float32     for int4, whose weights have a minimum
"""

from __future__ import annotations

from llvmlite import ir

from .compile_cache import c_function
from .elementwise import for_values
from .emit import F32, I8, I16, I32, Emitter, kernel, vector
from .products import PREPARE_SIGNATURE

_EXPONENT = 0x7F800000  # all ones: infinities and NaN
_MAGNITUDE = 0x7FFFFFFF
_ROUNDER, _ROUNDER_BITS = 12582912.0, 0x4B400000  # 1.5 * 2**23: adding it leaves no room for a fraction
_LANES = 16

_LAYOUTS = {"bytes": (I8, (0, 1, 2, 3)), "pairs": (I16, (0, 2, 1, 3))}  # type of a value, order in a quad


def value_bytes(layout: str) -> int:
    """Bytes of one quantised value in ``layout``."""
    return _LAYOUTS[layout][0].width // 8


def _scale_of(e: Emitter, largest: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The scale of a group whose largest magnitude has the bits ``largest``, and its inverse."""
    b = e.builder
    magnitude, steps = e.bitcast(largest, F32), ir.Constant(F32, 127.0)
    is_finite = b.icmp_signed("<", largest, ir.Constant(I32, _EXPONENT))
    scale = b.select(is_finite, b.fdiv(magnitude, steps), ir.Constant(F32, float("nan")))
    # Below this, 127 / magnitude overflows; such values are nothing beside any other in the model.
    is_large = b.fcmp_ordered(">", magnitude, ir.Constant(F32, 1e-36))
    return scale, b.select(is_large, b.fdiv(steps, magnitude), ir.Constant(F32, 0.0))


def _magnitude_bits(e: Emitter, values: ir.Value) -> ir.Value:
    """Floats without their signs are ordered like their bits."""
    integers = vector(I32, values.type.count)
    return e.builder.and_(e.bitcast(values, integers), e.constant(integers, _MAGNITUDE))


def _larger(e: Emitter):
    return lambda a, b: e.builder.select(e.builder.icmp_signed(">", a, b), a, b)


def rounded(e: Emitter, values: ir.Value, inverse: ir.Value) -> ir.Value:
    """int32 lanes ``rint(values * inverse)``."""
    integers = vector(I32, values.type.count)
    scaled = e.fmul(values, e.broadcast(inverse, values.type.count))
    bits = e.bitcast(e.fadd(scaled, e.constant(values.type, _ROUNDER)), integers)
    return e.builder.sub(bits, e.constant(integers, _ROUNDER_BITS))


def row_scale(e: Emitter, x: ir.Value, count: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The scale of a whole row of ``count`` values as one group, and its inverse."""
    larger, (groups, wide) = _larger(e), (e.div(count, _LANES), vector(F32, _LANES))

    def largest_of(address: ir.Value, type_: ir.Type, state: list[ir.Value]) -> list[ir.Value]:
        return [larger(_magnitude_bits(e, e.load(address, type_)), state[0])]

    lanes = e.loop(
        groups, [e.constant(vector(I32, _LANES), 0)], lambda i, state: largest_of(e.add(x, e.mul(i, 64)), wide, state)
    )
    first, single = e.mul(groups, _LANES), vector(F32, 1)
    rest = e.loop(
        e.builder.sub(count, first),
        [e.broadcast(e.reduce(lanes[0], larger), 1)],
        lambda i, state: largest_of(e.add(x, e.mul(e.add(first, i), 4)), single, state),
    )
    return _scale_of(e, e.builder.extract_element(rest[0], ir.Constant(I32, 0)))


def to_bfloat16(e: Emitter, values: ir.Value) -> ir.Value:
    """int16 lanes: the bits of float32 lanes rounded to the nearest bfloat16, ties to even; NaN stays NaN."""
    b, integers = e.builder, vector(I32, values.type.count)
    bits, sixteen = e.bitcast(values, integers), e.constant(integers, 16)
    is_odd = b.and_(b.lshr(bits, sixteen), e.constant(integers, 1))
    nearest = b.lshr(b.add(b.add(bits, e.constant(integers, 0x7FFF)), is_odd), sixteen)
    is_nan = b.fcmp_unordered("uno", values, values)  # rounding its bits up could make an infinity of it
    return b.trunc(b.select(is_nan, e.constant(integers, 0x7FC0), nearest), vector(I16, values.type.count))


def _group_kernel(layout: str, size: int, sum_factor: int | None):
    """``quantise(x, count, q, scale, sum)``: one group, ``count`` of whose values are there."""
    type_, order = _LAYOUTS[layout]
    bytes_ = type_.width // 8
    lanes = [quad + i for quad in range(0, _LANES, 4) for i in order]

    def finish(e: Emitter, total, scale, scale_at, sum_at) -> None:
        if sum_factor is None:
            sum_ = e.fmul(e.builder.sitofp(total, F32), scale)
        else:
            sum_ = e.builder.mul(total, ir.Constant(I32, sum_factor))
        e.store(scale, scale_at)
        e.store(sum_, sum_at)

    def whole(e: Emitter, x, q, scale_at, sum_at) -> None:
        values = [e.load(e.add(x, 4 * first), vector(F32, _LANES)) for first in range(0, size, _LANES)]
        largest = _magnitude_bits(e, values[0])
        for more in values[1:]:
            largest = _larger(e)(_magnitude_bits(e, more), largest)
        scale, inverse = _scale_of(e, e.reduce(largest, _larger(e)))
        sums = None
        for n, vector_ in enumerate(values):
            integers = rounded(e, vector_, inverse)
            sums = integers if sums is None else e.builder.add(sums, integers)
            if layout == "pairs":
                integers = e.builder.shuffle_vector(integers, integers, ir.Constant(vector(I32, _LANES), lanes))
            e.store(e.builder.trunc(integers, vector(type_, _LANES)), e.add(q, _LANES * bytes_ * n))
        finish(e, e.reduce(sums, e.builder.add), scale, scale_at, sum_at)

    def part(e: Emitter, x, count, q, scale_at, sum_at) -> None:
        """The same, value by value."""
        one = vector(F32, 1)

        def only(value):
            return e.builder.extract_element(value, ir.Constant(I32, 0))

        def value(k):
            return e.load(e.add(x, e.mul(k, 4)), one)

        scale, inverse = row_scale(e, x, count)
        for first in range(0, size, _LANES):
            e.store(e.constant(vector(type_, _LANES), 0), e.add(q, first * bytes_))

        def quantise_one(k, state):
            integer = only(rounded(e, value(k), inverse))
            place = k
            if layout == "pairs":  # k of 1 and 2 change places
                b, i = e.builder, e.builder.and_(k, e.const(3))
                swapped = b.or_(b.shl(b.and_(i, e.const(1)), e.const(1)), b.lshr(i, e.const(1)))
                place = e.add(b.sub(k, i), swapped)
            e.store(e.builder.trunc(integer, type_), e.add(q, e.mul(place, bytes_)))
            return [e.builder.add(state[0], integer)]

        finish(e, e.loop(count, [ir.Constant(I32, 0)], quantise_one)[0], scale, scale_at, sum_at)

    @kernel(5)
    def quantise(e, x, count, q, scale_at, sum_at):
        is_whole = e.builder.zext(e.builder.icmp_signed("==", count, e.const(size)), count.type)
        e.switch(
            is_whole,
            {1: lambda: whole(e, x, q, scale_at, sum_at), 0: lambda: part(e, x, count, q, scale_at, sum_at)},
        )

    return quantise


def prepare_groups(layout: str, size: int, sum_factor: int | None):
    """Compile ``prepare`` for integer products with groups of ``size`` k.

    A group's sum is ``sum_factor * sum of q``, or without a factor the float32 ``scale * sum of q``.
    """
    quantise, item = _group_kernel(layout, size, sum_factor), value_bytes(layout)

    @c_function(PREPARE_SIGNATURE, f"prepare-{layout}-{size}-{sum_factor}")
    def prepare(x, x_stride, K, first_row, last_row, prepared, prepared_stride):
        groups = (K + size - 1) // size
        for row in range(first_row, last_row):
            q = prepared + row * prepared_stride
            scales = q + groups * size * item
            for group in range(groups):
                first = group * size
                quantise(
                    x + row * x_stride + 4 * first,
                    min(size, K - first),
                    q + first * item,
                    scales + 4 * group,
                    scales + 4 * (groups + group),
                )

    return prepare


@kernel(3)
def _bfloat16_row(e, x, K, q):
    """Round a row; a zero completes the last pair."""

    def body(offset, type_):
        e.store(to_bfloat16(e, e.load(e.add(x, offset), type_)), e.add(q, e.div(offset, 2)))

    last = e.builder.or_(e.add(K, -1), e.const(1))
    e.store(ir.Constant(I16, 0), e.add(q, e.mul(last, 2)))
    for_values(e, K, body)


def prepare_bfloat16():
    """Compile ``prepare`` for bfloat16 dot products."""

    @c_function(PREPARE_SIGNATURE, "prepare-bfloat16")
    def prepare(x, x_stride, K, first_row, last_row, prepared, prepared_stride):
        for row in range(first_row, last_row):
            _bfloat16_row(x + row * x_stride, K, prepared + row * prepared_stride)

    return prepare
