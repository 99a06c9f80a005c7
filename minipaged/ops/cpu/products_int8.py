"""Products with int8 weights and activations, both with a scale for every 96 k.

A word holds four k of one output, so one vector of words is 8 (AVX2) or 16 (AVX-512) outputs and four k
deep. What a group is and how its sum is scaled: :mod:`~minipaged.ops.cpu.products_groups`. How its 96
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
from .packing import GROUPS
from .products import ProductKernel
from .products_groups import GroupFormat, build_groups
from .tiles import PANEL, rows_of

FORMAT = GroupFormat("int8", GROUPS["int8"], stays_in_l1=False)


def tile_shapes(isa: features.InstructionSet) -> dict[int, int]:
    """Height -> width. The sums of the current group are in registers.

    The float32 totals may be in the L1 cache meanwhile, but beyond 4 rows of whole panels they must, which
    pays only where one tile holds all rows.
    """
    panel = PANEL // isa.lanes
    if isa.has_vnni:
        return {height: panel for height in range(1, 7)}
    return {1: 6, 2: 3, 3: 3, 4: 2}


def _for_words(e: Emitter, sums, body):
    """``for n in range(words of a group): sums = body(n, sums)``.

    It must be a loop: in straight-line code LLVM changes the order of the loads, and the hardware no longer
    recognises the sequence and stops fetching ahead (half of the speed of a single row).
    """
    width = len(sums[0])

    def step(n, state):
        return [total for row in body(n, rows_of(state, width)) for total in row]

    return rows_of(e.loop(e.const(FORMAT.layout.words), [total for row in sums for total in row], step), width)


def add_group_vnni(e: Emitter, load, rows, sums):
    """``vpdpbusd``; rows are ``bytes``."""

    def word(n, sums):
        weights, result = [e.bitcast(vector, e.i8) for vector in load(n)], []
        for address, totals in zip(rows, sums, strict=True):
            values = e.bitcast(e.load_broadcast(e.add(address, e.mul(n, 4)), I32), e.i8)
            result.append([e.dot_accumulate_u8_i8(t, w, values) for t, w in zip(totals, weights, strict=True)])
        return result

    return _for_words(e, sums, word)


def add_group_pmaddubsw(e: Emitter, load, rows, sums):
    """``pmaddubsw`` on ``|w|`` and ``x`` with the sign of ``w``, which starts at zero; rows are ``bytes``."""
    ones, bias = e.constant(e.i16, 1), e.constant(e.i8, -128)

    def word(n, sums):
        weights, result = [e.builder.xor(e.bitcast(vector, e.i8), bias) for vector in load(n)], []
        magnitudes = [e.abs_i8(weight) for weight in weights]
        for address, totals in zip(rows, sums, strict=True):
            values = e.bitcast(e.load_broadcast(e.add(address, e.mul(n, 4)), I32), e.i8)
            pairs = [e.dot_u8_i8_saturating(m, e.sign_i8(values, w)) for m, w in zip(magnitudes, weights, strict=True)]
            result.append([e.builder.add(t, e.dot_i16(pair, ones)) for t, pair in zip(totals, pairs, strict=True)])
        return result

    return _for_words(e, [[e.constant(e.i32, 0)] * len(totals) for totals in sums], word)


def add_group_pmaddwd(e: Emitter, load, rows, sums):
    """``pmaddwd`` over even and odd bytes; rows are ``pairs``."""
    b = e.builder
    eight, low_byte = e.constant(e.i16, 8), e.constant(e.i16, 0xFF)

    def word(n, sums):
        weights, result = [e.bitcast(vector, e.i16) for vector in load(n)], []
        halves = [b.and_(w, low_byte) for w in weights], [b.lshr(w, eight) for w in weights]  # even, odd
        for address, totals in zip(rows, sums, strict=True):
            for odd, half in enumerate(halves):
                at = e.add(e.add(address, e.mul(n, 8)), 4 * odd)
                values = e.bitcast(e.load_broadcast(at, I32), e.i16)
                totals = [b.add(t, e.dot_i16(w, values)) for t, w in zip(totals, half, strict=True)]
            result.append(totals)
        return result

    return _for_words(e, sums, word)


def build(format: str) -> ProductKernel:
    """The int8 kernel for this CPU."""
    isa = features.current()
    if isa.has_vnni:
        add_group, layout = add_group_vnni, "bytes"
    elif isa.has_avx2:
        add_group, layout = add_group_pmaddubsw, "bytes"
    else:
        add_group, layout = add_group_pmaddwd, "pairs"
    choices = {"tallest_of_many": 4, "sequence_ahead": 3072} if isa.has_vnni else {}
    return build_groups(FORMAT, tile_shapes(isa), add_group, layout, **choices)
