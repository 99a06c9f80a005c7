"""Attention of few rows over a long context on tensor cores: eight warps share the context of 8 or 16 rows.

Arguments are those of ``attention_prefill.py``, except for

    tiles       [n, 2]   int32     (sequence, first row): 8 rows of one sequence each (16 for groups of more than 8)
    workspace   values  [n, Nkv, chunks, rows, D]   float32     (variant split) what each chunk accumulated
                stats   [n, Nkv, chunks, rows, 2]   float32     behind it: the chunk's maximum and sum

A chunk has 512 keys, eight tiles of 64, one for each warp. Values of a head come in pieces of up to 64 (32)::

    grid (n, Nkv)                 one block walks along the chunks
    grid (n, Nkv, chunks) split   one block a chunk; attention_reduce.py folds what they leave in workspace

    1  warp w    64 keys: score, softmax          -> m, l of the rows in shared memory
    2  thread r  row r: the factors to fold eight tiles into the chunk, and the chunk into the total
    3  for each piece of 64 values:
       warp w    weigh                            -> C [rows, 64] in shared memory
       all       fold eight C in order, then the chunk into the total: thread -> values of the piece

The order of additions is the one of ``attention_tile.py``: a row gets the same bits from this kernel, split or
not, as from the prefill kernel.
"""

from __future__ import annotations

import math
from functools import cache

from numba import cuda

from cuda_kernels.attention_tile import CHUNK, KEYS, fold, fold_factors, inverse_of, tile_functions, warp_index
from cuda_kernels.dtypes import ELEMENTS, storer
from cuda_kernels.intrinsics import flat
from cuda_kernels.kernel import Kernel, float32, int32, pointer, uint32

WARPS = CHUNK // KEYS
THREADS = 32 * WARPS
INFINITY = math.inf


def tile_rows(num_heads: int, num_kv_heads: int) -> int:
    """Rows of a tile."""
    return 8 if num_heads // num_kv_heads <= 8 else 16


def workspace_size(num_tiles: int, num_chunks: int, num_heads: int, num_kv_heads: int, head_dim: int) -> int:
    """float32 of ``workspace`` that a split launch of these sizes uses."""
    return num_tiles * num_chunks * num_kv_heads * tile_rows(num_heads, num_kv_heads) * (head_dim + 2)


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
    split: bool = False,
) -> Kernel:
    """Arguments ``(q, k_cache, v_cache, k_scales, v_scales, block_tables, query_start_loc, context_lens, tiles, out,
    workspace, max_blocks, window, scale)``; scales, and ``workspace`` where nothing needs it, may be anything.
    """
    group, rows = num_heads // num_kv_heads, tile_rows(num_heads, num_kv_heads)
    widest = 8 if rows == 8 else 4  # pieces of 16 rows would fill shared memory
    functions = tile_functions(num_kv_heads, group, head_dim, block_size, soft_cap, dtype, kv_dtype, cc, widest)
    find_keys, load_queries, score = functions.find_keys, functions.load_queries, functions.score
    softmax, weigh, store = functions.softmax, functions.weigh, storer(dtype)
    weight_words = functions.weight_words
    query_words, width, blocks = functions.query_words, functions.value_width, functions.value_blocks
    piece = 8 * width  # values
    piece_values = rows * piece
    block_values = 4 * width
    folds = -(-piece_values // THREADS)  # values of a piece that a thread folds
    num_totals, parts_size, stats_size, slots_size = blocks * folds, WARPS * piece_values, WARPS * rows, WARPS * KEYS
    scales_size = 2 * slots_size if kv_dtype == "int8" else 1

    def attention_decode(
        q, k_cache, v_cache, k_scales, v_scales, block_tables, query_start_loc, context_lens, tiles, out, workspace,
        max_blocks, window, scale,
    ):  # fmt: skip
        queries = cuda.shared.array(query_words, uint32, 16)
        slots = flat(cuda.shared.array(slots_size, int32))
        scales = flat(cuda.shared.array(scales_size, float32))  # of the slots' K and V, for int8
        parts = flat(cuda.shared.array(parts_size, float32))
        maxima = flat(cuda.shared.array(stats_size, float32))
        sums = flat(cuda.shared.array(stats_size, float32))
        before = flat(cuda.shared.array(stats_size, float32))  # factors of what came before a warp's tile
        of_tile = flat(cuda.shared.array(stats_size, float32))
        before_chunk = flat(cuda.shared.array(rows, float32))
        of_chunk = flat(cuda.shared.array(rows, float32))
        thread, warp, lane = cuda.threadIdx.x, warp_index(), cuda.threadIdx.x % 32
        g, t, kv_head = lane // 4, lane % 4, cuda.blockIdx.y
        sequence, row = tiles[2 * cuda.blockIdx.x], tiles[2 * cuda.blockIdx.x + 1]
        first_token = query_start_loc[sequence]
        num_tokens = query_start_loc[sequence + 1] - first_token
        num_rows = num_tokens * group
        start = context_lens[sequence] - num_tokens  # the position of the sequence's first row
        position0, position1 = int32(start + (row + g) // group), int32(start + (row + g + 8) // group)
        lowest0, lowest1 = int32(position0 - window + 1), int32(position1 - window + 1)
        last = start + (min(row + rows, num_rows) - 1) // group
        lowest = max(0, start + row // group - window + 1)
        my_slots, table = warp * KEYS, sequence * max_blocks
        load_queries(queries, query_words, q, first_token, row, min(num_rows, row + rows), kv_head, THREADS)

        s = cuda.local.array(32, float32)
        weights = cuda.local.array(weight_words, uint32)
        c = cuda.local.array(block_values, float32)
        totals = cuda.local.array(num_totals, float32)
        for i in range(num_totals):
            totals[i] = float32(0)
        maximum, total = float32(-INFINITY), float32(0)  # of row ``thread``
        chunk, end = lowest // CHUNK, last // CHUNK + 1
        if split:
            chunk = max(chunk, cuda.blockIdx.z)
            end = min(end, cuda.blockIdx.z + 1)
            if cuda.blockIdx.z < lowest // CHUNK:
                return
        while chunk < end:
            first_warp = max(lowest - chunk * CHUNK, 0) // KEYS
            end_warp = min(last - chunk * CHUNK, CHUNK - 1) // KEYS + 1
            mine = warp >= first_warp and warp < end_warp
            cuda.syncthreads()
            if mine:
                tile = chunk * CHUNK + warp * KEYS
                find_keys(
                    slots, scales, my_slots, tile, lowest, last, kv_head, block_tables, table, k_scales, v_scales
                )
                score(queries, 0, k_cache, slots, my_slots, s)
                m0, m1, l0, l1 = softmax(
                    s, weights, tile, lowest0, position0, lowest1, position1, scale, scales, my_slots
                )
                if t == 0:
                    maxima[warp * rows + g] = m0
                    sums[warp * rows + g] = l0
                    if rows == 16:
                        maxima[warp * rows + g + 8] = m1
                        sums[warp * rows + g + 8] = l1
            cuda.syncthreads()
            if thread < rows:
                chunk_m, chunk_l = float32(-INFINITY), float32(0)
                w = first_warp
                while w < end_warp:
                    at = w * rows + thread
                    factors = fold_factors(chunk_m, chunk_l, maxima[at], sums[at])
                    chunk_m, chunk_l, before[at], of_tile[at] = factors
                    w += 1
                if split:
                    cell = (cuda.blockIdx.x * cuda.gridDim.y + kv_head) * cuda.gridDim.z + chunk
                    stats = cuda.gridDim.x * cuda.gridDim.y * cuda.gridDim.z * rows * head_dim
                    workspace[stats + (cell * rows + thread) * 2] = chunk_m
                    workspace[stats + (cell * rows + thread) * 2 + 1] = chunk_l
                else:
                    factors = fold_factors(maximum, total, chunk_m, chunk_l)
                    maximum, total, before_chunk[thread], of_chunk[thread] = factors

            for block in range(blocks):
                if mine:
                    weigh(weights, v_cache, slots, scales, my_slots, block, c)
                    to = (warp * rows + g) * piece + 2 * t * width
                    for j in range(width):
                        parts[to + j] = c[4 * j]
                        parts[to + width + j] = c[4 * j + 1]
                        if rows == 16:
                            parts[to + 8 * piece + j] = c[4 * j + 2]
                            parts[to + 8 * piece + width + j] = c[4 * j + 3]
                cuda.syncthreads()
                for i in range(folds):
                    value = thread + i * THREADS
                    if value < piece_values:
                        r = value // piece
                        acc = float32(0)
                        w = first_warp
                        while w < end_warp:
                            at = w * rows + r
                            acc = fold(acc, before[at], parts[w * piece_values + value], of_tile[at])
                            w += 1
                        if split:
                            cell = (cuda.blockIdx.x * cuda.gridDim.y + kv_head) * cuda.gridDim.z + chunk
                            workspace[(cell * rows + r) * head_dim + block * piece + value % piece] = acc
                        else:
                            at = block * folds + i
                            totals[at] = fold(totals[at], before_chunk[r], acc, of_chunk[r])
                cuda.syncthreads()
            chunk += 1
        if split:
            return

        if thread < rows:
            of_chunk[thread] = inverse_of(total)
        cuda.syncthreads()
        for block in range(blocks):
            for i in range(folds):
                value = thread + i * THREADS
                r = row + value // piece
                if value < piece_values and r < num_rows:
                    head = (first_token + r // group) * num_heads + kv_head * group + r % group
                    to = head * head_dim + block * piece + value % piece
                    out[to] = store(totals[block * folds + i] * of_chunk[value // piece])

    floats, ints, kv, act = pointer(float32), pointer(int32), pointer(ELEMENTS[kv_dtype]), pointer(ELEMENTS[dtype])
    return Kernel(
        name="attention_decode",
        body=attention_decode,
        signature=(act, kv, kv, floats, floats, ints, ints, ints, ints, act, floats, int32, int32, float32),
        variant={
            "heads": num_heads, "kv_heads": num_kv_heads, "head_dim": head_dim, "block_size": block_size,
            "soft_cap": soft_cap, "dtype": dtype, "kv_dtype": kv_dtype, "cc": "".join(map(str, cc)), "split": split,
        },  # fmt: skip
        min_cc=cc if dtype == "float16" else (8, 0),
        block=THREADS,
        registers_at_most=255,
        blocks_per_sm=1,
    )


def launch_dims(
    num_tiles: int, num_kv_heads: int, num_chunks: int = 1
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Grid and block; ``num_chunks``: for a split launch, ceil(longest context / 512)."""
    return (num_tiles, num_kv_heads, num_chunks), (THREADS, 1, 1)
