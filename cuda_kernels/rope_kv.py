"""Between the product to q, k, v and attention: q/k norm, rope, and the write to the KV cache, in one pass.

    qkv            [T, Nq + 2 Nkv, D]               float32   biases added
    positions      [T]                              int32
    cos, sin       [max_len, R / 2]                 float32   any attention factor multiplied in
    q_weight,
    k_weight       [D]                              float32   (variant qk_norm)
    slot_mapping   [T]                              int64     block * block_size + offset; below 0: not stored
    q              [T, Nq, D]                       dtype     (out)
    k_cache,
    v_cache        [blocks, Nkv, block_size, D]     kv_dtype  (out) one layer
    k_scales,
    v_scales       [blocks, Nkv, block_size]        float32   (out, variant int8)

A head's tokens of a block lie side by side, so that attention reads whole sectors whatever ``D`` is. Value
``i`` of a head is rotated with value ``i + R / 2`` (Su et al., 2021, half-split layout); from ``R`` on a head
stays as it is. int8 divides a token's head by one scale, its largest magnitude over 127: a token's K and V
never depend on its neighbours.

A warp takes one head of one token, a block four; lanes hold neighbouring values, and meet in shared memory
where a value needs its partner::

    grid (T, ceil((Nq + 2 Nkv) / 4))     warp -> head      lane -> values lane, lane + 32, ...
"""

from __future__ import annotations

import math
from functools import cache

from numba import cuda

from cuda_kernels.dtypes import ELEMENTS, storer
from cuda_kernels.kernel import Kernel, float32, int8, int32, int64, pointer
from cuda_kernels.warp import warp_max, warp_sum

WARPS = 4
THREADS = 32 * WARPS


def _int8_writer(head_dim: int):
    """The device function that quantises one head of one token."""

    @cuda.jit(device=True)
    def write(values, first, cache, scales, row):
        lane = cuda.threadIdx.x % 32
        largest = float32(0)
        i = lane
        while i < head_dim:
            largest = max(largest, abs(values[first + i]))
            i += 32
        largest = warp_max(largest)
        inverse = float32(0)
        if largest > float32(0):
            inverse = float32(127) / largest
        i = lane
        while i < head_dim:
            nearest = math.floor(values[first + i] * inverse + float32(0.5))
            cache[row * head_dim + i] = int8(int32(nearest))
            i += 32
        if lane == 0:
            scales[row] = largest / float32(127)

    return write


def _float_writer(head_dim: int, kv_dtype: str):
    """The device function that stores one head of one token as it is."""
    store = storer(kv_dtype)

    @cuda.jit(device=True)
    def write(values, first, cache, scales, row):
        i = cuda.threadIdx.x % 32
        while i < head_dim:
            cache[row * head_dim + i] = store(values[first + i])
            i += 32

    return write


@cache
def build(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    rotary_dim: int = 0,
    qk_norm: bool = False,
    dtype: str = "float32",
    kv_dtype: str = "float32",
) -> Kernel:
    """Arguments ``(qkv, positions, cos, sin, q_weight, k_weight, slot_mapping, q, k_cache, v_cache, k_scales, v_scales,
    eps)``.

    Pointers that a variant does not use may be anything: ``positions``, ``cos``, ``sin`` without ``rotary_dim``,
    the weights without ``qk_norm``, the scales without int8.
    """
    heads, half, last_rotated = num_heads + 2 * num_kv_heads, rotary_dim // 2, num_heads + num_kv_heads
    staged_size = WARPS * head_dim
    store = storer(dtype)
    write = _int8_writer(head_dim) if kv_dtype == "int8" else _float_writer(head_dim, kv_dtype)

    def rope_kv(
        qkv, positions, cos, sin, q_weight, k_weight, slot_mapping, q, k_cache, v_cache, k_scales, v_scales, eps
    ):  # fmt: skip
        staged = cuda.shared.array(staged_size, float32)
        token, lane, warp = cuda.blockIdx.x, cuda.threadIdx.x % 32, cuda.threadIdx.x // 32
        head = cuda.blockIdx.y * WARPS + warp
        if head >= heads:
            return
        first = warp * head_dim
        source = (token * heads + head) * head_dim
        squares = float32(0)
        i = lane
        while i < head_dim:
            value = qkv[source + i]
            staged[first + i] = value
            squares += value * value
            i += 32

        if qk_norm and head < last_rotated:
            scale = float32(1) / math.sqrt(warp_sum(squares) / float32(head_dim) + eps)
            weight = q_weight if head < num_heads else k_weight
            i = lane
            while i < head_dim:
                staged[first + i] *= scale * weight[i]
                i += 32
        if half > 0 and head < last_rotated:
            cuda.syncwarp()
            angle = max(positions[token], 0) * half  # a padding row has position -1
            i = lane
            while i < half:
                c, s = cos[angle + i], sin[angle + i]
                x, y = staged[first + i], staged[first + i + half]
                staged[first + i] = x * c - y * s
                staged[first + i + half] = y * c + x * s
                i += 32
            cuda.syncwarp()

        if head < num_heads:
            to = (token * num_heads + head) * head_dim
            i = lane
            while i < head_dim:
                q[to + i] = store(staged[first + i])
                i += 32
            return
        slot = slot_mapping[token]
        if slot < 0:
            return
        block, offset = slot // block_size, slot % block_size
        if head < last_rotated:
            row = (block * num_kv_heads + head - num_heads) * block_size + offset
            write(staged, first, k_cache, k_scales, row)
        else:
            row = (block * num_kv_heads + head - last_rotated) * block_size + offset
            write(staged, first, v_cache, v_scales, row)

    floats, kv = pointer(float32), pointer(ELEMENTS[kv_dtype])
    return Kernel(
        name="rope_kv",
        body=rope_kv,
        signature=(
            floats, pointer(int32), floats, floats, floats, floats, pointer(int64),
            pointer(ELEMENTS[dtype]), kv, kv, floats, floats, float32,
        ),  # fmt: skip
        variant={
            "heads": num_heads, "kv_heads": num_kv_heads, "head_dim": head_dim, "block_size": block_size,
            "rotary_dim": rotary_dim, "qk_norm": qk_norm, "dtype": dtype, "kv_dtype": kv_dtype,
        },  # fmt: skip
        block=THREADS,
        registers_at_most=64,
        blocks_per_sm=8,
    )


def launch_dims(
    num_tokens: int, num_heads: int, num_kv_heads: int
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Grid and block for ``num_tokens`` rows."""
    return (num_tokens, -(-(num_heads + 2 * num_kv_heads) // WARPS), 1), (THREADS, 1, 1)
