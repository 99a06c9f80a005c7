"""Products with float32 and bfloat16 weights: fused multiply-adds on float32 rows.

float32 panels are ``[K][48]``. bfloat16 panels are ``[K/2][48][2]``: the two k of a pair lie in one
32-bit word, and widening is one shift or one mask (a bfloat16 is the upper half of a float32)::

    word    | k+1: sEEEEEEE EMMMMMMM | k: sEEEEEEE EMMMMMMM |
    k       word << 16                  k+1     word & 0xffff0000

With AVX-512 BF16, x is rounded to bfloat16, too, and ``vdpbf16ps`` multiplies a pair at once.
"""

from __future__ import annotations

from numba import njit

from . import features
from .emit import I32, Emitter
from .products import ProductKernel
from .quantize import prepare_bfloat16
from .tiles import PANEL, no_bytes, product_function, rows_of, store_tile, strips


def tile_shapes(isa: features.InstructionSet) -> dict[int, int]:
    """Height -> width: accumulators, weights of one k and one broadcast must fit the registers."""
    panel = PANEL // isa.lanes
    if isa.vector_bytes == 64:
        return {height: panel for height in range(1, 9)}  # 8 x 3: 24 of 32
    return {1: 6, 2: 3, 3: 3, 4: 2, 5: 2, 6: 2}  # 6 x 2: 12 of 16


def emit_float32(
    e: Emitter, height, width, x, x_stride, x_scale, w, w_scale, w_aux, K, out, out_stride, accumulate
):
    """``height`` rows times one panel of float32 weights."""
    strip_bytes = width * e.isa.vector_bytes

    def strip(index):
        w_strip = e.add(w, e.mul(index, strip_bytes))

        def step(k, totals):
            weights = [e.load(e.add(w_k(k), i * e.isa.vector_bytes), e.f32) for i in range(width)]
            return multiply_add(e, totals, x, x_stride, e.mul(k, 4), weights)

        def w_k(k):
            return e.add(w_strip, e.mul(k, 4 * PANEL))

        totals = e.loop(K, [e.constant(e.f32, 0.0)] * (height * width), step)
        store_tile(e, rows_of(totals, width), e.add(out, e.mul(index, strip_bytes)), out_stride, accumulate)

    strips(e, width, strip)


def emit_bfloat16(
    e: Emitter, height, width, x, x_stride, x_scale, w, w_scale, w_aux, K, out, out_stride, accumulate
):
    """``height`` rows times one panel of bfloat16 weights, widened to float32."""
    strip_bytes = width * e.isa.vector_bytes
    sixteen, upper = e.constant(e.i32, 16), e.constant(e.i32, -65536)

    def strip(index):
        w_strip = e.add(w, e.mul(index, strip_bytes))

        def words(pair):
            address = e.add(w_strip, e.mul(pair, 4 * PANEL))
            return [e.load(e.add(address, i * e.isa.vector_bytes), e.i32) for i in range(width)]

        def first(words):
            return [e.bitcast(e.builder.shl(word, sixteen), e.f32) for word in words]

        def second(words):
            return [e.bitcast(e.builder.and_(word, upper), e.f32) for word in words]

        def step(pair, totals):
            loaded = words(pair)
            offset = e.mul(pair, 8)
            totals = multiply_add(e, totals, x, x_stride, offset, first(loaded))
            return multiply_add(e, totals, x, x_stride, e.add(offset, 4), second(loaded))

        def odd_end(_, totals):
            pair = e.div(K, 2)
            return multiply_add(e, totals, x, x_stride, e.mul(pair, 8), first(words(pair)))

        totals = e.loop(e.div(K, 2), [e.constant(e.f32, 0.0)] * (height * width), step)
        totals = e.loop(e.builder.and_(K, e.const(1)), totals, odd_end)
        store_tile(e, rows_of(totals, width), e.add(out, e.mul(index, strip_bytes)), out_stride, accumulate)

    strips(e, width, strip)


def emit_bfloat16_dot(
    e: Emitter, height, width, x, x_stride, x_scale, w, w_scale, w_aux, K, out, out_stride, accumulate
):
    """``height`` rows of bfloat16 times one panel of bfloat16 weights, by ``vdpbf16ps``."""
    strip_bytes = width * e.isa.vector_bytes

    def strip(index):
        w_strip = e.add(w, e.mul(index, strip_bytes))

        def step(pair, totals):
            address = e.add(w_strip, e.mul(pair, 4 * PANEL))
            words = [e.load(e.add(address, i * e.isa.vector_bytes), e.i32) for i in range(width)]
            result = []
            for row in range(height):
                values = e.load_broadcast(e.add(e.add(x, e.mul(x_stride, row)), e.mul(pair, 4)), I32)
                result += [e.dot_accumulate_bf16(totals[row * width + i], words[i], values) for i in range(width)]
            return result

        pairs = e.div(e.add(K, 1), 2)
        totals = e.loop(pairs, [e.constant(e.f32, 0.0)] * (height * width), step)
        store_tile(e, rows_of(totals, width), e.add(out, e.mul(index, strip_bytes)), out_stride, accumulate)

    strips(e, width, strip)


def multiply_add(e: Emitter, totals, x, x_stride, offset, weights):
    """One k of a tile: every accumulator gains ``x[row, k] * weight[vector]``."""
    width = len(weights)
    result = []
    for row in range(len(totals) // width):
        value = e.load_broadcast(e.add(e.add(x, e.mul(x_stride, row)), offset))
        result += [e.fma(value, weights[i], totals[row * width + i]) for i in range(width)]
    return result


@njit(inline="always")
def float32_panel_bytes(K):
    return K * (4 * PANEL)


@njit(inline="always")
def bfloat16_panel_bytes(K):
    return (K + 1) // 2 * (4 * PANEL)


def build(format: str) -> ProductKernel:
    """The kernel of ``"float32"`` or ``"bfloat16"`` for this CPU."""
    isa = features.current()
    shapes = tile_shapes(isa)
    if format == "float32":
        product = product_function("product-float32", shapes, emit_float32, float32_panel_bytes, no_bytes)
        return ProductKernel(format, product.address, 0, lambda K: 0, (product,))
    if not isa.has_bf16_dot:
        product = product_function("product-bfloat16", shapes, emit_bfloat16, bfloat16_panel_bytes, no_bytes)
        return ProductKernel(format, product.address, 0, lambda K: 0, (product,))
    product = product_function("product-bfloat16", shapes, emit_bfloat16_dot, bfloat16_panel_bytes, no_bytes)
    prepare = prepare_bfloat16()
    return ProductKernel(format, product.address, prepare.address, lambda K: (K + 1) // 2 * 4, (product, prepare))
