"""Log-probabilities: of a chosen token, its rank, and of the likeliest tokens.

    logits     [L, V]   float32   the model's own
    facts      [A, 4]   int32     what to say: about which row of ``logits`` (-1: nothing), about which token (-1: the
                                  one that was drawn), how many of the likeliest (k), where these begin in ``top``
    token      [A, 2]   int32     what was drawn (sample.py); where nothing could be drawn, token 0 stands in
    logprob    [A]      float64   natural logarithm of the token's probability
    rank       [A]      int32     1 = the likeliest; 0 where a logit of the row is NaN or infinite
    top        [n, 2]   float64   the likeliest tokens, of equal logits the lower id first, and their logprobs

One block an entry of ``facts``. The likeliest are found one after the other: each time the best among those that
come after the last one found, by (logit descending, id ascending). k is small (20 at most in the usual protocols),
so k passes over a row that stays in the cache cost less than sorting it.

The sum of exponentials is float64; the rank counts what comes before the token in the same order.
"""

from __future__ import annotations

import math
from functools import cache

from numba import cuda

from cuda_kernels.argmax import INFINITY, THREADS, WARPS, is_finite
from cuda_kernels.block import block_argmax, block_count, block_max, block_sum_f64, block_sum_i32
from cuda_kernels.kernel import Kernel, float32, float64, int32, pointer


@cuda.jit(device=True)
def next_best(logits, offset, vocab_size, last, last_token, values, indices):
    """The likeliest token after (``last``, ``last_token``) and its logit."""
    best, best_token = float32(-INFINITY), int32(vocab_size)
    i = int32(cuda.threadIdx.x)
    while i < vocab_size:
        logit = logits[offset + i]
        if (logit < last or (logit == last and i > last_token)) and logit > best:
            best, best_token = logit, int32(i)
        i += int32(THREADS)
    return block_argmax(best, best_token, values, indices)


@cache
def build() -> Kernel:
    """``logprobs(logits, facts, token, logprob, rank, top, vocab_size)``."""

    def logprobs(logits, facts, token, logprob, rank, top, vocab_size):
        values, indices = cuda.shared.array(WARPS, float32), cuda.shared.array(WARPS, int32)
        sums, counts = cuda.shared.array(WARPS, float64), cuda.shared.array(WARPS, int32)
        r, thread = cuda.blockIdx.x, cuda.threadIdx.x
        if facts[r * 4] < 0:
            return
        offset, about = facts[r * 4] * vocab_size, facts[r * 4 + 1]
        if about < 0:
            about = max(token[r * 2], int32(0))
        chosen = logits[offset + about]
        largest = float32(-INFINITY)
        i = thread
        while i < vocab_size:
            logit = logits[offset + i]
            if logit > largest:  # no NaN is
                largest = logit
            i += THREADS
        largest = block_max(largest, values)
        total, before, bad = float64(0), int32(0), False
        i = thread
        while i < vocab_size:
            logit = logits[offset + i]
            if not is_finite(logit):
                bad = True
            total += float64(math.exp(logit - largest))
            if logit > chosen or (logit == chosen and i <= about):
                before += int32(1)
            i += THREADS
        log_total = float64(largest) + math.log(block_sum_f64(total, sums))
        before = block_sum_i32(before, counts)
        if block_count(bad, counts) > 0:
            before = int32(0)
        if thread == 0:
            logprob[r] = float64(chosen) - log_total
            rank[r] = before
        last, last_token = float32(INFINITY), int32(-1)
        j = facts[r * 4 + 3]
        end = j + facts[r * 4 + 2]
        while j < end:
            last, last_token = next_best(logits, offset, vocab_size, last, last_token, values, indices)
            if thread == 0:
                top[2 * j], top[2 * j + 1] = float64(last_token), float64(last) - log_total
            j += 1

    return Kernel(
        name="logprobs",
        body=logprobs,
        signature=(
            pointer(float32),
            pointer(int32),
            pointer(int32),
            pointer(float64),
            pointer(int32),
            pointer(float64),
            int32,
        ),
        block=THREADS,
        registers_at_most=96,  # on sm_75; newer ones take 51
        blocks_per_sm=1,
    )


def launch_dims(num_facts: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Grid and block for ``num_facts`` (A) entries."""
    return (num_facts, 1, 1), (THREADS, 1, 1)
