"""From packed weights to the fragments that ``mma`` multiplies: what a lane loads, and what becomes of it.

A lane loads 16 bytes at once, of the layouts that :mod:`~cuda_kernels.packing` draws, and keeps them as 32-bit
words in a local array ``a`` that lives in registers; a pair of values is unpacked where it is needed::

    float16, bfloat16   a[8 m ..]   8 words: the pairs of 16 rows and 2 x 16 columns
    int8                a[4 m ..]   4 words of 4 bytes: two words for each 16 columns
    int4                a[6 p ..]   4 words of 8 nibbles for 32 rows and 32 columns, 2 words of scales

An integer u below 2^10 becomes a float16 without conversion: as the low bits of 1024.0 it is 1024 + u, and a
subtraction leaves u - 128 (int8) or u - 8 (int4), exactly. bfloat16 has 2^7 instead, enough for int4; a byte
takes the detour over float32, where it is the low bits of 2^23.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

from numba import cuda

from cuda_kernels.intrinsics import bits_to_f32, byte_permute, f32_to_bits, ldg64, ldg128, sub_half2, unpack_half2
from cuda_kernels.kernel import float32, uint32

LANES = 32
UPPER_HALVES = 0x7632  # byte_permute: the upper 16 bits of both words


@cuda.jit(device=True)
def _shifted_bf16x2(low, high, offset):
    """``low - offset`` and ``high - offset``, small integers in float32, as two bfloat16."""
    return byte_permute(f32_to_bits(low - offset), f32_to_bits(high - offset), uint32(UPPER_HALVES))


@cuda.jit(device=True)
def _bytes_to_half2(word, selector):
    """Two bytes u of ``word`` as float16 u - 128."""
    return sub_half2(byte_permute(word, uint32(0x64646464), uint32(selector)), uint32(0x64806480))


@cuda.jit(device=True)
def _byte_to_f32(word, i):
    """2^23 + byte ``i`` of ``word``."""
    return bits_to_f32(byte_permute(word, uint32(0x4B000000), uint32(0x7650 + i)))


@cuda.jit(device=True)
def _bytes_to_bf16x2(word, i):
    """Bytes ``i`` and ``i + 1`` of ``word`` as bfloat16 u - 128."""
    return _shifted_bf16x2(_byte_to_f32(word, i), _byte_to_f32(word, i + 1), float32(8388736))


@cuda.jit(device=True)
def _nibbles_to_half2(word, i):
    """The nibbles at bits 4i and 4i + 16 as float16 u - 8."""
    return sub_half2((word >> uint32(4 * i)) & uint32(0x000F000F) | uint32(0x64006400), uint32(0x64086408))


@cuda.jit(device=True)
def _nibbles_to_bf16x2(word, i):
    """The nibbles at bits 4i and 4i + 16 as bfloat16 u - 8."""
    pair = (word >> uint32(4 * i)) & uint32(0x000F000F) | uint32(0x43004300)  # 128 + u, twice
    low, high = bits_to_f32(pair << uint32(16)), bits_to_f32(pair & uint32(0xFFFF0000))
    return _shifted_bf16x2(low, high, float32(136))


@cache
def fragment_reader(weight: str, x: str, row_tiles: int) -> SimpleNamespace:
    """How ``row_tiles`` x 16 rows of a weight are read, 32 columns at a time, to be multiplied with ``x``.

    ``words``: how many of ``a`` a chunk takes, from ``start`` on. ``read(weight, scales, tile, last, chunk, chunks,
    a, start)`` fills them from chunk ``chunk`` of ``chunks``; ``tile`` counts 16 rows and is a multiple of
    ``row_tiles``, ``last`` is the last panel. ``fragment(a, start, m, step)`` is the fragment of tile ``m`` and of
    columns 16 ``step`` and on. ``chunk_scale(a, start, m)``: int4's scales of the lane's rows g and g + 8.
    """
    return {"int8": _int8_reader, "int4": _int4_reader}.get(weight, _float_reader)(x, row_tiles)


def _float_reader(x: str, row_tiles: int) -> SimpleNamespace:
    @cuda.jit(device=True)
    def read(weight, scales, tile, last, chunk, chunks, a, start):
        lane = cuda.threadIdx.x % LANES
        for m in range(row_tiles):
            for step in range(2):
                index = ((min(tile // 4 + m // 4, last) * chunks + chunk) * 4 + tile % 4) * 2 * LANES + lane
                at = start + m * 8 + step * 4
                a[at], a[at + 1], a[at + 2], a[at + 3] = ldg128(weight, (index + (m % 4 * 2 + step) * LANES) * 8)

    @cuda.jit(device=True)
    def fragment(a, start, m, step):
        at = start + m * 8 + step * 4
        return a[at], a[at + 1], a[at + 2], a[at + 3]

    return SimpleNamespace(words=8 * row_tiles, read=read, fragment=fragment, chunk_scale=None)


def _int8_reader(x: str, row_tiles: int) -> SimpleNamespace:
    @cuda.jit(device=True)
    def read(weight, scales, tile, last, chunk, chunks, a, start):
        lane = cuda.threadIdx.x % LANES
        for m in range(row_tiles):
            index = ((min(tile // 4 + m // 4, last) * chunks + chunk) * 4 + tile % 4 + m % 4) * LANES + lane
            at = start + m * 4
            a[at], a[at + 1], a[at + 2], a[at + 3] = ldg128(weight, index * 16)

    @cuda.jit(device=True)
    def fragment_f16(a, start, m, step):
        at = start + m * 4 + step * 2
        first, second = a[at], a[at + 1]
        return (
            _bytes_to_half2(first, 0x4140),
            _bytes_to_half2(first, 0x4342),
            _bytes_to_half2(second, 0x4140),
            _bytes_to_half2(second, 0x4342),
        )

    @cuda.jit(device=True)
    def fragment_bf16(a, start, m, step):
        at = start + m * 4 + step * 2
        first, second = a[at], a[at + 1]
        return (
            _bytes_to_bf16x2(first, 0),
            _bytes_to_bf16x2(first, 2),
            _bytes_to_bf16x2(second, 0),
            _bytes_to_bf16x2(second, 2),
        )

    fragment = fragment_bf16 if x == "bfloat16" else fragment_f16
    return SimpleNamespace(words=4 * row_tiles, read=read, fragment=fragment, chunk_scale=None)


def _int4_reader(x: str, row_tiles: int) -> SimpleNamespace:
    unpack = _nibbles_to_bf16x2 if x == "bfloat16" else _nibbles_to_half2

    @cuda.jit(device=True)
    def read(weight, scales, tile, last, chunk, chunks, a, start):
        lane = cuda.threadIdx.x % LANES
        for p in range(row_tiles // 2):
            index = ((min(tile // 4 + p // 2, last) * chunks + chunk) * 2 + tile % 4 // 2 + p % 2) * LANES
            at = start + p * 6
            a[at], a[at + 1], a[at + 2], a[at + 3] = ldg128(weight, (index + lane) * 16)
            a[at + 4], a[at + 5] = ldg64(scales, index + lane // 4 * 4)

    @cuda.jit(device=True)
    def fragment(a, start, m, step):
        word = a[start + m // 2 * 6 + m % 2 * 2 + step]
        return unpack(word, 0), unpack(word, 1), unpack(word, 2), unpack(word, 3)

    @cuda.jit(device=True)
    def chunk_scale(a, start, m):
        return unpack_half2(a[start + m // 2 * 6 + 4 + m % 2])

    return SimpleNamespace(words=3 * row_tiles, read=read, fragment=fragment, chunk_scale=chunk_scale)
