"""How a product is cut into tiles that fit the vector registers, the same for all weight formats.

A weight ``[N, K]`` is packed into panels of 48 rows, so that one step of k reads 48 neighbouring
values. A tile keeps ``height`` rows of x times ``width`` vectors of outputs in registers, reads
K once, and touches memory only for operands::

             panel p (48 outputs)
            +-----------+-----------+-----------+
       k=0  | w w ... w | w w ... w | w w ... w |      one strip = `width` vectors
       k=1  |   strip 0 |   strip 1 |   strip 2 |
        :   |     |     |           |           |
            +-----|-----+-----------+-----------+
                  v
     x[0,k] -> acc00 acc01      registers of a 6 x 2 tile (AVX2: 16 vectors of 8 lanes):
     x[1,k] -> acc10 acc11          12 accumulators, 2 of the weight, 1 broadcast x[m,k]
       :         :     :        every loaded weight serves 6 rows, every x 16 columns:
     x[5,k] -> acc50 acc51          12 multiply-adds for 8 loads

Each accumulator adds its products in the order of k, from zero to K, whatever the shape of the tile:
that is why a row's result never depends on how many rows came with it.

One row wants the whole panel as one strip (its weights come from RAM, in sequence, and used once);
many rows want tall tiles. ``shapes`` says how wide a tile of each height is, and the rows of a product
are divided evenly: 8 rows at a tallest tile of 6 are 4 + 4, not 6 + 2.
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir
from numba import njit

from .compile_cache import c_function
from .emit import Emitter, kernel
from .products import PRODUCT_SIGNATURE

PANEL = 48  # outputs of a panel: 3 vectors of 16 lanes, 6 of 8, 12 of 4


def strips(e: Emitter, width: int, body: Callable[[ir.Value], None]) -> None:
    """Emit ``body(strip)`` for every strip of ``width`` vectors of a panel."""
    count = PANEL // (width * e.lanes)
    if count == 1:
        body(e.const(0))
        return

    def once(strip, state):
        body(strip)
        return []

    e.loop(e.const(count), [], once)


def rows_of(totals: list[ir.Value], width: int) -> list[list[ir.Value]]:
    """Accumulators ``[row * width + vector]``, as a list of vectors for each row."""
    return [totals[start : start + width] for start in range(0, len(totals), width)]


def store_tile(
    e: Emitter, tile: list[list[ir.Value]], out: ir.Value, out_stride: ir.Value, accumulate: ir.Value
) -> None:
    """Write ``tile[row][vector]`` to the rows at ``out``; added to what is there if ``accumulate`` is 1."""

    def write(adds: bool) -> None:
        for row, vectors in enumerate(tile):
            for i, value in enumerate(vectors):
                address = e.add(e.add(out, e.mul(out_stride, row)), i * e.isa.vector_bytes)
                e.store(e.fadd(e.load(address, e.f32), value) if adds else value, address)

    e.switch(accumulate, {0: lambda: write(False), 1: lambda: write(True)})


def product_function(
    name: str, shapes: dict[int, int], emit_rows: Callable[..., None], panel_bytes: Callable, scale_bytes: Callable
):
    """Compile a product: walks panels and rows, and calls the emitted tiles.

    Args:
        name: names the compiled function in the cache.
        shapes: height of a tile -> its width in vectors, for every height 1, 2, ... in use.
        emit_rows: ``emit_rows(e, height, width, x, x_stride, x_scale, w, w_scale, w_aux, K, out,
            out_stride, accumulate)`` emits one panel for ``height`` rows.
        panel_bytes: njit function ``K -> bytes`` of a packed panel.
        scale_bytes: njit function ``K -> bytes`` of a panel's scales.

    Returns a ``CFunc`` with the arguments of :mod:`~minipaged.ops.cpu.products`.
    """
    tallest = max(shapes)

    @kernel(11)
    def rows(e, height, *arguments):
        e.switch(
            height, {h: lambda h=h, width=width: emit_rows(e, h, width, *arguments) for h, width in shapes.items()}
        )

    @c_function(PRODUCT_SIGNATURE, name)
    def product(x, x_stride, x_scale, w, w_scale, w_aux, K, panel0, panel1, M, out, out_stride, accumulate):
        for panel in range(panel0, panel1):
            w_panel = w + panel * panel_bytes(K)
            scale = w_scale + panel * scale_bytes(K)
            row = 0
            while row < M:
                tiles_left = (M - row + tallest - 1) // tallest
                height = (M - row + tiles_left - 1) // tiles_left
                rows(
                    height,
                    x + row * x_stride,
                    x_stride,
                    x_scale + 4 * row,
                    w_panel,
                    scale,
                    w_aux + 4 * PANEL * panel,
                    K,
                    out + row * out_stride + 4 * PANEL * panel,
                    out_stride,
                    accumulate,
                )
                row += height

    return product


@njit(inline="always")
def no_bytes(K):
    """The ``scale_bytes`` of a format without scales."""
    return 0
