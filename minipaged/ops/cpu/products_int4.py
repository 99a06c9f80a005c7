"""Products with int4 weights (float16 scale and minimum per output and 32 k) and int8 activations.

A byte holds two k of one output, so a word of four bytes is eight k deep::

    byte j of a word    | k+4+j | k+j |     low nibbles: k .. k+3, high nibbles: k+4 .. k+7

A nibble q in 0..15 stands for ``scale * q + minimum``, as in llama.cpp's Q4_1, and is the *unsigned*
operand. What a group is and how its sum is scaled: :mod:`~minipaged.ops.cpu.products_groups`. How its 32
products are added:

* VNNI: ``vpdpbusd`` on low and on high nibbles, into int32.
* AVX2: ``pmaddubsw`` into int16: eight words of two products per lane reach at most
  16 * 15 * 127 = 30480, which fits, so one ``pmaddwd`` by ones ends the group. About half the
  instructions of int8.
* otherwise: as int8, ``pmaddwd`` on even and odd bytes.
"""

from __future__ import annotations

from . import features
from .emit import I32, Emitter
from .packing import GROUPS
from .products import ProductKernel
from .products_groups import GroupFormat, build_groups

FORMAT = GroupFormat("int4", GROUPS["int4"], stays_in_l1=True)


def tile_shapes(isa: features.InstructionSet) -> dict[int, int]:
    """Height -> width. Beside the float32 totals, the sums of the current group are live."""
    if isa.has_vnni:
        return {1: 3, 2: 3, 3: 3, 4: 3}
    if isa.has_avx2:
        return {1: 6, 2: 2, 3: 1, 4: 1, 5: 1, 6: 1}
    return {1: 3, 2: 2, 3: 1, 4: 1}


def nibbles(e: Emitter, word):
    """Low and high nibbles of the bytes of ``word``, as unsigned bytes in vectors of int16."""
    b = e.builder
    word, mask = e.bitcast(word, e.i16), e.constant(e.i16, 0x0F0F)
    return b.and_(word, mask), b.and_(b.lshr(word, e.constant(e.i16, 4)), mask)


def add_group_vnni(e: Emitter, load, rows, sums):
    """``vpdpbusd`` over the 8 quads of a group; rows are ``bytes``."""
    for n in range(FORMAT.layout.words):
        halves = [nibbles(e, word) for word in load(n)]
        for high in (0, 1):
            for row, address in enumerate(rows):
                values = e.bitcast(e.load_broadcast(e.add(address, 8 * n + 4 * high), I32), e.i8)
                for i, half in enumerate(halves):
                    sums[row][i] = e.dot_accumulate_u8_i8(sums[row][i], e.bitcast(half[high], e.i8), values)
    return sums


def add_group_pmaddubsw(e: Emitter, load, rows, sums):
    """``pmaddubsw`` over the 8 quads of a group, added up in int16; rows are ``bytes``."""
    pairs = [[e.constant(e.i16, 0)] * len(row) for row in sums]
    for n in range(FORMAT.layout.words):
        halves = [nibbles(e, word) for word in load(n)]
        for high in (0, 1):
            for row, address in enumerate(rows):
                values = e.bitcast(e.load_broadcast(e.add(address, 8 * n + 4 * high), I32), e.i8)
                for i, half in enumerate(halves):
                    product = e.dot_u8_i8_saturating(e.bitcast(half[high], e.i8), values)
                    pairs[row][i] = e.builder.add(pairs[row][i], product)
    ones = e.constant(e.i16, 1)
    return [[e.dot_i16(total, ones) for total in row] for row in pairs]


def add_group_pmaddwd(e: Emitter, load, rows, sums):
    """``pmaddwd`` over even and odd bytes of the 8 quads of a group; rows are ``pairs``."""
    b = e.builder
    eight, low_byte = e.constant(e.i16, 8), e.constant(e.i16, 0xFF)
    for n in range(FORMAT.layout.words):
        halves = [nibbles(e, word) for word in load(n)]
        for high in (0, 1):
            for odd in (0, 1):
                weights = [b.lshr(half[high], eight) if odd else b.and_(half[high], low_byte) for half in halves]
                for row, address in enumerate(rows):
                    at = e.add(address, 16 * n + 8 * high + 4 * odd)
                    values = e.bitcast(e.load_broadcast(at, I32), e.i16)
                    for i, weight in enumerate(weights):
                        sums[row][i] = b.add(sums[row][i], e.dot_i16(weight, values))
    return sums


def build(format: str) -> ProductKernel:
    """The int4 kernel for this CPU."""
    isa = features.current()
    if isa.has_vnni:
        add_group, layout = add_group_vnni, "bytes"
    elif isa.has_avx2:
        add_group, layout = add_group_pmaddubsw, "bytes"
    else:
        add_group, layout = add_group_pmaddwd, "pairs"
    return build_groups(FORMAT, tile_shapes(isa), add_group, layout)
