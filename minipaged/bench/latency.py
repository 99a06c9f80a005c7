"""How long one token takes: the first (TTFT) for a prompt length, and each later one for a batch size.

The floor of a decode step is the time to read, once, all weights and the KV of the batch at the
bandwidth measured in the same run. No implementation that keeps the weights in memory at this
precision can be faster; at small batches a good one comes close.
"""

from __future__ import annotations

import random
import time

from minipaged.bench.bandwidth import read_bandwidth
from minipaged.bench.summary import median, summary
from minipaged.config import SamplingParams
from minipaged.engine import Engine
from minipaged.errors import ConfigError


def measure(
    engine: Engine,
    *,
    prompt_len: int,
    num_steps: int,
    batch_sizes: list[int],
    repetitions: int,
    num_threads: int,
    num_choices: int = 1,
    progress=None,
) -> dict:
    """TTFT and decode speed, each the median of ``repetitions`` after one warm-up.

    Args:
        prompt_len: tokens of each prompt.
        num_steps: decode steps timed in a repetition.
        batch_sizes: sequences decoded together.
        num_threads: threads that read in the bandwidth measurement.
        num_choices: more than 1 also times the first tokens of so many choices of one prompt, in turn with one.
        progress: called with a line of text as each number is known.

    Raises:
        ConfigError: a batch does not fit the engine's limits or its pool.
    """
    report = progress or (lambda line: None)
    for batch_size in batch_sizes:
        check_fits(engine, prompt_len, num_steps, batch_size)
    engine.scheduler.check_admissible(prompt_len, _first_token_params(num_choices))
    bandwidth = read_bandwidth(num_threads)
    report(f"memory read bandwidth: {bandwidth / 1e9:.1f} GB/s")
    rng = random.Random(0)
    ttft, of_choices = [], []
    for _ in range(repetitions + 1):
        ttft.append(_first_token(engine, prompt_len, rng))
        if num_choices > 1:
            of_choices.append(_first_token(engine, prompt_len, rng, num_choices))
    ttft, of_choices = ttft[1:], of_choices[1:]
    report(f"TTFT at {prompt_len} prompt tokens: {median(ttft) * 1e3:.1f} ms")
    batches = []
    for batch_size in batch_sizes:
        steps = [
            median(decode_steps(engine, prompt_len, num_steps, batch_size, rng)) for _ in range(repetitions + 1)
        ][1:]
        floor = _bytes_per_step(engine, batch_size, prompt_len + num_steps // 2) / bandwidth
        step = median(steps)
        batches.append(
            {
                "batch_size": batch_size,
                "step": summary(steps),
                "tokens_per_second": batch_size / step,
                "floor": floor,
                "share_of_floor": floor / step,
            }
        )
        report(f"batch {batch_size}: {batch_size / step:.1f} tokens/s")
    return {
        "prompt_len": prompt_len,
        "steps_timed": num_steps,
        "repetitions": repetitions,
        "read_bandwidth": bandwidth,
        "ttft": summary(ttft),
        "num_choices": num_choices,
        "ttft_of_choices": summary(of_choices) if of_choices else None,
        "decode": batches,
    }


def check_fits(engine: Engine, prompt_len: int, num_steps: int, batch_size: int) -> None:
    limits = engine.scheduler.config
    if batch_size > limits.max_num_seqs:
        raise ConfigError(f"batch size {batch_size} is more than max_num_seqs ({limits.max_num_seqs}); raise that.")
    # As in decode_steps: those that start first have decoded a little before the last one starts.
    total = prompt_len + _max_tokens(engine, prompt_len, num_steps, batch_size)
    engine.scheduler.check_admissible(prompt_len, SamplingParams(max_tokens=total - prompt_len))
    needed = batch_size * -(-total // limits.block_size)
    if needed > limits.num_blocks:
        raise ConfigError(
            f"{batch_size} sequences of {total} tokens need {needed} KV blocks of {limits.block_size} tokens, the "
            f"pool has {limits.num_blocks}; raise num_blocks, or lower the batch size or the lengths."
        )


def _max_tokens(engine: Engine, prompt_len: int, num_steps: int, batch_size: int) -> int:
    """Enough tokens that the first sequence still decodes when the last has been timed.

    While a prompt is left to compute, at most ``batch_size - 1`` sequences decode; the rest of each
    step's tokens goes to prompts.
    """
    budget = engine.scheduler.config.max_num_batched_tokens - (batch_size - 1)
    prefill_steps = -(-batch_size * prompt_len // budget)
    return prefill_steps + num_steps + 1


def _first_token_params(num_choices: int) -> SamplingParams:
    temperature = 0 if num_choices == 1 else 1  # several greedy choices would be one
    return SamplingParams(n=num_choices, temperature=temperature, ignore_eos=True, max_tokens=1)


def _first_token(engine: Engine, prompt_len: int, rng: random.Random, num_choices: int = 1) -> float:
    """Seconds from the arrival of a prompt, alone, to the first token of each of its choices."""
    engine.use_policy(engine.config.policy)
    started = time.perf_counter()
    engine.add_request(_prompt(engine, prompt_len, rng), _first_token_params(num_choices))
    while engine.has_unfinished():
        engine.step()
    return time.perf_counter() - started


def decode_steps(
    engine: Engine, prompt_len: int, num_steps: int, batch_size: int, rng: random.Random
) -> list[float]:
    """Seconds of each of ``num_steps`` steps in which ``batch_size`` sequences compute one token each."""
    engine.use_policy(engine.config.policy)
    max_tokens = _max_tokens(engine, prompt_len, num_steps, batch_size)
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=max_tokens)
    ids = [engine.add_request(_prompt(engine, prompt_len, rng), params, stream=True) for _ in range(batch_size)]
    started: set[str] = set()
    while len(started) < batch_size:  # prompts
        started.update(output.request_id for output in engine.step() if output.outputs[0].token_ids)
    times = []
    for _ in range(num_steps):
        before = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - before)
    for request_id in ids:
        engine.abort(request_id)
    return times


def _prompt(engine: Engine, prompt_len: int, rng: random.Random) -> list[int]:
    return rng.choices(range(engine.model.config.vocab_size), k=prompt_len)


def kv_bytes_per_token(engine: Engine) -> int:
    """Bytes of one token's K and V in all layers."""
    stats = engine.stats()
    return stats.kv_cache_bytes // (stats.num_blocks_total * stats.block_size)


def _bytes_per_step(engine: Engine, batch_size: int, context_len: int) -> int:
    """Bytes that a decode step must read: the weights (of an untied embedding only ``batch_size``
    rows, which is nothing) and the KV of ``context_len`` tokens a sequence."""
    weights = engine.runner.weight_bytes - engine.runner.embedding_bytes
    return weights + batch_size * context_len * kv_bytes_per_token(engine)
