"""Products with int8 weights and activations, both with a scale for every 64 k.

A word holds four k of one output, so one vector of words is 8 (AVX2) or 16 (AVX-512) outputs and four k
deep. What a group is and how its sum is scaled: :mod:`~minipaged.ops.cpu.products_groups`. How its 64
products are added:

With VNNI one instruction does it all. A byte of the weight is q + 128, hence unsigned, and the accumulators
start at ``-128 * sum of x``::

    acc[i] += u[4i]*s[4i] + u[4i+1]*s[4i+1] + u[4i+2]*s[4i+2] + u[4i+3]*s[4i+3]

AVX2 multiplies unsigned by signed bytes, too, in two steps, but ``pmaddubsw`` adds pairs in 16 bits and
saturates: 2 * 255 * 127 does not fit. 2 * 127 * 127 does. So the weight becomes signed again, and its sign
moves to x::

    w * x == |w| * (x with the sign of w)        |w| once for all rows of a tile (pabsb, psignb)

and a second step, ``pmaddwd`` by ones, adds the two pairs of a word in 32 bits.

Anything else multiplies 16-bit pairs. A word splits into its even and its odd bytes as two pairs of int16,
with operations that all rows of a tile share; x comes as int16 in the matching order::

    word        | w3 | w2 | w1 | w0 |
    even        |    w2   |    w0   |   word16 & 255      times   | x2 | x0 |
    odd         |    w3   |    w1   |   word16 >> 8       times   | x3 | x1 |
"""

from __future__ import annotations

from . import features
from .emit import I32, Emitter
from .packing import INT8_GROUP
from .products import ProductKernel
from .products_groups import GroupFormat, build_groups
from .tiles import PANEL

FORMAT = GroupFormat("int8", size=INT8_GROUP, words=INT8_GROUP // 4, has_minimum=False, stays_in_l1=False)


def tile_shapes(isa: features.InstructionSet) -> dict[int, int]:
    """Height -> width. The sums of the current group are in registers, and with VNNI the float32 totals, too.

    Elsewhere the totals are in the L1 cache while a group is added up, which takes much longer than that.
    """
    panel = PANEL // isa.lanes
    if isa.has_vnni:
        return {height: panel for height in range(1, 5)}
    return {1: 6, 2: 3, 3: 3, 4: 2}


def add_group_vnni(e: Emitter, words, rows, starts):
    """``vpdpbusd``; rows are ``bytes``."""
    sums = None
    for n, vectors in enumerate(words):
        sums = sums or [[start] * len(vectors) for start in starts]
        weights = [e.bitcast(word, e.i8) for word in vectors]
        for row, address in enumerate(rows):
            values = e.bitcast(e.load_broadcast(e.add(address, 4 * n), I32), e.i8)
            sums[row] = [e.dot_accumulate_u8_i8(s, w, values) for s, w in zip(sums[row], weights, strict=True)]
    return sums


def add_group_pmaddubsw(e: Emitter, words, rows, starts):
    """``pmaddubsw`` on ``|w|`` and ``x`` with the sign of ``w``, which needs no start; rows are ``bytes``."""
    ones, bias = e.constant(e.i16, 1), e.constant(e.i8, -128)
    sums = None
    for n, vectors in enumerate(words):
        sums = sums or [[e.constant(e.i32, 0)] * len(vectors) for _ in rows]
        weights = [e.builder.xor(e.bitcast(word, e.i8), bias) for word in vectors]
        magnitudes = [e.abs_i8(weight) for weight in weights]
        for row, address in enumerate(rows):
            values = e.bitcast(e.load_broadcast(e.add(address, 4 * n), I32), e.i8)
            for i, weight in enumerate(weights):
                pairs = e.dot_u8_i8_saturating(magnitudes[i], e.sign_i8(values, weight))
                sums[row][i] = e.builder.add(sums[row][i], e.dot_i16(pairs, ones))
    return sums


def add_group_pmaddwd(e: Emitter, words, rows, starts):
    """``pmaddwd`` over even and odd bytes; rows are ``pairs``."""
    b = e.builder
    eight, low_byte = e.constant(e.i16, 8), e.constant(e.i16, 0xFF)
    sums = None
    for n, vectors in enumerate(words):
        sums = sums or [[start] * len(vectors) for start in starts]
        weights = [e.bitcast(word, e.i16) for word in vectors]
        even, odd = [b.and_(w, low_byte) for w in weights], [b.lshr(w, eight) for w in weights]
        for row, address in enumerate(rows):
            x_even, x_odd = (
                e.bitcast(e.load_broadcast(e.add(address, 8 * n + half), I32), e.i16) for half in (0, 4)
            )
            for i in range(len(vectors)):
                total = b.add(sums[row][i], e.dot_i16(even[i], x_even))
                sums[row][i] = b.add(total, e.dot_i16(odd[i], x_odd))
    return sums


def build(format: str) -> ProductKernel:
    """The int8 kernel for this CPU."""
    isa = features.current()
    if isa.has_vnni:
        add_group, layout = add_group_vnni, "bytes"
    elif isa.has_avx2:
        add_group, layout = add_group_pmaddubsw, "bytes"
    else:
        add_group, layout = add_group_pmaddwd, "pairs"
    return build_groups(FORMAT, tile_shapes(isa), add_group, layout)
