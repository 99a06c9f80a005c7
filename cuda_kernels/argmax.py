"""Greedy sampling: the likeliest token of each row.

    logits   [S, V]   float32
    token    [S]      int32     the lowest index of the largest logit; NOT_FINITE where a logit is NaN or infinite

One block a row; its threads stride over the vocabulary, keep their best, and compare by butterfly::

    block s:   thread 0  thread 1  ...  thread 511 | thread 0 ...
    logit          0         1             511     |   512 ...
"""

from __future__ import annotations

from functools import cache

from numba import cuda

from cuda_kernels.intrinsics import f32_to_bits
from cuda_kernels.kernel import Kernel, float32, int32, pointer, uint32
from cuda_kernels.reductions import WARP
from cuda_kernels.warp import FULL

THREADS = 512
WARPS = THREADS // WARP
NOT_FINITE = -1
INFINITY = float("inf")


@cuda.jit(device=True)
def is_finite(x):
    """Whether ``x`` is neither NaN nor infinite: its exponent is not all ones."""
    return f32_to_bits(x) & uint32(0x7F800000) != uint32(0x7F800000)


@cuda.jit(device=True)
def warp_argmax(value, index, lanes=WARP):
    """The largest value of each group of ``lanes`` and its index, the lowest where several are equal; no NaN."""
    offset = lanes // 2
    while offset > 0:
        other = cuda.shfl_xor_sync(FULL, value, offset)
        other_index = cuda.shfl_xor_sync(FULL, index, offset)
        if other > value or (other == value and other_index < index):
            value, index = other, other_index
        offset //= 2
    return value, index


@cache
def build() -> Kernel:
    """``argmax(logits, token, vocab_size)``."""

    def argmax(logits, token, vocab_size):
        values = cuda.shared.array(WARPS, float32)
        indices = cuda.shared.array(WARPS, int32)
        row, thread = cuda.blockIdx.x, cuda.threadIdx.x
        best, best_index = float32(-INFINITY), int32(vocab_size)
        i = thread
        while i < vocab_size:
            value = logits[row * vocab_size + i]
            if not is_finite(value):
                value = float32(INFINITY)  # larger than all that are finite, so it is found
            if value > best:
                best, best_index = value, int32(i)
            i += THREADS
        best, best_index = warp_argmax(best, best_index)
        lane = thread % WARP
        if lane == 0:
            values[thread // WARP], indices[thread // WARP] = best, best_index
        cuda.syncthreads()
        if thread < WARP:
            best, best_index = float32(-INFINITY), int32(vocab_size)
            if lane < WARPS:
                best, best_index = values[lane], indices[lane]
            best, best_index = warp_argmax(best, best_index)
            if thread == 0:
                token[row] = best_index if is_finite(best) else int32(NOT_FINITE)

    return Kernel(
        name="argmax",
        body=argmax,
        signature=(pointer(float32), pointer(int32), int32),
        block=THREADS,
        registers_at_most=40,
        blocks_per_sm=3,
    )


def launch_dims(num_rows: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Grid and block for ``num_rows`` rows of logits."""
    return (num_rows, 1, 1), (THREADS, 1, 1)
