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

One row wants the whole panel as one strip (its weights come from RAM, in sequence, and are used once);
many rows want tall tiles. ``shapes`` says how wide a tile of each height is, and the rows of a product
are divided evenly: 8 rows at a tallest tile of 6 are 4 + 4, not 6 + 2.

The hardware fetches a sequence ahead, but not the interleaved strips of tall tiles, nor the next panel
while several tiles go over this one. So every step of these asks for lines of the *next* panel, into L2; the
tiles of a panel share it out, so memory works at an even pace while the multipliers do. Narrow strips ask for
the line that they need a few steps later as well, into L1. (float32 on AVX2: 70% of the peak without, 97% with;
int8 with VNNI, 8 rows: a fifth faster than with all lines of a group at once.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llvmlite import ir

from . import features
from .compile_cache import c_function
from .emit import Emitter, kernel
from .products import PRODUCT_SIGNATURE

PANEL = 48  # outputs of a panel: 3 vectors of 16 lanes, 6 of 8, 12 of 4
STEP_BYTES = 4 * PANEL  # of a panel in one step: 1 k of float32, 2 of bfloat16, 4 of int8, 8 of int4
LINE = 64
NEAR_STEPS = 8  # how far ahead L1 is filled


@dataclass(frozen=True)
class Tile:
    """What a tile of ``height`` rows of x and ``width`` vectors of outputs works on; LLVM int64 values.

    The arguments of a product, moved to the tile's first row and to its panel.
    """

    height: int
    width: int
    x: ir.Value
    x_stride: ir.Value
    w: ir.Value
    K: ir.Value
    out: ir.Value
    out_stride: ir.Value
    accumulate: ir.Value
    next_w: ir.Value  # this tile's share of the next panel
    next_stride: ir.Value  # bytes of it for each step
    num_tiles: ir.Value  # how many tiles the shares are for

    def row(self, e: Emitter, index: int) -> ir.Value:
        """The address of a row of x."""
        return e.add(self.x, e.mul(self.x_stride, index))

    def strips(
        self, e: Emitter, num_steps: ir.Value, body: Callable[[Strip], None], step_bytes: int = STEP_BYTES
    ) -> None:
        """Emit ``body`` for every strip of the panel; ``step_bytes``: as :func:`product_function`."""
        strip_bytes = self.width * e.isa.vector_bytes
        if strip_bytes == STEP_BYTES:
            body(Strip(self, e.const(0), self.next_w, self.next_stride, strip_bytes, step_bytes))
            return
        share_bytes = -(-strip_bytes * step_bytes // STEP_BYTES)

        def once(index, state):
            share = e.div(e.add(self.num_tiles, share_bytes - 1), self.num_tiles)  # of the next panel, at each step
            next_w = e.add(self.next_w, e.mul(index, e.mul(num_steps, share)))
            body(Strip(self, e.mul(index, strip_bytes), next_w, share, strip_bytes, share_bytes))
            return []

        e.loop(e.const(STEP_BYTES // strip_bytes), [], once)


@dataclass(frozen=True)
class Strip:
    """One strip of a tile's panel."""

    tile: Tile
    offset: ir.Value  # bytes from the panel's first column; the same for weights and float32 outputs
    next_w: ir.Value  # where in the next panel this strip begins to ask for lines
    next_stride: ir.Value  # and how many bytes farther at each step
    width_bytes: int  # in a step of the panel
    share_bytes: int  # the same, with its part of what lies between steps

    @property
    def is_whole_panel(self) -> bool:
        return self.width_bytes == STEP_BYTES

    def load(self, e: Emitter, step: ir.Value, type_: ir.Type) -> list[ir.Value]:
        """The weights of one step, as vectors of ``type_``, where steps follow each other without anything between."""
        return self.load_at(e, e.mul(step, STEP_BYTES), type_)

    def load_at(self, e: Emitter, place: ir.Value, type_: ir.Type) -> list[ir.Value]:
        """The weights of the step that begins ``place`` bytes after its panel."""
        return self.vectors(e, e.add(e.add(self.tile.w, self.offset), place), type_)

    def prefetch(
        self, e: Emitter, step: ir.Value, place: ir.Value, num_steps: int = 1, single_row: bool = False
    ) -> None:
        """Ask for lines that steps ``step .. step + num_steps - 1`` have the time to wait for.

        ``place``: bytes after the panel where ``step`` begins. ``single_row``: one row asks for lines of its sequence
        although the hardware follows it: near ones below AVX-512, else those of ``sequence_ahead``. It pays only where
        a step takes the multipliers longer than the hardware expects, or scales lie far from each other.
        """
        near, later = not self.is_whole_panel and num_steps == 1, True  # several steps: of a panel that stays in L1
        if self.is_whole_panel and self.tile.height == 1:
            near, later = single_row and e.isa.vector_bytes < 64, single_row and e.isa.vector_bytes == 64
        near_w = e.add(e.add(self.tile.w, self.offset), place)
        later_w = e.add(self.next_w, e.mul(step, self.next_stride))
        for line in range(0, self.width_bytes * num_steps, LINE):
            if near:
                e.prefetch(e.add(near_w, NEAR_STEPS * STEP_BYTES + line), locality=3)
        for line in range(0, self.share_bytes * num_steps, LINE):
            if later:
                e.prefetch(e.add(later_w, line), locality=2)

    def vectors(self, e: Emitter, address: ir.Value, type_: ir.Type) -> list[ir.Value]:
        return [e.load(e.add(address, i * e.isa.vector_bytes), type_) for i in range(self.tile.width)]

    def store(self, e: Emitter, values: list[list[ir.Value]]) -> None:
        """Write ``values[row][vector]`` to ``out``; added to what is there if ``accumulate`` is 1."""
        out = e.add(self.tile.out, self.offset)

        def write(adds: bool) -> None:
            for row, vectors in enumerate(values):
                for i, value in enumerate(vectors):
                    address = e.add(e.add(out, e.mul(self.tile.out_stride, row)), i * e.isa.vector_bytes)
                    e.store(e.fadd(e.load(address, e.f32), value) if adds else value, address)

        e.switch(self.tile.accumulate, {0: lambda: write(False), 1: lambda: write(True)})


def rows_of(totals: list[ir.Value], width: int) -> list[list[ir.Value]]:
    """Accumulators ``[row * width + vector]``, as a list of vectors for each row."""
    return [totals[start : start + width] for start in range(0, len(totals), width)]


def product_function(
    name: str,
    shapes: dict[int, int],
    emit_tile: Callable[[Emitter, Tile], None],
    panel_bytes: Callable[[int], int],
    step_bytes: int = STEP_BYTES,
    tallest_of_many: int | None = None,
    sequence_ahead: int = 0,
):
    """Compile a product: walks panels and rows, and calls the emitted tiles.

    Args:
        name: names the compiled function in the cache.
        shapes: height of a tile -> its width in vectors, for every height 1, 2, ... in use.
        emit_tile: emits the product of the rows of a tile with its panel.
        panel_bytes: njit function ``K -> bytes`` of a packed panel.
        step_bytes: of a step of a panel, with its part of what lies between steps.
        tallest_of_many: height that tiles have at most where one does not hold all rows; default: the tallest.
        sequence_ahead: how many bytes ahead one row asks in its sequence, where it does.

    Returns a ``CFunc`` with the arguments of :mod:`~minipaged.ops.cpu.products`.
    """
    tallest, tallest_of_many = max(shapes), tallest_of_many or max(shapes)
    lanes = features.current().lanes
    tallest_of_whole_panel = max((height for height, width in shapes.items() if width * lanes == PANEL), default=0)

    @kernel(11)
    def rows(e, height, *arguments):
        e.switch(
            height,
            {h: lambda h=h, width=width: emit_tile(e, Tile(h, width, *arguments)) for h, width in shapes.items()},
        )

    @c_function(PRODUCT_SIGNATURE, name)
    def product(x, x_stride, w, K, panel0, panel1, M, out, out_stride, accumulate):
        if M == 0:  # a chunk of a prompt wants no logits, and no tile has so few rows
            return
        size = panel_bytes(K)
        num_tiles = 1 if M <= tallest else (M + tallest_of_many - 1) // tallest_of_many
        share = (size + num_tiles - 1) // num_tiles  # of the next panel, fetched by each tile
        next_stride = (step_bytes + num_tiles - 1) // num_tiles
        for panel in range(panel0, panel1):
            w_panel = w + panel * size
            next_w = min(panel + 1, panel1 - 1) * size + w
            if M <= tallest_of_whole_panel and num_tiles == 1:  # a sequence, which the hardware follows
                next_w, next_stride = (w_panel + sequence_ahead, step_bytes) if M == 1 else (x, 0)  # x is in L1
            row = 0
            for tile in range(num_tiles):
                height = (M - row + num_tiles - tile - 1) // (num_tiles - tile)
                rows(
                    height,
                    x + row * x_stride,
                    x_stride,
                    w_panel,
                    K,
                    out + row * out_stride + 4 * PANEL * panel,
                    out_stride,
                    accumulate,
                    next_w + tile * share,
                    next_stride,
                    num_tiles,
                )
                row += height

    return product
