"""What the integer products share: sums of a group are exact, and each group has scales of its own.

A *group* is 96 (int8) or 32 (int4) neighbouring k. Weights have a scale for each output and group,
activations one for each token and group::

    out = sum over groups of  w_scale[group] * x_scale[group] * (sum over its k of q * x)
                            + w_min[group] * x_sum[group]                                   (int4 only)

The inner sums are exact integers, so their order does not matter; they are scaled and added in float32,
groups in order of k, with the same operations for every shape of tile.

A byte of int8 is q + 128: ``vpdpbusd`` multiplies unsigned by signed bytes, so the weight is the unsigned
one, and the sum of a group starts at ``-128 * sum of x``, which comes with the prepared row. For int4 the
weight is ``w_scale * q + w_min`` with q in 0..15.

How the products of a group are added up is what differs between instruction sets: the two formats' modules
have a function for each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llvmlite import ir
from numba import njit

from .emit import F16, I16, I32, Emitter, vector
from .products import ProductKernel
from .quantize import prepare_groups, value_bytes
from .tiles import LINE, PANEL, Strip, Tile, product_function, rows_of

SCALES_AHEAD = 1024  # bytes: 10 groups of a panel

AddGroup = Callable[[Emitter, Callable, list[ir.Value], list[list[ir.Value]]], list[list[ir.Value]]]
"""``add_group(e, load, rows, sums)``: the int32 sums ``[row][vector]`` of one group.

``load(n)`` gives the packed weights ``[vector]`` of word ``n`` of the group (an int, or an int64 at run time),
``rows`` are the addresses of the group's prepared x, ``sums`` what the sums start with."""


@dataclass(frozen=True)
class GroupFormat:
    """How a format keeps a group of ``size`` k.

    Attributes:
        words: 32-bit words of one output in a group.
        has_minimum: weights have a minimum as well; ``w_aux`` holds it, and sums start at zero.
        stays_in_l1: a panel does, while tiles go over it; only the next one need be asked for.
    """

    name: str
    size: int
    words: int
    has_minimum: bool
    stays_in_l1: bool


def emit_groups(format: GroupFormat, add_group: AddGroup, layout: str, e: Emitter, tile: Tile) -> None:
    """The product of a tile's rows with its panel, group by group; rows are prepared in ``layout``."""
    group_bytes = format.size * value_bytes(layout)
    groups = e.div(e.add(tile.K, format.size - 1), format.size)
    scales_at = e.mul(groups, group_bytes)  # in a row of x; the groups' sums follow
    sums_at = e.add(scales_at, e.mul(groups, 4))

    def word(strip: Strip, step: ir.Value) -> list[ir.Value]:
        if not format.stays_in_l1:
            strip.prefetch(e, step, single_row=True)
        return strip.load(e, step, e.i32)

    def one_strip(strip: Strip) -> None:
        def group(g, totals):
            step = e.mul(g, format.words)
            if format.stays_in_l1:
                strip.prefetch(e, step, format.words, single_row=True)
            elif strip.is_whole_panel:
                # The hardware does not follow a sequence that advances so slowly beside that of the weights.
                # (One row of int8: a fifth faster. Scales of int4 come three times as fast, and are followed.)
                for line in range(0, 2 * PANEL, LINE):
                    e.prefetch(e.add(tile.w_scale, e.add(e.mul(g, 2 * PANEL), SCALES_AHEAD + line)), locality=3)
            rows = [tile.row(e, row) for row in range(tile.height)]
            quantised = [e.add(row, e.mul(g, group_bytes)) for row in rows]
            scales = [e.load_broadcast(e.add(e.add(row, scales_at), e.mul(g, 4))) for row in rows]
            sums_of_x = [e.add(e.add(row, sums_at), e.mul(g, 4)) for row in rows]
            if format.has_minimum:
                starts = [e.constant(e.i32, 0)] * tile.height
            else:
                starts = [e.load_broadcast(address, I32) for address in sums_of_x]
            sums = add_group(
                e, lambda n: word(strip, e.add(step, n)), quantised, [[start] * tile.width for start in starts]
            )
            weight_scales = halves(e, strip, tile.w_scale, g)
            result = []
            for row, values in enumerate(rows_of(totals, tile.width)):
                for i, total in enumerate(values):
                    factor = e.fmul(weight_scales[i], scales[row])
                    result.append(e.fma(e.to_float(sums[row][i]), factor, total))
            if format.has_minimum:
                minima = halves(e, strip, tile.w_aux, g)
                for row, values in enumerate(rows_of(result, tile.width)):
                    sum_of_x = e.load_broadcast(sums_of_x[row])
                    for i, total in enumerate(values):
                        result[row * tile.width + i] = e.fma(minima[i], sum_of_x, total)
            return result

        totals = e.loop(groups, [e.constant(e.f32, 0.0)] * (tile.height * tile.width), group)
        strip.store(e, rows_of(totals, tile.width))

    tile.strips(e, e.mul(groups, format.words), one_strip)


def halves(e: Emitter, strip: Strip, array: ir.Value, group: ir.Value) -> list[ir.Value]:
    """A strip's part of the float16 row of ``group`` in a panel's array, as float32."""
    address = e.add(e.add(array, e.div(strip.offset, 2)), e.mul(group, 2 * PANEL))  # half as wide as words
    return [_load_half(e, e.add(address, 2 * e.lanes * i)) for i in range(strip.tile.width)]


def _load_half(e: Emitter, address: ir.Value) -> ir.Value:
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


def build_groups(
    format: GroupFormat, shapes: dict[int, int], add_group: AddGroup, layout: str, tallest_of_many: int | None = None
) -> ProductKernel:
    """Compile the product of a format whose groups ``add_group`` adds up, and what prepares its rows.

    ``shapes`` and ``tallest_of_many``: as :func:`~minipaged.ops.cpu.tiles.product_function`.
    """
    size, group_words = format.size, format.words

    @njit(inline="always")
    def panel_bytes(K):
        return (K + size - 1) // size * (group_words * 4 * PANEL)

    @njit(inline="always")
    def scale_bytes(K):
        return (K + size - 1) // size * (2 * PANEL)

    def emit_tile(e: Emitter, tile: Tile) -> None:
        emit_groups(format, add_group, layout, e, tile)

    def row_bytes(K: int) -> int:
        return (K + size - 1) // size * (size * value_bytes(layout) + 8)

    product = product_function(
        f"product-{format.name}", shapes, emit_tile, panel_bytes, scale_bytes, tallest_of_many
    )
    prepare = prepare_groups(layout, size, None if format.has_minimum else -128)
    return ProductKernel(format.name, product.address, prepare.address, row_bytes, (product, prepare))

