"""What one warp does with 16 rows of queries and 64 keys: the part that all tensor-core attention kernels share.

A *row* is one query head of one token; the rows of a tile share a KV head. With g = lane / 4 and t = lane % 4,
a lane works for the rows g and g + 8. All results are functions of one row and the keys it sees, so every
kernel below gets the same bits for a row, whatever its neighbours are::

    score     S [16, 64]  = Q [16, D] . K [64, D]^T           mma, k = 16 values of D at a time
    softmax   m = max S,  P = 2^(S - m),  l = sum P           rows live in 4 lanes: two shuffles
    weigh     C [16, 64]  = P [16, 64] . V [64, 64 of D]      mma, k = 16 keys at a time
    fold      M' = max(M, m);   L, ACC = L 2^(M - M') + l 2^(m - M'),   ACC 2^(M - M') + C 2^(m - M')

A tile's C is computed afresh and *folded* into what came before. Tiles of 64 keys begin at multiples of 64 and
are folded in order into their chunk, chunks of 512 keys in order into the row's total. So a warp that walks
along the context, eight warps that share a chunk, and blocks that share a context all add in one order. A tile
in which a row sees nothing folds as M' = M, times 1, plus 0.

Operands go from global memory to registers in loads of up to 128 bits, without a stop in shared memory. An mma
does not care in which order it is told of values that it sums over, as long as A and B agree, nor of columns
that it keeps apart. So a lane reads ``E`` neighbouring values, and these are called what the fragment needs::

    K (D a multiple of 32, E = 8)          V (D a multiple of 64, E = 8)
    lane t of key g:  d = 32 b + 8 t ..+7  lane g of keys 2t, 2t+1, 2t+8, 2t+9:  d = 64 b + 8 g ..+7
      words 0, 1 -> b0, b1 of mma 2 b        halves j of two keys, permuted into one word, -> b0 or b1
      words 2, 3 -> b0, b1 of mma 2 b + 1    of mma j: column g of C is d = 64 b + 8 g + j

A bfloat16 keeps 8 bits, which are too few for P: a weight goes as two of them, rounded and what that leaves of it,
and V is multiplied by both. float16 keeps 11: one is enough.

K and V beyond a row's sight are some other token's of the same sequence, with weight 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

from numba import cuda

from cuda_kernels.attention_operands import key_words, value_words, words_per_load
from cuda_kernels.intrinsics import (
    add_f32,
    byte_permute,
    exp2_approx,
    fma_f32,
    ldg32,
    lds128,
    mma_m16n8k8_f16,
    mma_m16n8k16_bf16,
    mma_m16n8k16_f16,
    mul_f32,
    pack_bf16x2,
    pack_half2,
    sts32,
    unpack_bf16x2,
)
from cuda_kernels.kernel import float32, int32, uint32
from cuda_kernels.warp import FULL

ROWS = 16
KEYS = 64
CHUNK = 512  # keys
NO_WINDOW = 2**31 - 1
INFINITY = math.inf
LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class TileFunctions:
    """The device functions of one variant, and the sizes they were made for.

    ``query_words``: uint32 of shared memory that the queries of 16 rows take; ``weight_words``: uint32 of a lane's
    own that a tile's weights take. ``value_width``: E of V; ``value_blocks``: pieces of ``8 E`` values in a head.
    """

    find_keys: object
    load_queries: object
    score: object
    softmax: object
    weigh: object
    query_words: int
    weight_words: int
    value_width: int
    value_blocks: int


@cuda.jit(device=True)
def warp_index():
    """The number of this thread's warp, read from its first lane: the compiler sees that all lanes agree."""
    return int32(cuda.shfl_sync(FULL, cuda.threadIdx.x // 32, 0))


@cuda.jit(device=True)
def fold_factors(maximum, total, tile_maximum, tile_total):
    """(new maximum, new total, factor of what came before, factor of the tile)."""
    new = max(maximum, tile_maximum)
    base = new if new > float32(-INFINITY) else float32(0)
    before = exp2_approx(add_f32(maximum, -base))
    tile = exp2_approx(add_f32(tile_maximum, -base))
    return new, fma_f32(total, before, mul_f32(tile_total, tile)), before, tile


@cuda.jit(device=True)
def fold(accumulated, before, value, tile):
    """One accumulated value after a tile; rounded alike in every kernel."""
    return fma_f32(accumulated, before, mul_f32(value, tile))


@cuda.jit(device=True)
def inverse_of(total):
    """What the accumulated values of a row are multiplied by in the end; 0 for a row that saw nothing."""
    if total > float32(0):
        return float32(1) / total
    return float32(0) if total == float32(0) else total


@cuda.jit(device=True)
def _mma_f16_sm75(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3):
    c0, c1, c2, c3 = mma_m16n8k8_f16(a0, a1, b0, c0, c1, c2, c3)
    return mma_m16n8k8_f16(a2, a3, b1, c0, c1, c2, c3)


@cuda.jit(device=True)
def _pack_rest(x, y, packed):
    """What the two bfloat16 of ``packed`` leave of ``x`` and ``y``, as bfloat16 in their turn."""
    low, high = unpack_bf16x2(packed)
    return pack_bf16x2(add_f32(x, -low), add_f32(y, -high))


def _mma_of(dtype: str, cc):
    if dtype == "bfloat16":
        return mma_m16n8k16_bf16
    return mma_m16n8k16_f16 if cc >= (8, 0) else _mma_f16_sm75


@cache
def tile_functions(
    num_kv_heads: int,
    group: int,
    head_dim: int,
    block_size: int,
    soft_cap: float | None,
    dtype: str,
    kv_dtype: str,
    cc: tuple[int, int],
    widest: int = 8,
) -> TileFunctions:
    """Device functions for 16 rows of ``dtype`` against K and V of ``kv_dtype``, on cards of ``cc`` and newer.

    ``widest`` bounds E of V, and with it the registers that :attr:`TileFunctions.weigh` takes; it changes no bit.
    """
    mma = _mma_of(dtype, cc)
    pack = pack_bf16x2 if dtype == "bfloat16" else pack_half2
    # The scales of int8's V: bfloat16 would round twice, and float16 has no range for small weights times scales.
    scale_weights = kv_dtype == "int8" and dtype == "bfloat16"
    split_weights = dtype == "bfloat16"
    quantised, capped, cap = kv_dtype == "int8", soft_cap is not None, soft_cap or 1.0
    key_width = next(width for width in (8, 4, 2) if head_dim % (4 * width) == 0)
    value_width = next(width for width in (8, 4, 2, 1) if width <= widest and head_dim % (8 * width) == 0)
    load_key, load_values = key_words(key_width, head_dim, dtype, kv_dtype), value_words(value_width, dtype, kv_dtype)
    key_block = max(4 * key_width, 16)  # values of D that one load of a key covers
    key_blocks, steps = -(-head_dim // key_block), key_block // 16
    key_load_words, value_load_words = 2 * steps, words_per_load(value_width)
    value_block = 8 * value_width
    num_heads, query_words = num_kv_heads * group, key_blocks * steps * 128

    @cuda.jit(device=True)
    def find_keys(slots, scales, first, tile, lowest, last, kv_head, block_tables, table, k_scales, v_scales):
        """``slots[first : first + 64]``: rows of the cache that hold the tile's keys, and of int8 the scales.

        ``scales[2 first : 2 first + 64]`` are K's, the 64 after them V's: a warp reads neighbours' at once.

        Keys outside ``lowest`` to ``last`` are replaced by the nearest one inside.
        """
        lane = int32(cuda.threadIdx.x % 32)
        cuda.syncwarp()  # the slots of the tile before have been read
        for i in range(2):
            key = int32(min(max(tile + lane + 32 * i, lowest), last))
            block = block_tables[table + key // block_size]
            slot = int32((block * num_kv_heads + kv_head) * block_size + key % block_size)
            slots[first + lane + 32 * i] = slot
            if quantised:
                scales[2 * first + lane + 32 * i] = k_scales[slot]
                scales[2 * first + KEYS + lane + 32 * i] = v_scales[slot]
        cuda.syncwarp()

    @cuda.jit(device=True)
    def load_queries(queries, size, q, first_token, row, num_rows, kv_head, threads):
        """The fragments of rows ``row``, ... to ``size`` words of shared memory, by all threads of the block.

        Row ``r`` is head ``r % group`` of the KV head's, of the sequence's token ``r // group``. Every 16 rows
        take ``query_words``: for each mma, lane and register of A one word.
        """
        word = cuda.threadIdx.x
        while word < size:
            i, lane, step = word % 4, word // 4 % 32, word % query_words // 128
            t = lane % 4
            r = row + word // query_words * ROWS + lane // 4 + 8 * (i % 2)
            if key_width == 8:
                d = step // 2 * 32 + 8 * t + step % 2 * 4 + i // 2 * 2
            elif key_width == 4:
                d = step * 16 + 4 * t + i // 2 * 2
            else:
                d = step * 16 + 2 * t + i // 2 * 8
            pair = uint32(0)
            if r < num_rows and d < head_dim:
                head = (first_token + r // group) * num_heads + kv_head * group + r % group
                pair = ldg32(q, head * head_dim + d)
            sts32(queries, word, pair)
            word += threads

    @cuda.jit(device=True)
    def score(queries, at, k_cache, slots, first, s):
        """``s[4 j + i]``: the fragment of the scores of keys 8 j to 8 j + 7, without any scale."""
        lane = int32(cuda.threadIdx.x % 32)
        g, t = int32(lane // 4), int32(lane % 4)
        words = cuda.local.array(key_load_words, uint32)
        a = cuda.local.array(8, uint32)
        for i in range(32):
            s[i] = float32(0)
        for block in range(key_blocks):
            cuda.syncwarp()  # keeps the compiler from loading all pieces at once, into registers it lacks
            for step in range(steps):
                fragment = int32(at + ((block * steps + step) * 32 + lane) * 4)
                a[4 * step], a[4 * step + 1], a[4 * step + 2], a[4 * step + 3] = lds128(queries, fragment)
            for j in range(8):
                load_key(words, k_cache, slots[first + 8 * j + g], block, t)
                for step in range(steps):
                    s[4 * j], s[4 * j + 1], s[4 * j + 2], s[4 * j + 3] = mma(
                        a[4 * step], a[4 * step + 1], a[4 * step + 2], a[4 * step + 3],
                        words[2 * step], words[2 * step + 1], s[4 * j], s[4 * j + 1], s[4 * j + 2], s[4 * j + 3],
                    )  # fmt: skip

    @cuda.jit(device=True)
    def logit(raw, factor):
        """The exponent to 2 that a raw score stands for; ``factor`` is scale, times log2(e) without a soft cap."""
        value = mul_f32(raw, factor)
        if capped:
            value = mul_f32(float32(cap * LOG2_E), math.tanh(value / float32(cap)))
        return value

    @cuda.jit(device=True)
    def softmax(s, weights, tile, lowest0, position0, lowest1, position1, scale, scales, first):
        """Weights of the tile, packed as A fragments, and (m0, m1, l0, l1) of the rows g and g + 8.

        Row g sees the keys ``lowest0`` to ``position0``, row g + 8 those from ``lowest1`` to ``position1``.
        """
        t = int32(cuda.threadIdx.x % 4)
        factor = scale if capped else mul_f32(scale, float32(LOG2_E))
        m0 = m1 = float32(-INFINITY)
        for j in range(8):
            for i in range(2):
                inside = int32(8 * j + 2 * t + i)
                key = int32(tile + inside)
                key_factor = factor
                if quantised:
                    key_factor = mul_f32(factor, scales[2 * first + inside])
                x0, x1 = logit(s[4 * j + i], key_factor), logit(s[4 * j + 2 + i], key_factor)
                if key > position0 or key < lowest0:
                    x0 = float32(-INFINITY)
                if key > position1 or key < lowest1:
                    x1 = float32(-INFINITY)
                s[4 * j + i], s[4 * j + 2 + i] = x0, x1
                m0, m1 = max(m0, x0), max(m1, x1)
        m0 = max(m0, cuda.shfl_xor_sync(FULL, m0, 1))
        m0 = max(m0, cuda.shfl_xor_sync(FULL, m0, 2))
        m1 = max(m1, cuda.shfl_xor_sync(FULL, m1, 1))
        m1 = max(m1, cuda.shfl_xor_sync(FULL, m1, 2))
        base0 = m0 if m0 > float32(-INFINITY) else float32(0)
        base1 = m1 if m1 > float32(-INFINITY) else float32(0)
        l0 = l1 = float32(0)
        for j in range(8):
            x0, x1 = exp2_approx(add_f32(s[4 * j], -base0)), exp2_approx(add_f32(s[4 * j + 1], -base0))
            y0, y1 = exp2_approx(add_f32(s[4 * j + 2], -base1)), exp2_approx(add_f32(s[4 * j + 3], -base1))
            l0, l1 = l0 + (x0 + x1), l1 + (y0 + y1)
            if scale_weights:
                value_scale0 = scales[2 * first + KEYS + 8 * j + 2 * t]
                value_scale1 = scales[2 * first + KEYS + 8 * j + 2 * t + 1]
                x0, x1, y0, y1 = x0 * value_scale0, x1 * value_scale1, y0 * value_scale0, y1 * value_scale1
            weights[2 * j], weights[2 * j + 1] = pack(x0, x1), pack(y0, y1)
            if split_weights:
                weights[16 + 2 * j] = _pack_rest(x0, x1, weights[2 * j])
                weights[16 + 2 * j + 1] = _pack_rest(y0, y1, weights[2 * j + 1])
        l0 += cuda.shfl_xor_sync(FULL, l0, 1)
        l0 += cuda.shfl_xor_sync(FULL, l0, 2)
        l1 += cuda.shfl_xor_sync(FULL, l1, 1)
        l1 += cuda.shfl_xor_sync(FULL, l1, 2)
        return m0, m1, l0, l1

    @cuda.jit(device=True)
    def weigh(weights, v_cache, slots, scales, first, block, c):
        """``c[4 j + i]``: C fragments of piece ``block`` of the head.

        For row g, c[4 j] is value ``8 E block + 2 t E + j`` and c[4 j + 1] is E further; c[4 j + 2] and
        c[4 j + 3] are the same of row g + 8.
        """
        lane = int32(cuda.threadIdx.x % 32)
        g, t = int32(lane // 4), int32(lane % 4)
        words = cuda.local.array(16, uint32)
        for i in range(4 * value_width):
            c[i] = float32(0)
        for step in range(4):
            cuda.syncwarp()  # as in score
            for i in range(4):
                key = int32(16 * step + 2 * t + i % 2 + i // 2 * 8)
                value = int32(slots[first + key] * head_dim + block * value_block + g * value_width)
                factor = float32(1)
                if quantised and not scale_weights:
                    factor = scales[2 * first + KEYS + key]
                load_values(words, i * value_load_words, v_cache, value, factor)
            for j in range(value_width):
                selector = uint32(0x5410) if j % 2 == 0 else uint32(0x7632)
                b0 = byte_permute(words[j // 2], words[value_load_words + j // 2], selector)
                b1 = byte_permute(
                    words[2 * value_load_words + j // 2], words[3 * value_load_words + j // 2], selector
                )
                c[4 * j], c[4 * j + 1], c[4 * j + 2], c[4 * j + 3] = mma(
                    weights[4 * step], weights[4 * step + 1], weights[4 * step + 2], weights[4 * step + 3],
                    b0, b1, c[4 * j], c[4 * j + 1], c[4 * j + 2], c[4 * j + 3],
                )  # fmt: skip
                if split_weights:
                    at = 16 + 4 * step
                    c[4 * j], c[4 * j + 1], c[4 * j + 2], c[4 * j + 3] = mma(
                        weights[at], weights[at + 1], weights[at + 2], weights[at + 3],
                        b0, b1, c[4 * j], c[4 * j + 1], c[4 * j + 2], c[4 * j + 3],
                    )  # fmt: skip

    return TileFunctions(
        find_keys=find_keys,
        load_queries=load_queries,
        score=score,
        softmax=softmax,
        weigh=weigh,
        query_words=query_words,
        weight_words=32 if split_weights else 16,
        value_width=value_width,
        value_blocks=head_dim // value_block,
    )
