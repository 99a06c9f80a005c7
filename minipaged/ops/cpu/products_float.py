"""Products with float32 and bfloat16 weights: fused multiply-adds on float32 rows.

float32 panels are ``[K][48]``. bfloat16 panels are ``[K/2][48][2]``: the two k of a pair lie in one
32-bit word, and widening is one shift or one mask (a bfloat16 is the upper half of a float32)::

    word    | k+1: sEEEEEEE EMMMMMMM | k: sEEEEEEE EMMMMMMM |
    k       word << 16                  k+1     word & 0xffff0000

With AVX-512 BF16, x is rounded to bfloat16, too, and ``vdpbf16ps`` multiplies a pair at once.
"""

from __future__ import annotations

from llvmlite import ir
from numba import njit

from . import features
from .emit import I32, Emitter
from .products import ProductKernel
from .quantize import prepare_bfloat16
from .tiles import PANEL, STEP_BYTES, Strip, Tile, product_function, rows_of


def tile_shapes(isa: features.InstructionSet) -> dict[int, int]:
    """Height -> width: accumulators, weights of one k and one broadcast must fit the registers."""
    panel = PANEL // isa.lanes
    if isa.vector_bytes == 64:
        return {height: panel for height in range(1, 9)}  # 8 x 3: 24 of 32
    return {1: 6, 2: 3, 3: 3, 4: 2, 5: 2, 6: 2}  # 6 x 2: 12 of 16


def emit_float32(e: Emitter, tile: Tile) -> None:
    """Rows times float32 weights."""

    def one_strip(strip: Strip) -> None:
        def step(k, totals):
            strip.prefetch(e, k, e.mul(k, STEP_BYTES))
            return multiply_add(e, tile, totals, e.mul(k, 4), strip.load(e, k, e.f32))

        strip.store(e, rows_of(e.loop(tile.K, zeros(e, tile), step), tile.width))

    tile.strips(e, tile.K, one_strip)


def emit_bfloat16(e: Emitter, tile: Tile) -> None:
    """Rows times bfloat16 weights, widened to float32."""
    sixteen, upper = e.constant(e.i32, 16), e.constant(e.i32, -65536)
    pairs = e.div(tile.K, 2)

    def first(words):
        return [e.bitcast(e.builder.shl(word, sixteen), e.f32) for word in words]

    def second(words):
        return [e.bitcast(e.builder.and_(word, upper), e.f32) for word in words]

    def one_strip(strip: Strip) -> None:
        def step(pair, totals):
            strip.prefetch(e, pair, e.mul(pair, STEP_BYTES))
            words, offset = strip.load(e, pair, e.i32), e.mul(pair, 8)
            totals = multiply_add(e, tile, totals, offset, first(words))
            return multiply_add(e, tile, totals, e.add(offset, 4), second(words))

        def odd_end(_, totals):  # x has no k to go with the padding
            return multiply_add(e, tile, totals, e.mul(pairs, 8), first(strip.load(e, pairs, e.i32)))

        totals = e.loop(pairs, zeros(e, tile), step)
        totals = e.loop(e.builder.and_(tile.K, e.const(1)), totals, odd_end)
        strip.store(e, rows_of(totals, tile.width))

    tile.strips(e, pairs, one_strip)


def emit_bfloat16_dot(e: Emitter, tile: Tile) -> None:
    """Rows of bfloat16 times bfloat16 weights, by ``vdpbf16ps``."""
    pairs = e.div(e.add(tile.K, 1), 2)

    def one_strip(strip: Strip) -> None:
        def step(pair, totals):
            strip.prefetch(e, pair, e.mul(pair, STEP_BYTES))
            words, result = strip.load(e, pair, e.i32), []
            for row, sums in enumerate(rows_of(totals, tile.width)):
                values = e.load_broadcast(e.add(tile.row(e, row), e.mul(pair, 4)), I32)
                result += [e.dot_accumulate_bf16(total, word, values) for total, word in zip(sums, words, strict=True)]
            return result

        strip.store(e, rows_of(e.loop(pairs, zeros(e, tile), step), tile.width))

    tile.strips(e, pairs, one_strip)


def zeros(e: Emitter, tile: Tile) -> list[ir.Value]:
    """Accumulators of a tile at the start."""
    return [e.constant(e.f32, 0.0)] * (tile.height * tile.width)


def multiply_add(e: Emitter, tile: Tile, totals, offset, weights) -> list[ir.Value]:
    """One k of a tile: every accumulator gains ``x[row, k] * weight[vector]``; ``offset`` is k in bytes."""
    result = []
    for row, sums in enumerate(rows_of(totals, tile.width)):
        value = e.load_broadcast(e.add(tile.row(e, row), offset))
        result += [e.fma(value, weight, total) for weight, total in zip(weights, sums, strict=True)]
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
        product = product_function("product-float32", shapes, emit_float32, float32_panel_bytes)
        return ProductKernel(format, product.address, 0, lambda K: 0, (product,))
    if not isa.has_bf16_dot:
        product = product_function("product-bfloat16", shapes, emit_bfloat16, bfloat16_panel_bytes)
        return ProductKernel(format, product.address, 0, lambda K: 0, (product,))
    product = product_function("product-bfloat16", shapes, emit_bfloat16_dot, bfloat16_panel_bytes)
    prepare = prepare_bfloat16()
    return ProductKernel(format, product.address, prepare.address, lambda K: (K + 1) // 2 * 4, (product, prepare))
