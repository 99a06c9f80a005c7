"""Bias, masks and penalties: what requests do to their rows of logits before the temperature.

    raw          [L, V]   float32   left as they are: log-probabilities are the model's own
    processed    [A, V]   float32   row a belongs to draw a; written where it has a processor
    rows         [A]      int32     the row of ``raw`` of each draw
    starts       [A, 8]   int32     begin and end in ``words`` of each draw's ``allowed``, ``masked``, ``biased``
                                    and ``seen`` tokens; -1: the draw has no processor
    masks        [A, 2]   int32     where in ``words`` a bit for each token begins, or -1; whether the tokens with a
                                    bit are to have the logit 0 instead of their own (a grammar that has ended)
    penalties    [A, 3]   float32   presence, frequency, repetition
    words        [n]      int32     token ids, distinct within one of a draw's four lists, and bits, lowest first
    floats       [n]      float32   the same memory: behind ``biased`` what to add to each, behind ``seen`` how often
                                    each was generated

One block a draw: its threads copy the row, or, where only some tokens are allowed, write -inf and copy those;
then each list in turn, with a barrier between, since a token may stand in several::

    allowed (or all)  ->  masked: -inf  ->  biased: += value  ->  seen: penalties  ->  no bit: -inf

The order and the formulas are the host's: a seen token's logit is divided by the repetition penalty where it is
positive, else multiplied, then loses frequency * count and, if it was generated, presence.
"""

from __future__ import annotations

from functools import cache

from numba import cuda

from cuda_kernels.intrinsics import add_f32, mul_f32
from cuda_kernels.kernel import Kernel, float32, int32, pointer

THREADS = 512
INFINITY = float("inf")


@cache
def build() -> Kernel:
    """``process_logits(raw, processed, rows, starts, masks, penalties, words, floats, vocab_size)``."""

    def process_logits(raw, processed, rows, starts, masks, penalties, words, floats, vocab_size):
        r, thread = cuda.blockIdx.x, cuda.threadIdx.x
        lists = r * 8
        allowed, allowed_end = starts[lists], starts[lists + 1]
        if allowed < 0:
            return
        source, offset = rows[r] * vocab_size, r * vocab_size
        i = thread
        while i < vocab_size:
            processed[offset + i] = raw[source + i] if allowed == allowed_end else float32(-INFINITY)
            i += THREADS
        cuda.syncthreads()
        i = allowed + thread
        while i < allowed_end:
            processed[offset + words[i]] = raw[source + words[i]]
            i += THREADS
        cuda.syncthreads()
        i = starts[lists + 2] + thread
        while i < starts[lists + 3]:
            processed[offset + words[i]] = float32(-INFINITY)
            i += THREADS
        cuda.syncthreads()
        biased_end = starts[lists + 5]
        size = biased_end - starts[lists + 4]
        i = starts[lists + 4] + thread
        while i < biased_end:
            processed[offset + words[i]] += floats[i + size]
            i += THREADS
        cuda.syncthreads()
        presence, frequency, repetition = penalties[r * 3], penalties[r * 3 + 1], penalties[r * 3 + 2]
        seen_end = starts[lists + 7]
        size = seen_end - starts[lists + 6]
        i = starts[lists + 6] + thread
        while i < seen_end:
            logit, count = processed[offset + words[i]], floats[i + size]
            logit = logit / repetition if logit > 0 else logit * repetition
            # Rounded after each operation, as on the host: no fused multiply-add.
            logit = add_f32(logit, -mul_f32(frequency, count))
            processed[offset + words[i]] = add_f32(logit, -mul_f32(presence, min(count, float32(1))))
            i += THREADS
        bits = masks[r * 2]
        if bits >= 0:
            cuda.syncthreads()
            i = thread
            while i < vocab_size:
                if (words[bits + i // 32] >> (i % 32)) & 1 == 0:
                    processed[offset + i] = float32(-INFINITY)
                elif masks[r * 2 + 1] != 0:
                    processed[offset + i] = float32(0)
                i += THREADS

    return Kernel(
        name="process_logits",
        body=process_logits,
        signature=(
            pointer(float32),
            pointer(float32),
            pointer(int32),
            pointer(int32),
            pointer(int32),
            pointer(float32),
            pointer(int32),
            pointer(float32),
            int32,
        ),
        block=THREADS,
        registers_at_most=48,
        blocks_per_sm=2,
    )


def launch_dims(num_draws: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Grid and block for ``num_draws`` (A)."""
    return (num_draws, 1, 1), (THREADS, 1, 1)
