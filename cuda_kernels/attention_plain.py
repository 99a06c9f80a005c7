"""Paged attention to be read first: one block for one query head of one token, every value in float32.

    q              [T, Nq, D]                       dtype
    k_cache,
    v_cache        [blocks, Nkv, block_size, D]     kv_dtype   one layer
    k_scales,
    v_scales       [blocks, Nkv, block_size]        float32    (int8 only)
    block_tables   [S, max_blocks]                  int32      block of a sequence's tokens 0.., block_size.., ...
    sequences      [T]                              int32      row of block_tables that a token belongs to
    positions      [T]                              int32      of a token in its sequence; below 0: padding
    out            [T, Nq, D]                       dtype      zeros for padding

A token at position ``p`` sees the keys ``max(0, p - window + 1)`` to ``p`` (its own K and V are in the cache
already). Query head ``h`` reads KV head ``h // (Nq / Nkv)``.

Keys come in tiles of 32, at positions that are multiples of 32, so the order of all additions depends on
nothing but the row's own position. Each tile goes through three phases, and 128 threads take another part in
each::

    1  load     K tile -> shared memory [32, D + 4]       thread -> neighbouring values (coalesced)
    2  score    s[j] = scale * q . K[j]                   4 threads a key, each a quarter of D
                new maximum m', p[j] = exp(s[j] - m')     every warp alike, lane -> key
    3  weigh    acc[d] = acc[d] * exp(m - m') + sum over j of p[j] * V[j, d]      thread -> values d, d + 128

The running maximum m and sum l make the softmax *online* (Milakov and Gimelshein, 2018): what was
accumulated under an older, smaller maximum is scaled down. In the end out[d] = acc[d] / l. Rows of four
floats more than D keep the four-by-eight threads of a warp in 32 different banks.
"""

from __future__ import annotations

import math
from functools import cache

from numba import cuda

from cuda_kernels.dtypes import ELEMENTS, loader, storer
from cuda_kernels.kernel import Kernel, float32, int32, pointer
from cuda_kernels.warp import FULL, warp_max, warp_sum

THREADS = 128
TILE = 32  # keys: one a lane
NO_WINDOW = 2**31 - 1


@cache
def build(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    soft_cap: float | None = None,
    dtype: str = "float32",
    kv_dtype: str = "float32",
) -> Kernel:
    """Arguments ``(q, k_cache, v_cache, k_scales, v_scales, block_tables, sequences, positions, out, max_blocks,
    window, scale)``.

    ``window``: keys that a token sees at most, itself included (:data:`NO_WINDOW`: all).
    """
    group, pitch = num_heads // num_kv_heads, head_dim + 4
    keys_size = TILE * pitch
    load_q, load_kv, store = loader(dtype), loader(kv_dtype), storer(dtype)
    quantised, capped, cap = kv_dtype == "int8", soft_cap is not None, soft_cap or 1.0
    infinity = math.inf

    def attention_plain(
        q, k_cache, v_cache, k_scales, v_scales, block_tables, sequences, positions, out, max_blocks, window, scale
    ):  # fmt: skip
        query = cuda.shared.array(head_dim, float32)
        keys = cuda.shared.array(keys_size, float32)
        scores = cuda.shared.array(TILE, float32)
        slots = cuda.shared.array(TILE, int32)  # row of each key in the cache; -1: not visible
        row, head, thread = cuda.blockIdx.x, cuda.blockIdx.y, cuda.threadIdx.x
        lane = thread % 32
        position = positions[row]
        table = sequences[row] * max_blocks
        first_key = max(0, position - window + 1)
        d = thread
        while d < head_dim:
            query[d] = load_q(q[(row * num_heads + head) * head_dim + d]) * scale
            d += THREADS

        maximum, total = float32(-infinity), float32(0)
        acc0, acc1 = float32(0), float32(0)
        tile = first_key // TILE * TILE
        while tile <= position:
            if thread < TILE:
                key = tile + thread
                slot = int32(-1)
                if first_key <= key and key <= position:
                    block = block_tables[table + key // block_size]
                    slot = int32((block * num_kv_heads + head // group) * block_size + key % block_size)
                slots[thread] = slot
            cuda.syncthreads()

            i = thread
            while i < TILE * head_dim:
                j, d = i // head_dim, i % head_dim
                value = float32(0)
                if slots[j] >= 0:
                    value = load_kv(k_cache[slots[j] * head_dim + d])
                    if quantised:
                        value *= k_scales[slots[j]]
                keys[j * pitch + d] = value
                i += THREADS
            cuda.syncthreads()

            j = thread // 4
            score = float32(0)
            d = thread % 4
            while d < head_dim:
                score += query[d] * keys[j * pitch + d]
                d += 4
            score += cuda.shfl_xor_sync(FULL, score, 1)
            score += cuda.shfl_xor_sync(FULL, score, 2)
            if capped:
                score = float32(cap) * math.tanh(score / float32(cap))
            if thread % 4 == 0:
                scores[j] = score if slots[j] >= 0 else float32(-infinity)
            cuda.syncthreads()

            score = scores[lane]
            new_maximum = max(maximum, warp_max(score))
            weight = math.exp(score - new_maximum)
            correction = math.exp(maximum - new_maximum)
            maximum = new_maximum
            total = total * correction + warp_sum(weight)
            cuda.syncthreads()
            if thread < TILE:
                scores[thread] = weight
            cuda.syncthreads()

            acc0 *= correction
            acc1 *= correction
            j = 0
            while j < TILE:
                if slots[j] >= 0:
                    weight = scores[j]
                    if quantised:
                        weight *= v_scales[slots[j]]
                    value = slots[j] * head_dim + thread
                    if thread < head_dim:
                        acc0 += weight * load_kv(v_cache[value])
                    if thread + THREADS < head_dim:
                        acc1 += weight * load_kv(v_cache[value + THREADS])
                j += 1
            cuda.syncthreads()
            tile += TILE

        inverse = float32(0)
        if total > float32(0):
            inverse = float32(1) / total
        to = (row * num_heads + head) * head_dim + thread
        if thread < head_dim:
            out[to] = store(acc0 * inverse)
        if thread + THREADS < head_dim:
            out[to + THREADS] = store(acc1 * inverse)

    floats, ints, kv, act = pointer(float32), pointer(int32), pointer(ELEMENTS[kv_dtype]), pointer(ELEMENTS[dtype])
    return Kernel(
        name="attention_plain",
        body=attention_plain,
        signature=(act, kv, kv, floats, floats, ints, ints, ints, act, int32, int32, float32),
        variant={
            "heads": num_heads, "kv_heads": num_kv_heads, "head_dim": head_dim, "block_size": block_size,
            "soft_cap": soft_cap, "dtype": dtype, "kv_dtype": kv_dtype,
        },  # fmt: skip
        block=THREADS,
        registers_at_most=128,
        blocks_per_sm=4,
    )


def launch_dims(num_tokens: int, num_heads: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Grid and block for ``num_tokens`` rows."""
    return (num_tokens, num_heads, 1), (THREADS, 1, 1)
