"""Products with int4 weights (float16 scale per output and 32 k) and int8 activations.

A byte holds two k of one output, so a word of four bytes is eight k deep::

    byte j of a word    | k+4+j | k+j |     low nibbles: k .. k+3, high nibbles: k+4 .. k+7

A nibble is q in 0..15 and stands for q - 8. The products take q as the *unsigned* operand, and the sum
over a group starts at ``-8 * sum of x``, which comes with the prepared row. Sums of a group are exact
integers; each is scaled and added in float32, groups in order of k::

    out = x_scale * sum over groups of  w_scale[group] * (sum over its 32 k of (q - 8) * x)

How the 32 products of a group and output are added:

* VNNI: ``vpdpbusd`` on low and on high nibbles, into int32.
* AVX2: ``pmaddubsw`` into int16: eight words of two products per lane reach at most
  16 * 15 * 127 = 30480, which fits, so one ``pmaddwd`` by ones ends the group. About half the
  instructions of int8.
* otherwise: as int8, ``pmaddwd`` on even and odd bytes widened to int16.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from numba import njit

from . import features
from .emit import F16, I16, I32, Emitter, vector
from .products import ProductKernel
from .quantize import prepare_integers, value_bytes
from .tiles import PANEL, Strip, Tile, product_function, rows_of

GROUP = 32
WORDS = GROUP // 8  # words of one output in a group


def tile_shapes(isa: features.InstructionSet) -> dict[int, int]:
    """Height -> width. Beside the float32 totals, the sums of the current group are live."""
    if isa.has_vnni:
        return {1: 3, 2: 3, 3: 3, 4: 3, 5: 1, 6: 1, 7: 1, 8: 1}
    if isa.has_avx2:
        return {1: 6, 2: 2, 3: 1, 4: 1, 5: 1, 6: 1}
    return {1: 3, 2: 2, 3: 1, 4: 1}


def emit_int4(add_group: Callable, value_size: int, e: Emitter, tile: Tile) -> None:
    """Rows times int4 weights, group by group.

    ``add_group(e, words, rows)`` returns int32 sums ``[row][vector]`` of one group, without what they
    start with: ``words`` yields its packed weights ``[vector]``, ``rows`` the addresses of its prepared x.
    """
    groups = e.div(e.add(tile.K, GROUP - 1), GROUP)
    sums_at = e.mul(groups, GROUP * value_size)  # in a row of x

    def one_strip(strip: Strip) -> None:
        def group(g, totals):
            step = e.mul(g, WORDS)
            strip.prefetch(e, step, WORDS, single_row=not e.isa.has_vnni)
            words = (strip.load(e, e.add(step, n), e.i32) for n in range(WORDS))  # loaded when they are needed
            rows = [e.add(tile.row(e, row), e.mul(g, GROUP * value_size)) for row in range(tile.height)]
            sums = add_group(e, words, rows)
            half = e.div(strip.offset, 2)  # scales take two bytes where a word takes four
            scales_at = e.add(e.add(tile.w_scale, half), e.mul(g, 2 * PANEL))
            scales = [load_half(e, e.add(scales_at, 2 * e.lanes * i)) for i in range(tile.width)]
            result = []
            for row, values in enumerate(rows_of(totals, tile.width)):
                start = e.load_broadcast(e.add(e.add(tile.row(e, row), sums_at), e.mul(g, 4)), I32)
                for i, total in enumerate(values):
                    exact = e.to_float(e.builder.add(sums[row][i], start))
                    result.append(e.fma(exact, scales[i], total))
            return result

        totals = e.loop(groups, [e.constant(e.f32, 0.0)] * (tile.height * tile.width), group)
        values = []
        for row, sums in enumerate(rows_of(totals, tile.width)):
            token_scale = e.load_broadcast(e.add(tile.x_scale, 4 * row))
            values.append([e.fmul(value, token_scale) for value in sums])
        strip.store(e, values)

    tile.strips(e, e.mul(groups, WORDS), one_strip)


def nibbles(e: Emitter, word):
    """Low and high nibbles of the bytes of ``word``, as unsigned bytes in vectors of int16."""
    b = e.builder
    word, mask = e.bitcast(word, e.i16), e.constant(e.i16, 0x0F0F)
    return b.and_(word, mask), b.and_(b.lshr(word, e.constant(e.i16, 4)), mask)


def load_half(e: Emitter, address):
    """A vector of float16 as float32.

    Without an instruction for it: a float16 whose bits are moved to a float32's place is 2**-112 too
    small, whether normal or not (there are no infinities among scales).
    """
    if e.isa.has_avx2:
        return e.builder.fpext(e.load(address, vector(F16, e.lanes)), e.f32)
    b = e.builder
    bits = b.zext(e.load(address, vector(I16, e.lanes)), e.i32)
    magnitude = b.shl(b.and_(bits, e.constant(e.i32, 0x7FFF)), e.constant(e.i32, 13))
    sign = b.shl(b.and_(bits, e.constant(e.i32, 0x8000)), e.constant(e.i32, 16))
    return e.fmul(e.bitcast(b.or_(magnitude, sign), e.f32), e.constant(e.f32, 2.0**112))


def add_group_vnni(e: Emitter, words, rows):
    """``vpdpbusd`` over the 8 quads of a group; rows are ``bytes``."""
    sums = [{} for _ in rows]
    for n, vectors in enumerate(words):
        halves = [nibbles(e, word) for word in vectors]
        for high in (0, 1):
            for row, address in enumerate(rows):
                values = e.bitcast(e.load_broadcast(e.add(address, 8 * n + 4 * high), I32), e.i8)
                for i, half in enumerate(halves):
                    before = sums[row].get(i, e.constant(e.i32, 0))
                    sums[row][i] = e.dot_accumulate_u8_i8(before, e.bitcast(half[high], e.i8), values)
    return sums


def add_group_pmaddubsw(e: Emitter, words, rows):
    """``pmaddubsw`` over the 8 quads of a group, added up in int16; rows are ``bytes``."""
    sums = [{} for _ in rows]
    for n, vectors in enumerate(words):
        halves = [nibbles(e, word) for word in vectors]
        for high in (0, 1):
            for row, address in enumerate(rows):
                values = e.bitcast(e.load_broadcast(e.add(address, 8 * n + 4 * high), I32), e.i8)
                for i, half in enumerate(halves):
                    product = e.dot_u8_i8_saturating(e.bitcast(half[high], e.i8), values)
                    sums[row][i] = e.builder.add(sums[row][i], product) if i in sums[row] else product
    ones = e.constant(e.i16, 1)
    return [{i: e.dot_i16(total, ones) for i, total in row.items()} for row in sums]


def add_group_pmaddwd(e: Emitter, words, rows):
    """``pmaddwd`` over even and odd bytes of the 8 quads of a group; rows are ``pairs``."""
    b = e.builder
    eight, low_byte = e.constant(e.i16, 8), e.constant(e.i16, 0xFF)
    sums = [{} for _ in rows]
    for n, vectors in enumerate(words):
        halves = [nibbles(e, word) for word in vectors]
        for high in (0, 1):
            for odd in (0, 1):
                weights = [b.lshr(half[high], eight) if odd else b.and_(half[high], low_byte) for half in halves]
                for row, address in enumerate(rows):
                    at = e.add(address, 16 * n + 8 * high + 4 * odd)
                    values = e.bitcast(e.load_broadcast(at, I32), e.i16)
                    for i, weight in enumerate(weights):
                        before = sums[row].get(i, e.constant(e.i32, 0))
                        sums[row][i] = b.add(before, e.dot_i16(weight, values))
    return sums


@njit(inline="always")
def panel_bytes(K):
    return (K + 31) // 32 * (16 * PANEL)


@njit(inline="always")
def scale_bytes(K):
    return (K + 31) // 32 * (2 * PANEL)


def build(format: str) -> ProductKernel:
    """The int4 kernel for this CPU."""
    isa = features.current()
    if isa.has_vnni:
        add_group, layout = add_group_vnni, "bytes"
    elif isa.has_avx2:
        add_group, layout = add_group_pmaddubsw, "bytes"
    else:
        add_group, layout = add_group_pmaddwd, "pairs"
    size = value_bytes(layout)

    emit = partial(emit_int4, add_group, size)
    product = product_function("product-int4", tile_shapes(isa), emit, panel_bytes, scale_bytes)
    prepare = prepare_integers(layout, GROUP, with_group_sums=True)

    def row_bytes(K):
        groups = (K + GROUP - 1) // GROUP
        return groups * (GROUP * size + 4)

    return ProductKernel(format, product.address, prepare.address, row_bytes, (product, prepare))
