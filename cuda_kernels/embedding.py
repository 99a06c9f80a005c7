"""The first kernel of a step: rows of the embedding table become the residual stream.

    ids              [T]            int32
    table            [vocab, H]     dtype
    positions        [T]            int32     (variant learned_positions)
    position_table   [max_len, H]   dtype     (variant learned_positions)
    hidden           [T, H]         float32   = table[ids] * scale (+ position_table[positions])

One block a token; neighbouring threads copy neighbouring values, so a warp reads whole sectors::

    block t:   thread 0   thread 1  ...  thread 127 | thread 0 ...
    column          0          1               127  |      128 ...

An id below zero marks a padding row, which becomes zeros.
"""

from __future__ import annotations

from functools import cache

from numba import cuda

from cuda_kernels.dtypes import ELEMENTS, loader
from cuda_kernels.kernel import Kernel, float32, int32, pointer

THREADS = 128


@cache
def build(dtype: str = "float32", learned_positions: bool = False) -> Kernel:
    """``embedding(ids, table, [positions, position_table,] hidden, width, scale)``."""
    load = loader(dtype)

    def embedding(ids, table, hidden, width, scale):
        token = cuda.blockIdx.x
        source = ids[token] * width
        column = cuda.threadIdx.x
        while column < width:
            value = float32(0)
            if source >= 0:
                value = load(table[source + column]) * scale
            hidden[token * width + column] = value
            column += THREADS

    def embedding_with_positions(ids, table, positions, position_table, hidden, width, scale):
        token = cuda.blockIdx.x
        source = ids[token] * width
        position = positions[token] * width
        column = cuda.threadIdx.x
        while column < width:
            value = float32(0)
            if source >= 0:
                value = load(table[source + column]) * scale + load(position_table[position + column])
            hidden[token * width + column] = value
            column += THREADS

    table = pointer(ELEMENTS[dtype])
    ids, hidden = pointer(int32), pointer(float32)
    if learned_positions:
        body, signature = embedding_with_positions, (ids, table, ids, table, hidden, int32, float32)
    else:
        body, signature = embedding, (ids, table, hidden, int32, float32)
    return Kernel(
        name="embedding",
        body=body,
        signature=signature,
        variant={"dtype": dtype, "positions": learned_positions},
        block=THREADS,
        registers_at_most=40,
        blocks_per_sm=12,
    )


def launch_dims(num_tokens: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Grid and block for ``num_tokens`` rows."""
    return (num_tokens, 1, 1), (THREADS, 1, 1)
