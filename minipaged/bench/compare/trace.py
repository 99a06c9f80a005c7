"""The work of a comparison, in requests, and the metrics that come of timing it.

Every metric is one run of requests: how long to the first token (TTFT), how fast one user's tokens
follow, how fast a long prompt is read, and how many tokens a second many users get together. Prompts
are random tokens, never repeated between runs, so no engine finds a prefix that it has seen.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

FIRST_TOKEN_PROMPT = 128
DECODE_TOKENS = 64
PREFILL_PROMPT = 512
NUM_USERS = 32
USER_LENGTHS = (16, 256)  # of prompts and of outputs, both ends included


@dataclass(frozen=True)
class Timing:
    """Seconds from the submission of a run's requests: to the last token, and to the first."""

    wall: float
    first: float
    generated: int


@dataclass(frozen=True)
class Metric:
    """A run and the number made of its timing.

    ``lengths(rng)``: (prompt tokens, output tokens) of each request. ``value(timing)``: the number, in
    ``unit``.
    """

    name: str
    title: str
    unit: str
    lengths: Callable[[random.Random], list[tuple[int, int]]]
    value: Callable[[Timing], float]
    higher_is_better: bool = True


def _users(rng: random.Random) -> list[tuple[int, int]]:
    low, high = USER_LENGTHS
    return [(rng.randint(low, high), rng.randint(low, high)) for _ in range(NUM_USERS)]


METRICS = (
    Metric(
        "ttft",
        f"TTFT at {FIRST_TOKEN_PROMPT} tokens",
        "ms",
        lambda rng: [(FIRST_TOKEN_PROMPT, 1)],
        value=lambda timing: timing.wall * 1e3,
        higher_is_better=False,
    ),
    Metric(
        "decode",
        "decode, one user",
        "tokens/s",
        lambda rng: [(FIRST_TOKEN_PROMPT, DECODE_TOKENS + 1)],
        value=lambda timing: (timing.generated - 1) / (timing.wall - timing.first),
    ),
    Metric(
        "prefill",
        f"prefill of {PREFILL_PROMPT} tokens",
        "tokens/s",
        lambda rng: [(PREFILL_PROMPT, 1)],
        value=lambda timing: PREFILL_PROMPT / timing.wall,
    ),
    Metric(
        "users",
        f"{NUM_USERS} users",
        "tokens/s",
        _users,
        value=lambda timing: timing.generated / timing.wall,
    ),
)


def draw_lengths(metric: Metric, seed: int) -> list[tuple[int, int]]:
    """The lengths of a metric's requests: the same in every round, so that rounds can be compared."""
    return metric.lengths(random.Random(seed))


def draw_requests(lengths: list[tuple[int, int]], vocab_size: int, rng: random.Random) -> list[dict]:
    """Requests of these lengths with fresh prompts, in the form that runners take."""
    return [
        {"prompt": [rng.randrange(vocab_size) for _ in range(prompt)], "max_tokens": output}
        for prompt, output in lengths
    ]


def limits(all_lengths: list[list[tuple[int, int]]], num_threads: int) -> dict[str, int]:
    """What an engine must have room for, over all runs (see ``runners/serve.py``)."""
    return {
        "num_threads": num_threads,
        "max_num_seqs": max(map(len, all_lengths)),
        "max_model_len": max(prompt + output for lengths in all_lengths for prompt, output in lengths),
        "kv_tokens": max(sum(map(sum, lengths)) for lengths in all_lengths),
    }
