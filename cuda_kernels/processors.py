"""Bias, masks and penalties: what requests do to their rows of logits before the temperature.

    raw               [S, V]   float32   left as they are: log-probabilities are the model's own
    processed         [S, V]   float32   the rows ``rows[r]`` are written, no others
    rows              [R]      int32     rows that have a processor
    starts            [R, 8]   int32     begin and end in the lists below of each row's ``allowed``, ``masked``,
                                         ``biased`` and ``seen`` tokens
    tokens            [n]      int32     token ids; distinct within one of a row's four lists
    values            [n]      float32   ``biased``: what to add; ``seen``: how often it was generated; else unused
    in_prompt         [n]      int32     ``seen``: whether the prompt holds it; else unused
    penalties         [R, 3]   float32   presence, frequency, repetition

One block a row: its threads copy the row, or, where only some tokens are allowed, write -inf and copy those;
then each list in turn, with a barrier between, since a token may stand in several::

    allowed (or all)  ->  masked: -inf  ->  biased: += value  ->  seen: penalties

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
    """``process_logits(raw, processed, rows, starts, tokens, values, in_prompt, penalties, vocab_size)``."""

    def process_logits(raw, processed, rows, starts, tokens, values, in_prompt, penalties, vocab_size):
        r, thread = cuda.blockIdx.x, cuda.threadIdx.x
        offset, lists = rows[r] * vocab_size, r * 8
        allowed, allowed_end = starts[lists], starts[lists + 1]
        i = thread
        while i < vocab_size:
            processed[offset + i] = raw[offset + i] if allowed == allowed_end else float32(-INFINITY)
            i += THREADS
        cuda.syncthreads()
        i = allowed + thread
        while i < allowed_end:
            processed[offset + tokens[i]] = raw[offset + tokens[i]]
            i += THREADS
        cuda.syncthreads()
        i = starts[lists + 2] + thread
        while i < starts[lists + 3]:
            processed[offset + tokens[i]] = float32(-INFINITY)
            i += THREADS
        cuda.syncthreads()
        i = starts[lists + 4] + thread
        while i < starts[lists + 5]:
            processed[offset + tokens[i]] += values[i]
            i += THREADS
        cuda.syncthreads()
        presence, frequency, repetition = penalties[r * 3], penalties[r * 3 + 1], penalties[r * 3 + 2]
        i = starts[lists + 6] + thread
        while i < starts[lists + 7]:
            logit, count = processed[offset + tokens[i]], values[i]
            if repetition != float32(1) and (count > 0 or in_prompt[i] != 0):
                logit = logit / repetition if logit > 0 else logit * repetition
            # Rounded after each operation, as on the host: no fused multiply-add.
            logit = add_f32(logit, -mul_f32(frequency, count))
            processed[offset + tokens[i]] = add_f32(logit, -mul_f32(presence, min(count, float32(1))))
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
        registers_at_most=40,
        blocks_per_sm=3,
    )


def launch_dims(num_rows: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Grid and block for ``num_rows`` (R) rows that have a processor."""
    return (num_rows, 1, 1), (THREADS, 1, 1)
