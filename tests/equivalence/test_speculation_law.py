"""Speculation changes no token: random traces in tiny pools, with guesses of every kind.

Requests of every sort arrive while others run, share prefixes, are preempted and aborted, under
random block sizes, chunk sizes and draft lengths. Each must give exactly what it gives alone without
speculation: tokens, text, log-probabilities, the reason to stop. On the cpu backend logits are
bit-identical in any company, so no near-tie is excused.
"""

import dataclasses
import functools
import os
import random
from collections import Counter
from pathlib import Path

import pytest

from minipaged.config import SamplingParams
from minipaged.engine import Engine
from minipaged.sampling.speculative.adaptive import LengthController
from minipaged.sampling.speculative.draft_model import DraftModelProposer
from minipaged.sampling.speculative.ngram import NgramProposer
from minipaged.sampling.speculative.speculator import Speculator
from tests.support.engines import assert_all_blocks_back, generate, make_engine
from tests.support.random_params import random_options

NUM_TRACES = int(os.environ.get("MINIPAGED_TEST_SPECULATION_TRACES", "500"))
NUM_REQUESTS = 60
FORMATS = {"device": "cpu", "quantization": "int8", "kv_cache_dtype": "int8", "num_threads": 1}
# model, draft (a good one, a perfect one, lookup, one larger than its target), and the share of traces
PAIRS = [
    ("tiny", "tiny-draft", 0.1),
    ("tiny-draft", "tiny-draft", 0.3),
    ("tiny-draft", "ngram", 0.4),
    ("tiny-draft", "tiny", 0.2),
]
TEXT = (Path(__file__).parent.parent / "fixtures" / "validation.txt").read_text(encoding="utf-8")


def random_params(rng: random.Random) -> SamplingParams:
    """Greedy two times in three, else sampled with a seed and filters."""
    options = random_options(rng, greedy=0.67)
    if rng.random() < 0.1:
        options |= {"stop_token_ids": [rng.randrange(260, 400) for _ in range(20)]}
    if rng.random() < 0.1:
        options |= {"bad_words": ["the", "king of"], "logit_bias": {300: 3.0}}
    return SamplingParams(**options)


def random_prompts(rng: random.Random, tokenizer) -> list[list[int]]:
    """Plays, where a draft model is good, and repetitions, where lookup is; many share a prefix."""
    ids = tokenizer.encode(TEXT)
    roots = []
    for _ in range(5):
        start, length = rng.randrange(len(ids) - 100), rng.choice([16, 32, 40, 64])
        roots.append(ids[start : start + length])
    roots += [(ids[i : i + 5] * 13)[: rng.randint(20, 60)] for i in rng.sample(range(len(ids) - 5), 3)]
    prompts = []
    for _ in range(NUM_REQUESTS):
        root = rng.choice(roots)
        prompts.append(root[: rng.randint(1, len(root))] + rng.choice([[], [], roots[0][: rng.randint(1, 9)]]))
    return prompts


@pytest.fixture(scope="module")
def expectations():
    """For each model: (prompt, parameters, output) of requests alone, without speculation or prefix cache."""
    found = {}
    for model in ("tiny", "tiny-draft"):
        rng = random.Random(model)
        engine = make_engine(model, enable_prefix_caching=False, **FORMATS)
        found[model] = []
        for prompt in random_prompts(rng, engine.model.tokenizer):
            params = random_params(rng)
            found[model].append((prompt, params, generate(engine, prompt, params)))
        engine.close()
    return found


def assert_equal(output, expected, where: str) -> None:
    """Equal in all that the caller sees; what was aborted is a prefix."""
    got, wanted = output.outputs[0], expected.outputs[0]
    if got.finish_reason == "abort":
        assert got.token_ids == wanted.token_ids[: len(got.token_ids)], where
        return
    assert got.token_ids == wanted.token_ids, f"{where}: {got.token_ids} is not {wanted.token_ids}"
    assert (got.text, got.finish_reason, got.stop_reason) == (wanted.text, wanted.finish_reason, wanted.stop_reason)
    assert got.logprobs == wanted.logprobs, where
    assert got.cumulative_logprob == wanted.cumulative_logprob, where
    assert output.prompt_logprobs == expected.prompt_logprobs, where


@functools.cache
def engine_of(model: str, draft: str, block_size: int) -> Engine:
    """Models and KV memory; each trace brings its own scheduler and speculator."""
    options = FORMATS | {"block_size": block_size, "num_blocks": 2 * 512 // block_size}
    return make_engine(model, speculative_model=draft, **options)


def renew(engine: Engine, num_tokens: int, adaptive: bool, **limits) -> None:
    """A fresh, empty pool with new limits, for target and draft; and nothing learned yet."""
    engine._use(dataclasses.replace(engine.scheduler.config, **limits))
    proposer = NgramProposer()
    old = engine.speculator.proposer
    if isinstance(old, DraftModelProposer):
        proposer = DraftModelProposer(
            old.runner,
            num_blocks=limits["num_blocks"],
            block_size=engine.config.block_size,
            max_model_len=engine.max_model_len,
            max_num_tokens=limits["max_num_batched_tokens"],
        )
    controller = LengthController(proposer) if adaptive else None
    engine.speculator = Speculator(proposer, num_tokens, controller)


def run_trace(rng: random.Random, model: str, draft: str, expectations: list, where: str) -> Counter:
    """One random trace from an empty pool; returns its counters."""
    block_size = rng.choice([1, 4, 16])
    chosen = [rng.choice(expectations) for _ in range(rng.randint(2, 8))]
    smallest_pool = -(-max(len(prompt) + params.max_tokens for prompt, params, _ in chosen) // block_size)
    max_num_seqs = rng.choice([1, 2, 4, 8, 8])
    policy = rng.choice(["fcfs", "fcfs", "priority", "static"])
    if policy == "static":
        smallest_pool = -(-512 // block_size) * rng.randint(1, 2)
    engine = engine_of(model, draft, block_size)
    renew(
        engine,
        num_tokens=rng.choice([1, 2, 4, 5, 8]),
        adaptive=rng.random() < 0.3,
        num_blocks=min(smallest_pool + rng.choice([0, 0, 0, 1, smallest_pool // 2]), engine.runner.kv_cache.num_blocks),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + rng.choice([0, 1, 5, 15, 200]),
        enable_prefix_caching=rng.random() < 0.8,
        policy=policy,
    )
    waiting = list(range(len(chosen)))
    rng.shuffle(waiting)
    running: dict[str, int] = {}
    aborts = rng.random() < 0.4
    for _ in range(5000):
        while waiting and rng.random() < 0.5:
            index = waiting.pop()
            prompt, params, _ = chosen[index]
            options = {"priority": rng.randint(-2, 2), "cache_salt": rng.choice([None, None, "tenant"])}
            running[engine.add_request(prompt, params, stream=rng.random() < 0.3, **options)] = index
        aborted = [engine.abort(rng.choice(list(running)))] if aborts and running and rng.random() < 0.05 else []
        for output in aborted + engine.step():
            if output.finished:
                assert_equal(output, chosen[running.pop(output.request_id)][2], where)
        if not waiting and not running:
            break
    else:
        raise AssertionError(f"{where}: no end in sight")
    assert_all_blocks_back(engine)
    stats = engine.stats()
    engine.speculator.proposer.retain(())
    if draft != "ngram":
        pool = engine.speculator.proposer.pool
        assert pool.num_free == pool.num_blocks, where
    return Counter(
        preemptions=stats.num_preemptions,
        cached=stats.num_prompt_tokens_cached,
        accepted=stats.num_tokens_accepted,
        refused=stats.num_tokens_guessed - stats.num_tokens_accepted,
    )


@pytest.mark.parametrize(("model", "draft", "share"), PAIRS, ids=lambda value: str(value))
def test_speculation_changes_no_token(expectations, model, draft, share):
    num_traces, totals = max(1, round(share * NUM_TRACES)), Counter()
    for trace in range(num_traces):
        rng = random.Random(f"speculation {trace}")
        totals += run_trace(rng, model, draft, expectations[model], f"trace {trace}: {model} with {draft}")
    # The law is only tested if what it is about has happened.
    assert totals["preemptions"] > num_traces / 10, totals
    assert totals["cached"] > num_traces, totals
    assert totals["accepted"] > num_traces, totals
    assert totals["refused"] > num_traces or draft == model, totals
