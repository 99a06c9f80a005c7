"""Activations for the integer and bfloat16 products: one scale per token, rounding to nearest even.

    scale = max |x| / 127        q = rint(x / scale)        x is about scale * q, q in -127..127

A row with a NaN or an infinity gets the scale NaN, so its outputs are NaN and no other row notices.
How the q of a row lie in memory depends on the instruction that will read them; K is padded with zeros:

======== ============================================= ==========================================
layout   bytes of a quad of k                          read by
======== ============================================= ==========================================
bytes    int8:  x0 x1 x2 x3                            ``pmaddubsw``; ``vpdpbusd`` (int4)
biased   uint8: x0+128 x1+128 x2+128 x3+128            ``vpdpbusd`` (int8)
pairs    int16: x0 x2 x1 x3                            ``pmaddwd``: even k, then odd k
bfloat16 uint16: x0 x1 x2 x3 (K padded to pairs only)  ``vdpbf16ps``
======== ============================================= ==========================================

For int4 weights, whose q are 0..15 and stand for q - 8, int32 sums follow the row: for each group of
32 k, ``-8 * sum of q``, the value that an accumulator of the group starts with.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .compile_cache import c_function
from .memory import bytes8, compiled, floats, ints32, words16, words32
from .products import PREPARE_SIGNATURE

_EXPONENT = np.uint32(0x7F800000)  # all ones: infinities and NaN
_MAGNITUDE = np.uint32(0x7FFFFFFF)


@compiled
def _set_scale(x, K, x_scale):
    """Write the scale of a row to ``x_scale``; returns what to multiply its values with."""
    bits, scale = words32(x, K), floats(x_scale, 1)
    largest = np.uint32(0)  # floats of one sign are ordered like their bits, and integers vectorise
    for k in range(K):
        largest = max(largest, bits[k] & _MAGNITUDE)
    if largest >= _EXPONENT:
        scale[0] = np.nan
        return np.float32(0)
    words32(x_scale, 1)[0] = largest
    magnitude = scale[0]
    scale[0] = magnitude / np.float32(127)
    # Below this, 127 / magnitude overflows; such values are nothing beside any other in the model.
    return np.float32(127) / magnitude if magnitude > np.float32(1e-36) else np.float32(0)


@njit(inline="always")
def _rounded(value, inverse):
    return np.int32(np.rint(value * inverse))


@compiled
def _bytes_row(x, K, inverse, q, padded):
    values, out = floats(x, K), bytes8(q, padded)
    for k in range(K):
        out[k] = _rounded(values[k], inverse)
    for k in range(K, len(out)):
        out[k] = 0


@compiled
def _biased_row(x, K, inverse, q, padded):
    values, out = floats(x, K), bytes8(q, padded)
    for k in range(K):
        out[k] = _rounded(values[k], inverse) + 128  # stored modulo 256
    for k in range(K, len(out)):
        out[k] = -128


@compiled
def _pairs_row(x, K, inverse, q, padded):
    values, out = floats(x, K), words16(q, padded)
    for quad in range(K // 4):
        for i in range(4):
            out[4 * quad + i] = _rounded(values[4 * quad + ((i & 1) << 1 | i >> 1)], inverse)
    whole = K // 4 * 4
    for k in range(whole, padded):
        out[k] = 0
    for k in range(whole, K):
        i = k - whole
        out[whole + ((i & 1) << 1 | i >> 1)] = _rounded(values[k], inverse)


@compiled
def _set_group_sums(values, sums):
    """``-8 * sum`` over each group of 32 of the prepared ``values``."""
    out = ints32(sums, len(values) // 32)
    for group in range(len(out)):
        total = np.int32(0)
        for k in range(32 * group, 32 * group + 32):
            total += np.int32(np.int16(values[k]))  # 16-bit words hold signed values, too
        out[group] = -8 * total


@compiled
def _bfloat16_row(x, K, q):
    bits, out = words32(x, K), words16(q, (K + 1) // 2 * 2)
    for k in range(K):
        word = bits[k]
        if word & _MAGNITUDE > _EXPONENT:
            out[k] = 0x7FC0  # NaN: rounding its bits up could make an infinity of it
        else:
            out[k] = (word + np.uint32(0x7FFF) + (word >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    for k in range(K, len(out)):
        out[k] = 0


def prepare_bfloat16():
    """Compile ``prepare`` for bfloat16 dot products; ``x_scale`` is not written."""

    @c_function(PREPARE_SIGNATURE, "prepare-bfloat16")
    def prepare(x, x_stride, K, first_row, last_row, prepared, prepared_stride, x_scale):
        for row in range(first_row, last_row):
            _bfloat16_row(x + row * x_stride, K, prepared + row * prepared_stride)

    return prepare


_LAYOUTS = {  # name -> (writes a row, looks at it, bytes of a value)
    "bytes": (_bytes_row, bytes8, 1),
    "biased": (_biased_row, bytes8, 1),
    "pairs": (_pairs_row, words16, 2),
}


def value_bytes(layout: str) -> int:
    """Bytes of one quantised value in ``layout``."""
    return _LAYOUTS[layout][2]


def prepare_integers(layout: str, step: int, with_group_sums: bool):
    """Compile ``prepare`` for integer products: K is padded to ``step``, sums follow if asked for."""
    quantise_row, view, size = _LAYOUTS[layout]

    @c_function(PREPARE_SIGNATURE, f"prepare-{layout}-{step}-{with_group_sums}")
    def prepare(x, x_stride, K, first_row, last_row, prepared, prepared_stride, x_scale):
        padded = (K + step - 1) // step * step
        for row in range(first_row, last_row):
            q = prepared + row * prepared_stride
            inverse = _set_scale(x + row * x_stride, K, x_scale + 4 * row)
            quantise_row(x + row * x_stride, K, inverse, q, padded)
            if with_group_sums:
                _set_group_sums(view(q, padded), q + padded * size)

    return prepare
