"""Log-probabilities: of a chosen token, its rank, and of the likeliest tokens.

    logits         [S, V]    float32   the model's own
    rows           [R]       int32     rows that are asked for
    tokens         [R]       int32     the token of each, from 0 to V - 1
    logprob        [R]       float64   natural logarithm of its probability
    rank           [R]       int32     1 = the likeliest
    top_tokens     [R, k]    int32     the likeliest, of equal logits the lower id first
    top_logprobs   [R, k]    float64

One block a row. The likeliest are found one after the other: each time the best among those that come after the
last one found, by (logit descending, id ascending). k is small (up to 20 in the usual protocols), so k passes
over a row that stays in the cache cost less than sorting it.

The sum of exponentials is float64; the rank counts what comes before the token in the same order.
"""

from __future__ import annotations

import math
from functools import cache

from numba import cuda

from cuda_kernels.argmax import INFINITY, THREADS, WARPS
from cuda_kernels.block import block_argmax, block_sum_f64, block_sum_i32
from cuda_kernels.kernel import Kernel, float32, float64, int32, pointer


@cuda.jit(device=True)
def next_best(logits, offset, vocab_size, last, last_token, values, indices):
    """The likeliest token after (``last``, ``last_token``) and its logit."""
    best, best_token = float32(-INFINITY), int32(vocab_size)
    i = int32(cuda.threadIdx.x)
    while i < vocab_size:
        logit = logits[offset + i]
        if (logit < last or (logit == last and i > last_token)) and logit > best:
            best, best_token = logit, i
        i += int32(THREADS)
    return block_argmax(best, best_token, values, indices)


@cache
def build() -> Kernel:
    """``logprobs(logits, rows, tokens, logprob, rank, top_tokens, top_logprobs, k, vocab_size)``."""

    def logprobs(logits, rows, tokens, logprob, rank, top_tokens, top_logprobs, k, vocab_size):
        values, indices = cuda.shared.array(WARPS, float32), cuda.shared.array(WARPS, int32)
        sums, counts = cuda.shared.array(WARPS, float64), cuda.shared.array(WARPS, int32)
        r, thread = cuda.blockIdx.x, cuda.threadIdx.x
        offset, token = rows[r] * vocab_size, tokens[r]
        chosen = logits[offset + token]
        largest, _ = next_best(logits, offset, vocab_size, float32(INFINITY), int32(-1), values, indices)
        total, before = float64(0), int32(0)
        i = thread
        while i < vocab_size:
            logit = logits[offset + i]
            total += float64(math.exp(logit - largest))
            if logit > chosen or (logit == chosen and i <= token):
                before += int32(1)
            i += THREADS
        log_total = float64(largest) + math.log(block_sum_f64(total, sums))
        before = block_sum_i32(before, counts)
        if thread == 0:
            logprob[r] = float64(chosen) - log_total
            rank[r] = before
        last, last_token = float32(INFINITY), int32(-1)
        for j in range(k):
            last, last_token = next_best(logits, offset, vocab_size, last, last_token, values, indices)
            if thread == 0:
                top_tokens[r * k + j] = last_token
                top_logprobs[r * k + j] = float64(last) - log_total

    return Kernel(
        name="logprobs",
        body=logprobs,
        signature=(
            pointer(float32),
            pointer(int32),
            pointer(int32),
            pointer(float64),
            pointer(int32),
            pointer(int32),
            pointer(float64),
            int32,
            int32,
        ),
        block=THREADS,
        registers_at_most=64,
        blocks_per_sm=2,
    )


def launch_dims(num_rows: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Grid and block for ``num_rows`` (R) rows."""
    return (num_rows, 1, 1), (THREADS, 1, 1)
