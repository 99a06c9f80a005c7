"""Attention of chunked prefill on tensor cores: a warp takes 16 rows and walks along their whole context.

    q, k_cache, v_cache, k_scales, v_scales, block_tables, out     as in attention_plain.py
    query_start_loc   [S + 1]       int32   rows of q that belong to each sequence, from 0 to T
    context_lens      [S]           int32   tokens of each sequence in the cache, the step's own included
    tiles             [n, 2]        int32   (sequence, first row): 64 rows of one sequence each
    workspace         [n, Nkv, 64, D]  float32   written and read where a row's context is longer than 512

Row ``r`` of a sequence is query head ``r % group`` (of the KV head's) of its token ``r // group`` of this step,
so that the heads of a group read K and V once. A block has four warps of 16 rows each::

    grid (n, Nkv, parts)     warp w -> rows first + 16 w ..+15      each: for every 64 keys: score, softmax,
                             block z -> part z of the head's values           weigh, fold

Of a long head a warp accumulates one part (``head_parts``): all would not fit into its registers. The scores are
then computed once a part.

``attention_tile.py`` has the arithmetic and its order. Where a context is longer than a chunk, the total over
the chunks before waits in ``workspace``, a lane's values in the order in which it alone reads them back.
"""

from __future__ import annotations

import math
from functools import cache

from numba import cuda

from cuda_kernels.attention_tile import CHUNK, KEYS, ROWS, fold, fold_factors, inverse_of, tile_functions, warp_index
from cuda_kernels.dtypes import ELEMENTS, storer
from cuda_kernels.intrinsics import flat
from cuda_kernels.kernel import Kernel, float32, int32, pointer, uint32

WARPS = 4
THREADS = 32 * WARPS
TILE_ROWS = WARPS * ROWS
INFINITY = math.inf


def head_parts(head_dim: int, kv_dtype: str, cc: tuple[int, int] = (8, 0)) -> int:
    """Into how many parts the values of a head are divided, so that nothing spills.

    int8 needs registers to become 16-bit, most where an mma is two instructions, and bfloat16 needs them for its
    weights in two halves.
    """
    halves = kv_dtype == "bfloat16" and (head_dim % 64 or cc >= (9, 0))
    most = 64 if kv_dtype == "int8" or head_dim > 128 or halves else 128
    if kv_dtype == "int8" and cc < (8, 0) and head_dim % 32 == 0 or kv_dtype == "float16" and head_dim % 64 == 32:
        most = 32  # a multiple of 32 keeps V's loads wide
    return next(parts for parts in range(1, 33) if head_dim % (8 * parts) == 0 and head_dim // parts <= most)


@cache
def build(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    soft_cap: float | None = None,
    dtype: str = "float16",
    kv_dtype: str = "float16",
    cc: tuple[int, int] = (8, 0),
) -> Kernel:
    """Arguments ``(q, k_cache, v_cache, k_scales, v_scales, block_tables, query_start_loc, context_lens, tiles, out,
    workspace, max_blocks, window, scale)``; scales, and ``workspace`` where nothing needs it, may be anything.
    """
    group = num_heads // num_kv_heads
    parts = head_parts(head_dim, kv_dtype, cc)
    most = 8 if head_dim <= 64 and kv_dtype != "int8" else 4  # accumulators leave a longer head few registers
    if head_dim // parts > 96 and (dtype == "bfloat16" or cc < (8, 0)):
        most = 2
    widest = next(width for width in (8, 4, 2, 1) if width <= most and head_dim // parts % (8 * width) == 0)
    functions = tile_functions(num_kv_heads, group, head_dim, block_size, soft_cap, dtype, kv_dtype, cc, widest)
    find_keys, load_queries, score = functions.find_keys, functions.load_queries, functions.score
    softmax, weigh, store = functions.softmax, functions.weigh, storer(dtype)
    weight_words = functions.weight_words
    query_words, width, blocks = functions.query_words, functions.value_width, functions.value_blocks
    shared_query_words, shared_slots = WARPS * query_words, WARPS * KEYS
    scales_size = 2 * shared_slots if kv_dtype == "int8" else 1
    blocks_per_part = blocks // parts
    block_values = 4 * width
    lane_values = blocks_per_part * block_values

    def attention_prefill(
        q, k_cache, v_cache, k_scales, v_scales, block_tables, query_start_loc, context_lens, tiles, out, workspace,
        max_blocks, window, scale,
    ):  # fmt: skip
        queries = cuda.shared.array(shared_query_words, uint32, 16)
        slots = flat(cuda.shared.array(shared_slots, int32))
        scales = flat(cuda.shared.array(scales_size, float32))  # of the slots' K and V, for int8
        warp, lane, kv_head = warp_index(), int32(cuda.threadIdx.x % 32), int32(cuda.blockIdx.y)
        sequence, first_row = tiles[2 * cuda.blockIdx.x], tiles[2 * cuda.blockIdx.x + 1]
        first_token = query_start_loc[sequence]
        num_tokens = int32(query_start_loc[sequence + 1] - first_token)
        num_rows = int32(num_tokens * group)
        before = int32(context_lens[sequence] - num_tokens)  # the position of the sequence's first row
        last = int32(before + (min(first_row + TILE_ROWS, num_rows) - 1) // group)
        lowest = int32(max(0, before + first_row // group - window + 1))
        row = int32(first_row + ROWS * warp)
        position0 = int32(before + (row + lane // 4) // group)
        position1 = int32(before + (row + lane // 4 + 8) // group)
        lowest0, lowest1 = int32(position0 - window + 1), int32(position1 - window + 1)
        first_block = int32(cuda.blockIdx.z * blocks_per_part)
        my_queries, my_slots = int32(warp * query_words), int32(warp * KEYS)
        table = sequence * max_blocks
        load_queries(queries, shared_query_words, q, first_token, first_row, num_rows, kv_head, THREADS)
        cuda.syncthreads()
        mine = (cuda.blockIdx.x * cuda.gridDim.y + kv_head) * parts + cuda.blockIdx.z
        mine = (mine * WARPS + warp) * lane_values * 32 + lane

        s = cuda.local.array(32, float32)
        weights = cuda.local.array(weight_words, uint32)
        c = cuda.local.array(block_values, float32)
        acc = cuda.local.array(lane_values, float32)
        total_m0 = total_m1 = float32(-INFINITY)
        total_l0 = total_l1 = float32(0)
        for i in range(lane_values):
            acc[i] = float32(0)
        tile = int32(lowest // KEYS * KEYS)
        first_chunk = int32(tile // CHUNK)
        while tile <= last:
            chunk = int32(tile // CHUNK)
            end = int32(min(last + 1, (chunk + 1) * CHUNK))
            m0 = m1 = float32(-INFINITY)
            l0 = l1 = float32(0)
            for i in range(lane_values):
                acc[i] = float32(0)
            while tile < end:
                find_keys(
                    slots, scales, my_slots, tile, lowest, last, kv_head, block_tables, table, k_scales, v_scales
                )
                score(queries, my_queries, k_cache, slots, my_slots, s)
                tile_m0, tile_m1, tile_l0, tile_l1 = softmax(
                    s, weights, tile, lowest0, position0, lowest1, position1, scale, scales, my_slots
                )
                m0, l0, before0, tile0 = fold_factors(m0, l0, tile_m0, tile_l0)
                m1, l1, before1, tile1 = fold_factors(m1, l1, tile_m1, tile_l1)
                for block in range(blocks_per_part):
                    weigh(weights, v_cache, slots, scales, my_slots, first_block + block, c)
                    for j in range(width):
                        at = block * block_values + 4 * j
                        acc[at] = fold(acc[at], before0, c[4 * j], tile0)
                        acc[at + 1] = fold(acc[at + 1], before0, c[4 * j + 1], tile0)
                        acc[at + 2] = fold(acc[at + 2], before1, c[4 * j + 2], tile1)
                        acc[at + 3] = fold(acc[at + 3], before1, c[4 * j + 3], tile1)
                tile = int32(tile + KEYS)
            total_m0, total_l0, before0, tile0 = fold_factors(total_m0, total_l0, m0, l0)
            total_m1, total_l1, before1, tile1 = fold_factors(total_m1, total_l1, m1, l1)
            if chunk > first_chunk:
                for i in range(lane_values // 4):
                    at = 4 * i
                    acc[at] = fold(workspace[mine + 32 * at], before0, acc[at], tile0)
                    acc[at + 1] = fold(workspace[mine + 32 * at + 32], before0, acc[at + 1], tile0)
                    acc[at + 2] = fold(workspace[mine + 32 * at + 64], before1, acc[at + 2], tile1)
                    acc[at + 3] = fold(workspace[mine + 32 * at + 96], before1, acc[at + 3], tile1)
            if tile <= last:
                for i in range(lane_values):
                    workspace[mine + 32 * i] = acc[i]

        inverse0, inverse1 = inverse_of(total_l0), inverse_of(total_l1)
        g, t = int32(lane // 4), int32(lane % 4)
        for half in range(2):
            r = row + g + 8 * half
            if r < num_rows:
                inverse = inverse1 if half else inverse0
                head = (first_token + r // group) * num_heads + kv_head * group + r % group
                to = head * head_dim + (first_block * 8 + 2 * t) * width
                for block in range(blocks_per_part):
                    for j in range(width):
                        at = block * block_values + 4 * j + 2 * half
                        out[to + block * 8 * width + j] = store(acc[at] * inverse)
                        out[to + block * 8 * width + width + j] = store(acc[at + 1] * inverse)

    floats, ints, kv, act = pointer(float32), pointer(int32), pointer(ELEMENTS[kv_dtype]), pointer(ELEMENTS[dtype])
    return Kernel(
        name="attention_prefill",
        body=attention_prefill,
        signature=(act, kv, kv, floats, floats, ints, ints, ints, ints, act, floats, int32, int32, float32),
        variant={
            "heads": num_heads, "kv_heads": num_kv_heads, "head_dim": head_dim, "block_size": block_size,
            "soft_cap": soft_cap, "dtype": dtype, "kv_dtype": kv_dtype, "cc": "".join(map(str, cc)),
        },  # fmt: skip
        min_cc=cc if dtype == "float16" else (8, 0),
        block=THREADS,
        registers_at_most=255,
        blocks_per_sm=2 if head_dim <= 128 or cc >= (8, 0) else 1,  # sm_75 has 64 KiB of shared memory
    )


def launch_dims(
    num_tiles: int, num_kv_heads: int, head_dim: int, kv_dtype: str, cc: tuple[int, int] = (8, 0)
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Grid and block for ``num_tiles`` tiles of 64 rows; ``cc`` as the kernel was built for."""
    return (num_tiles, num_kv_heads, head_parts(head_dim, kv_dtype, cc)), (THREADS, 1, 1)
