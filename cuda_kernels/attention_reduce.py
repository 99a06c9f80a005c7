"""The end of a split decode: folds the chunks of a context, in order, into the rows' attention.

    workspace         as attention_decode.py leaves it, with ``num_chunks`` chunks
    query_start_loc, context_lens, tiles, out, window     as there

One block takes a tile of one KV head. Each thread folds its own values, and finds the factors of their row
itself: that is cheaper than to share them::

    grid (n, Nkv)     thread -> value (row, d), neighbours along d;      for each chunk: M, L, ACC fold
"""

from __future__ import annotations

import math
from functools import cache

from numba import cuda

from cuda_kernels.attention_decode import tile_rows
from cuda_kernels.attention_tile import CHUNK, fold, fold_factors, inverse_of
from cuda_kernels.dtypes import ELEMENTS, storer
from cuda_kernels.kernel import Kernel, float32, int32, pointer

THREADS = 256
INFINITY = math.inf


@cache
def build(num_heads: int, num_kv_heads: int, head_dim: int, dtype: str = "float16") -> Kernel:
    """``attention_reduce(workspace, query_start_loc, context_lens, tiles, out, num_chunks, window)``."""
    group, rows, store = num_heads // num_kv_heads, tile_rows(num_heads, num_kv_heads), storer(dtype)

    def attention_reduce(workspace, query_start_loc, context_lens, tiles, out, num_chunks, window):
        kv_head = cuda.blockIdx.y
        sequence, row = tiles[2 * cuda.blockIdx.x], tiles[2 * cuda.blockIdx.x + 1]
        first_token = query_start_loc[sequence]
        num_tokens = query_start_loc[sequence + 1] - first_token
        num_rows = num_tokens * group
        start = context_lens[sequence] - num_tokens
        end = (start + (min(row + rows, num_rows) - 1) // group) // CHUNK + 1
        first = max(0, start + row // group - window + 1) // CHUNK
        cells = (cuda.blockIdx.x * cuda.gridDim.y + kv_head) * num_chunks
        stats = cuda.gridDim.x * cuda.gridDim.y * num_chunks * rows * head_dim
        value = cuda.threadIdx.x
        while value < rows * head_dim:
            r = value // head_dim
            if row + r < num_rows:
                maximum, total, acc = float32(-INFINITY), float32(0), float32(0)
                chunk = first
                while chunk < end:
                    cell = cells + chunk
                    at = stats + (cell * rows + r) * 2
                    maximum, total, before, this = fold_factors(maximum, total, workspace[at], workspace[at + 1])
                    acc = fold(acc, before, workspace[cell * rows * head_dim + value], this)
                    chunk += 1
                head = (first_token + (row + r) // group) * num_heads + kv_head * group + (row + r) % group
                out[head * head_dim + value % head_dim] = store(acc * inverse_of(total))
            value += THREADS

    ints = pointer(int32)
    return Kernel(
        name="attention_reduce",
        body=attention_reduce,
        signature=(pointer(float32), ints, ints, ints, pointer(ELEMENTS[dtype]), int32, int32),
        variant={"heads": num_heads, "kv_heads": num_kv_heads, "head_dim": head_dim, "dtype": dtype},
        block=THREADS,
        registers_at_most=64,
        blocks_per_sm=4,
    )


def launch_dims(num_tiles: int, num_kv_heads: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Grid and block for ``num_tiles`` tiles."""
    return (num_tiles, num_kv_heads, 1), (THREADS, 1, 1)
