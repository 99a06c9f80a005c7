"""Products with int8 weights (a scale per output) and int8 activations (a scale per token).

Sums are exact: int8 products add up in int32, and only the finished sum is scaled. A word holds four k
of one output, so one vector of words is 8 (AVX2) or 16 (AVX-512) outputs and four k deep.

With VNNI one instruction does it all. ``vpdpbusd`` multiplies unsigned by signed bytes, so x comes as
x + 128 and the accumulators start at ``-128 * sum of weights``::

    acc[i] += u[4i]*s[4i] + u[4i+1]*s[4i+1] + u[4i+2]*s[4i+2] + u[4i+3]*s[4i+3]

Without it, ``pmaddwd`` multiplies 16-bit pairs. A word splits into its even and its odd bytes as two
pairs of int16, with shifts that all rows of a tile share; x comes as int16 in the matching order::

    word        | w3 | w2 | w1 | w0 |
    even        |    w2   |    w0   |   (word16 << 8) >> 8      times   | x2 | x0 |
    odd         |    w3   |    w1   |    word16 >> 8            times   | x3 | x1 |

(``pmaddubsw`` would do four bytes at once, but saturates at 16 bits: 2 * 127 * 255 does not fit.)
"""

from __future__ import annotations

from numba import njit

from . import features
from .emit import I32, Emitter
from .products import ProductKernel
from .quantize import prepare_integers, value_bytes
from .tiles import PANEL, product_function, rows_of, store_tile, strips


def tile_shapes(isa: features.InstructionSet) -> dict[int, int]:
    """Height -> width. Without VNNI two unpacked halves of each weight vector are live."""
    panel = PANEL // isa.lanes
    if isa.has_vnni:
        return {height: panel for height in range(1, 9)}
    return {1: 3, 2: 3, 3: 3, 4: 2}


def emit_vnni(e: Emitter, height, width, x, x_stride, x_scale, w, w_scale, w_aux, K, out, out_stride, accumulate):
    """``height`` rows times one panel by ``vpdpbusd``; rows are ``biased`` bytes."""

    def strip(index):
        offset = e.mul(index, width * e.isa.vector_bytes)
        start = [e.load(e.add(e.add(w_aux, offset), i * e.isa.vector_bytes), e.i32) for i in range(width)]

        def step(quad, totals):
            words = load_words(e, e.add(w, offset), quad, width)
            result = []
            for row in range(height):
                address = e.add(e.add(x, e.mul(x_stride, row)), e.mul(quad, 4))
                values = e.bitcast(e.load_broadcast(address, I32), e.i8)
                result += [
                    e.dot_accumulate_u8_i8(totals[row * width + i], values, e.bitcast(words[i], e.i8))
                    for i in range(width)
                ]
            return result

        totals = e.loop(quads(e, K), start * height, step)
        scale_and_store(e, totals, width, offset, x_scale, w_scale, out, out_stride, accumulate)

    strips(e, width, strip)


def emit_pmaddwd(e: Emitter, height, width, x, x_stride, x_scale, w, w_scale, w_aux, K, out, out_stride, accumulate):
    """``height`` rows times one panel by ``pmaddwd``; rows are ``pairs``."""
    eight = e.constant(e.i16, 8)
    b = e.builder

    def strip(index):
        offset = e.mul(index, width * e.isa.vector_bytes)

        def step(quad, totals):
            words = [e.bitcast(word, e.i16) for word in load_words(e, e.add(w, offset), quad, width)]
            even = [b.ashr(b.shl(word, eight), eight) for word in words]
            odd = [b.ashr(word, eight) for word in words]
            result = []
            for row in range(height):
                address = e.add(e.add(x, e.mul(x_stride, row)), e.mul(quad, 8))
                x_even, x_odd = (e.bitcast(e.load_broadcast(e.add(address, half), I32), e.i16) for half in (0, 4))
                for i in range(width):
                    total = b.add(totals[row * width + i], e.dot_i16(even[i], x_even))
                    result.append(b.add(total, e.dot_i16(odd[i], x_odd)))
            return result

        totals = e.loop(quads(e, K), [e.constant(e.i32, 0)] * (height * width), step)
        scale_and_store(e, totals, width, offset, x_scale, w_scale, out, out_stride, accumulate)

    strips(e, width, strip)


def quads(e: Emitter, K):
    """Quads of k, the last one padded with zeros."""
    return e.div(e.add(K, 3), 4)


def load_words(e: Emitter, w, quad, width):
    """The ``width`` vectors of a strip for one quad of k."""
    address = e.add(w, e.mul(quad, 4 * PANEL))
    return [e.load(e.add(address, i * e.isa.vector_bytes), e.i32) for i in range(width)]


def scale_and_store(e: Emitter, totals, width, offset, x_scale, w_scale, out, out_stride, accumulate):
    """Exact sums -> ``sum * weight scale * token scale`` -> out."""
    w_scales = [e.load(e.add(e.add(w_scale, offset), i * e.isa.vector_bytes), e.f32) for i in range(width)]
    tile = []
    for row, sums in enumerate(rows_of(totals, width)):
        token_scale = e.load_broadcast(e.add(x_scale, 4 * row))
        by_weight = [e.fmul(e.to_float(exact), scale) for exact, scale in zip(sums, w_scales, strict=True)]
        tile.append([e.fmul(value, token_scale) for value in by_weight])
    store_tile(e, tile, e.add(out, offset), out_stride, accumulate)


@njit(inline="always")
def panel_bytes(K):
    return (K + 3) // 4 * (4 * PANEL)


@njit(inline="always")
def scale_bytes(K):
    return 4 * PANEL


def build(format: str) -> ProductKernel:
    """The int8 kernel for this CPU."""
    isa = features.current()
    emit, layout = (emit_vnni, "biased") if isa.has_vnni else (emit_pmaddwd, "pairs")
    product = product_function("product-int8", tile_shapes(isa), emit, panel_bytes, scale_bytes)
    prepare = prepare_integers(layout, 4, with_group_sums=False)
    size = value_bytes(layout)
    return ProductKernel(
        format, product.address, prepare.address, lambda K: (K + 3) // 4 * 4 * size, (product, prepare)
    )
