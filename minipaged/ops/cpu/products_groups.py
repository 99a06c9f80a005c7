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
from .packing import GroupLayout
from .products import ProductKernel
from .quantize import prepare_groups, value_bytes
from .tiles import STEP_BYTES, Strip, Tile, product_function, rows_of

AddGroup = Callable[[Emitter, Callable, list[ir.Value], list[list[ir.Value]]], list[list[ir.Value]]]
"""``add_group(e, load, rows, sums)``: the int32 sums ``[row][vector]`` of one group.

``load(n)`` gives the packed weights ``[vector]`` of word ``n`` of the group (an int, or an int64 at run time),
``rows`` are the addresses of the group's prepared x, ``sums`` what the sums start with."""


@dataclass(frozen=True)
class GroupFormat:
    """How a format keeps a group, and where its panels are while tiles go over them.

    Attributes:
        layout: of the group's record; with a minimum, sums start at zero.
        stays_in_l1: a panel does, while tiles go over it; only the next one need be asked for.
    """

    name: str
    layout: GroupLayout
    stays_in_l1: bool

    @property
    def step_bytes(self) -> int:
        """Bytes of a panel for one of its words, its part of the scales included."""
        return -(-self.layout.nbytes // self.layout.words)


def emit_groups(
    format: GroupFormat, add_group: AddGroup, layout: str, e: Emitter, tile: Tile, single_row: bool = True
) -> None:
    """The product of a tile's rows with its panel, group by group; rows are prepared in ``layout``.

    ``single_row``: as :meth:`~minipaged.ops.cpu.tiles.Strip.prefetch`.
    """
    size, words, has_minimum = format.layout.size, format.layout.words, format.layout.has_minimum
    group_bytes = size * value_bytes(layout)
    groups = e.div(e.add(tile.K, size - 1), size)
    scales_at = e.mul(groups, group_bytes)  # in a row of x; the groups' sums follow
    sums_at = e.add(scales_at, e.mul(groups, 4))

    def prefetch(strip: Strip, step: ir.Value, place: ir.Value, num_steps: int) -> None:
        strip.prefetch(e, step, place, num_steps, single_row)

    def one_strip(strip: Strip) -> None:
        def group(g, totals):
            first_step, record = e.mul(g, words), e.mul(g, format.layout.nbytes)
            if format.stays_in_l1:
                prefetch(strip, first_step, record, words)

            def load(n: int | ir.Value) -> list[ir.Value]:
                place = e.add(record, n * STEP_BYTES if isinstance(n, int) else e.mul(n, STEP_BYTES))
                if not format.stays_in_l1:
                    prefetch(strip, e.add(first_step, n), place, 1)
                return strip.load_at(e, place, e.i32)

            rows = [tile.row(e, row) for row in range(tile.height)]
            quantised = [e.add(row, e.mul(g, group_bytes)) for row in rows]
            scales = [e.load_broadcast(e.add(e.add(row, scales_at), e.mul(g, 4))) for row in rows]
            sums_of_x = [e.add(e.add(row, sums_at), e.mul(g, 4)) for row in rows]
            if has_minimum:
                starts = [e.constant(e.i32, 0)] * tile.height
            else:
                starts = [e.load_broadcast(address, I32) for address in sums_of_x]
            sums = add_group(e, load, quantised, [[start] * tile.width for start in starts])
            weight_scales = halves(e, strip, e.add(record, format.layout.scale_offset))
            result = []
            for row, values in enumerate(rows_of(totals, tile.width)):
                for i, total in enumerate(values):
                    factor = e.fmul(weight_scales[i], scales[row])
                    result.append(e.fma(e.to_float(sums[row][i]), factor, total))
            if has_minimum:
                minima = halves(e, strip, e.add(record, format.layout.minimum_offset))
                for row, values in enumerate(rows_of(result, tile.width)):
                    sum_of_x = e.load_broadcast(sums_of_x[row])
                    for i, total in enumerate(values):
                        result[row * tile.width + i] = e.fma(minima[i], sum_of_x, total)
            return result

        totals = e.loop(groups, [e.constant(e.f32, 0.0)] * (tile.height * tile.width), group)
        strip.store(e, rows_of(totals, tile.width))

    tile.strips(e, e.mul(groups, words), one_strip, format.step_bytes)


def halves(e: Emitter, strip: Strip, place: ir.Value) -> list[ir.Value]:
    """A strip's part of the float16 row that begins ``place`` bytes after its panel, as float32."""
    address = e.add(e.add(strip.tile.w, e.div(strip.offset, 2)), place)  # half as wide as words
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
    format: GroupFormat,
    shapes: dict[int, int],
    add_group: AddGroup,
    layout: str,
    tallest_of_many: int | None = None,
    sequence_ahead: int = 0,
) -> ProductKernel:
    """Compile the product of a format whose groups ``add_group`` adds up, and what prepares its rows.

    ``shapes``, ``tallest_of_many``, ``sequence_ahead``: as :func:`~minipaged.ops.cpu.tiles.product_function`.
    """
    size, record_bytes = format.layout.size, format.layout.nbytes

    @njit(inline="always")
    def panel_bytes(K):
        return (K + size - 1) // size * record_bytes

    def emit_tile(e: Emitter, tile: Tile) -> None:
        emit_groups(format, add_group, layout, e, tile, single_row=sequence_ahead > 0 or not e.isa.has_vnni)

    def row_bytes(K: int) -> int:
        return (K + size - 1) // size * (size * value_bytes(layout) + 8)

    product = product_function(
        f"product-{format.name}", shapes, emit_tile, panel_bytes, format.step_bytes, tallest_of_many, sequence_ahead
    )
    prepare = prepare_groups(layout, size, None if format.layout.has_minimum else -128)
    return ProductKernel(format.name, product.address, prepare.address, row_bytes, (product, prepare))

