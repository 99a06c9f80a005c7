"""Loads of K and V for the tensor cores: a few neighbouring values of a head, as pairs of 16-bit floats.

int8 becomes float16 or bfloat16 in registers: exactly for K, whose scale multiplies the scores, and for V in
bfloat16, whose scale multiplies the weights; V in float16 is multiplied by its scale first. The functions fill a
lane's own array ``words`` of uint32.
"""

from __future__ import annotations

from functools import cache

from numba import cuda

from cuda_kernels.dtypes import storer
from cuda_kernels.intrinsics import ldg32, ldg64, ldg128, pack_bf16x2, pack_half2
from cuda_kernels.kernel import float32, int32, uint32


def words_per_load(width: int) -> int:
    """uint32 that ``width`` values take; a single value takes one of its own."""
    return max(width // 2, 1)


@cuda.jit(device=True)
def _byte(word, number):
    """Byte ``number`` of ``word`` as a signed number, in float32."""
    return float32(int32(word << uint32(24 - 8 * number)) >> int32(24))


@cache
def key_words(width: int, head_dim: int, dtype: str, kv_dtype: str):
    """``load(words, cache, slot, block, t)``: what lane ``t`` of a key holds of its piece ``block``.

    ``width`` 8: 32 values a piece, two mma; 4: 16 values, one mma; 2: 16 values as two loads, 8 apart, of which
    the last one may lie beyond the head.
    """
    pack = pack_bf16x2 if dtype == "bfloat16" else pack_half2

    @cuda.jit(device=True)
    def load_8(words, cache, slot, block, t):
        index = int32(slot * head_dim + block * 32 + 8 * t)
        words[0], words[1], words[2], words[3] = ldg128(cache, index)

    @cuda.jit(device=True)
    def load_4(words, cache, slot, block, t):
        words[0], words[1] = ldg64(cache, int32(slot * head_dim + block * 16 + 4 * t))

    @cuda.jit(device=True)
    def load_2(words, cache, slot, block, t):
        index = int32(slot * head_dim + block * 16 + 2 * t)
        words[0] = ldg32(cache, index)
        words[1] = uint32(0)
        if block * 16 + 8 < head_dim:
            words[1] = ldg32(cache, index + 8)

    @cuda.jit(device=True)
    def load_8_int8(words, cache, slot, block, t):
        low, high = ldg64(cache, int32(slot * head_dim + block * 32 + 8 * t))
        words[0], words[1] = pack(_byte(low, 0), _byte(low, 1)), pack(_byte(low, 2), _byte(low, 3))
        words[2], words[3] = pack(_byte(high, 0), _byte(high, 1)), pack(_byte(high, 2), _byte(high, 3))

    @cuda.jit(device=True)
    def load_4_int8(words, cache, slot, block, t):
        word = ldg32(cache, int32(slot * head_dim + block * 16 + 4 * t))
        words[0], words[1] = pack(_byte(word, 0), _byte(word, 1)), pack(_byte(word, 2), _byte(word, 3))

    @cuda.jit(device=True)
    def load_2_int8(words, cache, slot, block, t):
        index = int32(slot * head_dim + block * 16 + 2 * t)
        words[0] = pack(float32(cache[index]), float32(cache[index + 1]))
        words[1] = uint32(0)
        if block * 16 + 8 < head_dim:
            words[1] = pack(float32(cache[index + 8]), float32(cache[index + 9]))

    if kv_dtype == "int8":
        return {8: load_8_int8, 4: load_4_int8, 2: load_2_int8}[width]
    return {8: load_8, 4: load_4, 2: load_2}[width]


@cache
def value_words(width: int, dtype: str, kv_dtype: str):
    """``load(words, at, cache, index, scale)``: ``width`` values from ``index`` on to ``words[at:]``.

    int8 is multiplied by ``scale``.
    """
    pack = pack_bf16x2 if dtype == "bfloat16" else pack_half2
    store = storer(dtype)

    @cuda.jit(device=True)
    def load_8(words, at, cache, index, scale):
        words[at], words[at + 1], words[at + 2], words[at + 3] = ldg128(cache, index)

    @cuda.jit(device=True)
    def load_4(words, at, cache, index, scale):
        words[at], words[at + 1] = ldg64(cache, index)

    @cuda.jit(device=True)
    def load_2(words, at, cache, index, scale):
        words[at] = ldg32(cache, index)

    @cuda.jit(device=True)
    def load_1(words, at, cache, index, scale):
        words[at] = uint32(cache[index])

    @cuda.jit(device=True)
    def scaled(word, number, scale):
        return pack(_byte(word, number) * scale, _byte(word, number + 1) * scale)

    @cuda.jit(device=True)
    def load_8_int8(words, at, cache, index, scale):
        low, high = ldg64(cache, index)
        words[at], words[at + 1] = scaled(low, 0, scale), scaled(low, 2, scale)
        words[at + 2], words[at + 3] = scaled(high, 0, scale), scaled(high, 2, scale)

    @cuda.jit(device=True)
    def load_4_int8(words, at, cache, index, scale):
        word = ldg32(cache, index)
        words[at], words[at + 1] = scaled(word, 0, scale), scaled(word, 2, scale)

    @cuda.jit(device=True)
    def load_2_int8(words, at, cache, index, scale):
        words[at] = pack(float32(cache[index]) * scale, float32(cache[index + 1]) * scale)

    @cuda.jit(device=True)
    def load_1_int8(words, at, cache, index, scale):
        words[at] = uint32(store(float32(cache[index]) * scale))

    if kv_dtype == "int8":
        return {8: load_8_int8, 4: load_4_int8, 2: load_2_int8, 1: load_1_int8}[width]
    return {8: load_8, 4: load_4, 2: load_2, 1: load_1}[width]
