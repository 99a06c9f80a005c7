"""The least time that a run can take on this machine, whoever computes it.

A step reads the weights once and the KV of its sequences, and does two operations for each weight and
token (the lm_head only where a token is sampled), and four for each head value and pair of positions.
Its floor is the larger of the bytes at the measured bandwidth and the operations at the measured peak
of the weight format. The schedule is the best there is: all prompts in one step, then one token of
every unfinished sequence in each. Norms, rope, softmax and sampling count as nothing.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    """What the machine does in a second: bytes read from memory; operations on the weights' format,
    and on float32 (the attention's)."""

    bytes: float
    operations: float
    attention_operations: float


def measure_rates(weight_format: str, num_threads: int) -> Rates:
    """Measured now, which takes about a second."""
    from minipaged.bench.roofline import peak_rate, read_bandwidth

    float_rate = peak_rate("float32", num_threads)
    rate = float_rate if weight_format == "float32" else peak_rate(weight_format, num_threads)
    return Rates(read_bandwidth(num_threads), rate, float_rate)


def run_floor(lengths: list[tuple[int, int]], facts: dict, rates: Rates, *, prompts: bool = True) -> float:
    """Seconds that requests of these (prompt, output) lengths take at least.

    ``facts`` is what ``runners/run_minipaged.py`` says about its model. ``prompts=False``: without the
    step that computes the prompts and the first tokens.
    """
    seconds = 0.0
    if prompts:
        new = sum(prompt for prompt, _ in lengths)
        pairs = sum(prompt * (prompt + 1) / 2 for prompt, _ in lengths)
        seconds += _step(new, len(lengths), pairs, 0, facts, rates)
    for produced in range(1, max(output for _, output in lengths)):
        contexts = [prompt + produced for prompt, output in lengths if output > produced]
        seconds += _step(len(contexts), len(contexts), sum(contexts), sum(contexts), facts, rates)
    return seconds


def _step(tokens: int, sampled: int, pairs: float, kv_tokens: int, facts: dict, rates: Rates) -> float:
    """Seconds of a step; ``pairs``: (query, key) positions; ``kv_tokens``: read from the cache."""
    read = facts["bytes_per_step"] + kv_tokens * facts["kv_bytes_per_token"]
    products = 2 * (tokens * facts["layer_parameters"] + sampled * facts["head_parameters"])
    attention = 4 * pairs * facts["attention_width"]
    computing = products / rates.operations + attention / rates.attention_operations
    return max(read / rates.bytes, computing)
