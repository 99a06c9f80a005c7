"""Products with int8 weights (a scale per output) and int8 activations (a scale per token).

Sums are exact: int8 products add up in int32, and only the finished sum is scaled. A word holds four k
of one output, so one vector of words is 8 (AVX2) or 16 (AVX-512) outputs and four k deep.

With VNNI one instruction does it all. ``vpdpbusd`` multiplies unsigned by signed bytes, so x comes as
x + 128 and the accumulators start at ``-128 * sum of weights``::

    acc[i] += u[4i]*s[4i] + u[4i+1]*s[4i+1] + u[4i+2]*s[4i+2] + u[4i+3]*s[4i+3]

AVX2 multiplies unsigned by signed bytes, too, in two steps, but ``pmaddubsw`` adds pairs in 16 bits and
saturates: 2 * 255 * 127 does not fit. 2 * 127 * 127 does. So the sign of the weight moves to x::

    w * x == |w| * (x with the sign of w)        |w| once for all rows of a tile (pabsb, psignb)

and a second step, ``pmaddwd`` by ones, adds the two pairs of a word in 32 bits.

Anything else multiplies 16-bit pairs. A word splits into its even and its odd bytes as two pairs of int16,
with shifts that all rows of a tile share; x comes as int16 in the matching order::

    word        | w3 | w2 | w1 | w0 |
    even        |    w2   |    w0   |   (word16 << 8) >> 8      times   | x2 | x0 |
    odd         |    w3   |    w1   |    word16 >> 8            times   | x3 | x1 |
"""

from __future__ import annotations

from llvmlite import ir
from numba import njit

from . import features
from .emit import I32, Emitter
from .products import ProductKernel
from .quantize import prepare_integers, value_bytes
from .tiles import PANEL, Strip, Tile, product_function, rows_of


def tile_shapes(isa: features.InstructionSet) -> dict[int, int]:
    """Height -> width. Without VNNI two vectors are live for each vector of weights."""
    panel = PANEL // isa.lanes
    if isa.has_vnni:
        return {height: panel for height in range(1, 9)}
    return {1: 6, 2: 3, 3: 3, 4: 2}


def emit_vnni(e: Emitter, tile: Tile) -> None:
    """Rows of ``biased`` bytes, by ``vpdpbusd``."""

    def one_strip(strip: Strip) -> None:
        def step(quad, totals):
            strip.prefetch(e, quad)
            words, result = strip.load(e, quad, e.i8), []
            for row, sums in enumerate(rows_of(totals, tile.width)):
                values = e.bitcast(e.load_broadcast(e.add(tile.row(e, row), e.mul(quad, 4)), I32), e.i8)
                result += [e.dot_accumulate_u8_i8(total, values, word) for total, word in zip(sums, words, strict=True)]
            return result

        start = strip.of_row(e, tile.w_aux, e.i32) * tile.height
        scale_and_store(e, strip, e.loop(quads(e, tile), start, step))

    tile.strips(e, quads(e, tile), one_strip)


def emit_pmaddwd(e: Emitter, tile: Tile) -> None:
    """Rows of ``pairs``, by ``pmaddwd``."""
    b, eight = e.builder, e.constant(e.i16, 8)

    def one_strip(strip: Strip) -> None:
        def step(quad, totals):
            strip.prefetch(e, quad, single_row=True)
            words, result = strip.load(e, quad, e.i16), []
            even = [b.ashr(b.shl(word, eight), eight) for word in words]
            odd = [b.ashr(word, eight) for word in words]
            for row, sums in enumerate(rows_of(totals, tile.width)):
                address = e.add(tile.row(e, row), e.mul(quad, 8))
                x_even, x_odd = (e.bitcast(e.load_broadcast(e.add(address, half), I32), e.i16) for half in (0, 4))
                for i, total in enumerate(sums):
                    total = b.add(total, e.dot_i16(even[i], x_even))
                    result.append(b.add(total, e.dot_i16(odd[i], x_odd)))
            return result

        start = [e.constant(e.i32, 0)] * (tile.height * tile.width)
        scale_and_store(e, strip, e.loop(quads(e, tile), start, step))

    tile.strips(e, quads(e, tile), one_strip)


def emit_pmaddubsw(e: Emitter, tile: Tile) -> None:
    """Rows of ``bytes``, by ``pmaddubsw`` on ``|w|`` and ``x`` with the sign of ``w``."""
    ones = e.constant(e.i16, 1)

    def one_strip(strip: Strip) -> None:
        def step(quad, totals):
            strip.prefetch(e, quad, single_row=True)
            words, result = strip.load(e, quad, e.i8), []
            magnitudes = [e.abs_i8(word) for word in words]
            for row, sums in enumerate(rows_of(totals, tile.width)):
                values = e.bitcast(e.load_broadcast(e.add(tile.row(e, row), e.mul(quad, 4)), I32), e.i8)
                for i, total in enumerate(sums):
                    pairs = e.dot_u8_i8_saturating(magnitudes[i], e.sign_i8(values, words[i]))
                    result.append(e.builder.add(total, e.dot_i16(pairs, ones)))
            return result

        start = [e.constant(e.i32, 0)] * (tile.height * tile.width)
        scale_and_store(e, strip, e.loop(quads(e, tile), start, step))

    tile.strips(e, quads(e, tile), one_strip)


def quads(e: Emitter, tile: Tile) -> ir.Value:
    """Quads of k, the last one padded with zeros."""
    return e.div(e.add(tile.K, 3), 4)


def scale_and_store(e: Emitter, strip: Strip, totals: list[ir.Value]) -> None:
    """Exact sums -> ``sum * weight scale * token scale`` -> out."""
    tile = strip.tile
    w_scales = strip.of_row(e, tile.w_scale, e.f32)
    values = []
    for row, sums in enumerate(rows_of(totals, tile.width)):
        token_scale = e.load_broadcast(e.add(tile.x_scale, 4 * row))
        by_weight = [e.fmul(e.to_float(exact), scale) for exact, scale in zip(sums, w_scales, strict=True)]
        values.append([e.fmul(value, token_scale) for value in by_weight])
    strip.store(e, values)


@njit(inline="always")
def panel_bytes(K):
    return (K + 3) // 4 * (4 * PANEL)


@njit(inline="always")
def scale_bytes(K):
    return 4 * PANEL


def build(format: str) -> ProductKernel:
    """The int8 kernel for this CPU."""
    isa = features.current()
    if isa.has_vnni:
        emit, layout = emit_vnni, "biased"
    elif isa.has_avx2:
        emit, layout = emit_pmaddubsw, "bytes"
    else:
        emit, layout = emit_pmaddwd, "pairs"
    product = product_function("product-int8", tile_shapes(isa), emit, panel_bytes, scale_bytes)
    prepare = prepare_integers(layout, 4, with_group_sums=False)
    size = value_bytes(layout)
    return ProductKernel(
        format, product.address, prepare.address, lambda K: (K + 3) // 4 * 4 * size, (product, prepare)
    )
