"""Everything at once: samples, beams, grammars, speculation, swapping, aborts, in pools that are too small.

Random traces mix requests of every kind; each must give exactly what it gives alone. The backend's logits are
bit-identical in any company, so no near-tie is excused. The laws of both block pools are checked after every
step and every abort, and nothing is left when the last request has ended.
"""

from __future__ import annotations

import dataclasses
import os
import random
from collections import Counter

import pytest

from minipaged.config import SamplingParams
from minipaged.core.swap import SwapSpace
from minipaged.sampling.speculative.draft_model import DraftModelProposer
from minipaged.sampling.speculative.ngram import NgramProposer
from minipaged.sampling.speculative.speculator import Speculator
from tests.support.engines import assert_all_blocks_back, generate, make_engine

NUM_TRACES = int(os.environ.get("MINIPAGED_TEST_TRACES", "100"))
NUM_HOST_BLOCKS = 200
VOCAB = 1024
BLOCK_SIZES = (1, 4, 16)
BACKENDS = [
    {"device": "cpu", "dtype": "float32"},
    {"device": "cpu", "quantization": "int8", "kv_cache_dtype": "int8"},
]
GRAMMARS = [
    {"choice": ["yes", "no", "yesterday"]},
    {"regex": "[a-z]{3,9}( [a-z]{3,9})?"},
    {"json": {"type": "array", "items": {"enum": [1, "a", None]}, "maxItems": 4}},
]
KINDS = ("greedy", "sampled", "parallel", "best_of", "beam", "grammar", "grammar_parallel", "grammar_beam")


def random_params(rng: random.Random, kind: str) -> SamplingParams:
    options: dict = {"max_tokens": rng.choice([1, 2, 5, 9, 14, 22])}
    if kind.startswith("grammar"):
        options["structured_outputs"] = rng.choice(GRAMMARS)
    else:
        options["ignore_eos"] = rng.random() < 0.6
    if kind.endswith("beam"):
        width = rng.choice([2, 3, 4])
        options |= {"use_beam_search": True, "beam_width": width, "n": rng.randint(1, width)}
        options |= {"length_penalty": rng.choice([0.5, 1.0, 2.0]), "early_stopping": rng.choice([True, False, "never"])}
    elif kind == "greedy":
        options["temperature"] = 0
    else:
        options |= {"temperature": rng.choice([0.5, 0.9, 1.3]), "seed": rng.randrange(2**32)}
        options |= {"top_p": rng.choice([1.0, 0.9]), "top_k": rng.choice([0, 20])}
        if kind.endswith("parallel"):
            options["n"] = rng.choice([2, 3, 4])
        elif kind == "best_of":
            options |= {"n": rng.choice([1, 2]), "best_of": 3}
    if rng.random() < 0.3:
        options |= {"repetition_penalty": 1.2, "frequency_penalty": 0.3}
    if rng.random() < 0.2 and not kind.endswith("beam"):
        options |= {"stop": ["th", "\n"]}
    if rng.random() < 0.2 and not kind.endswith("beam"):
        options |= {"logprobs": 2, "prompt_logprobs": rng.choice([None, 1])}
    return SamplingParams(**options)


def random_requests(rng: random.Random, count: int) -> list[tuple[list[int], SamplingParams]]:
    """Prompts of 1 to 50 tokens, most of which begin like others."""
    roots = [[rng.randrange(4, VOCAB) for _ in range(40)] for _ in range(3)]
    roots.append(roots[0][:5] * 8)  # something for prompt lookup
    found = []
    for number in range(count):
        prompt = rng.choice(roots)[: rng.randint(0, 40)] + [rng.randrange(4, VOCAB) for _ in range(rng.randint(1, 10))]
        found.append((prompt, random_params(rng, KINDS[number % len(KINDS)])))
    return found


def facts(completion) -> tuple:
    """What must not depend on company."""
    return (
        completion.token_ids,
        completion.text,
        completion.finish_reason,
        completion.logprobs,
        completion.cumulative_logprob,
        completion.beam_score,
    )


def blocks_needed(prompt: list[int], params: SamplingParams, block_size: int) -> int:
    """The smallest pool that admits the request."""
    each = -(-(len(prompt) + params.max_tokens - 1) // block_size)
    if not params.use_beam_search:
        return each
    shared = min(len(prompt) // block_size, each)
    return shared + params.num_sequences * (each - shared)


class Trace:
    """One random trace; the engine gets a fresh scheduler with limits that are barely enough."""

    def __init__(self, rng: random.Random, engine, draft_runner, expected: list, where: str):
        self.rng, self.engine, self.draft_runner, self.where = rng, engine, draft_runner, where
        chosen = rng.sample(expected, rng.randint(2, 8))
        size = engine.config.block_size
        smallest = max(blocks_needed(prompt, params, size) for prompt, params, _ in chosen)
        max_num_seqs = max(rng.choice([1, 2, 4, 8]), *(params.num_sequences for _, params, _ in chosen))
        policy = rng.choice(["fcfs", "fcfs", "priority"])
        limits = dataclasses.replace(
            engine.scheduler.config,
            num_blocks=smallest + rng.choice([0, 0, 1, 3, smallest // 2]),
            num_host_blocks=rng.choice([0, 5, 40, NUM_HOST_BLOCKS]),
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs + rng.choice([0, 1, 7, 200]),
            enable_prefix_caching=rng.random() < 0.7,
            policy=policy,
        )
        engine._use(limits)
        engine.speculator = self._speculator(limits)
        self.waiting = chosen
        self.running: dict[str, tuple] = {}
        self.aborts = rng.random() < 0.5
        self.seen = Counter()

    def _speculator(self, limits) -> Speculator | None:
        """None, or one that has learned nothing yet and always guesses as far ahead as it may."""
        rng = self.rng
        kind = rng.choice(["none", "ngram", "draft"])
        if kind == "none":
            return None
        proposer = NgramProposer()
        if kind == "draft":
            proposer = DraftModelProposer(
                self.draft_runner,
                num_blocks=limits.num_blocks,
                block_size=limits.block_size,
                max_model_len=limits.max_model_len,
                max_num_tokens=limits.max_num_batched_tokens,
            )
        return Speculator(proposer, rng.choice([1, 2, 4, 7]))

    def add(self) -> None:
        prompt, params, outputs = self.waiting.pop()
        rng, policy = self.rng, self.engine.scheduler.config.policy
        request_id = self.engine.add_request(
            prompt,
            params,
            priority=rng.randint(-1, 1) if policy == "priority" else 0,
            cache_salt=rng.choice([None, None, "tenant"]),
            stream=rng.random() < 0.3,
        )
        self.running[request_id] = params, outputs

    def abort(self) -> None:
        request_id = self.rng.choice(list(self.running))
        params, expected = self.running.pop(request_id)
        output = self.engine.abort(request_id)
        self.engine.scheduler.check()
        self.seen["aborts"] += 1
        if params.use_beam_search or params.num_sequences > params.n:
            return  # the best so far, and the best of all, are different ones
        for got in output.outputs:
            prefixes = [completion.token_ids[: len(got.token_ids)] for completion in expected]
            assert got.token_ids in prefixes, f"{self.where}: aborted {got.token_ids} begins none of {prefixes}"

    def compare(self, output) -> None:
        params, expected = self.running.pop(output.request_id)
        assert output.error is None, f"{self.where}: {output.error}"
        got = sorted(map(facts, output.outputs), key=repr)
        wanted = sorted(map(facts, expected), key=repr)
        assert got == wanted, f"{self.where}: {params}\n  in company: {got}\n  alone:      {wanted}"

    def run(self) -> Counter:
        engine, rng = self.engine, self.rng
        steps = 0
        while self.waiting or self.running:
            while self.waiting and rng.random() < 0.4:
                self.add()
            if self.aborts and self.running and rng.random() < 0.05:
                self.abort()
            for output in engine.step():
                if output.finished:
                    self.compare(output)
            steps += 1
            assert steps < 5000, f"{self.where}: no end in sight"
        assert_all_blocks_back(engine)
        stats = engine.stats()
        assert stats.num_host_blocks_used == 0
        if engine.speculator:
            engine.speculator.proposer.retain(())
            self.seen["guessed right"] += stats.num_tokens_accepted
            self.seen["guessed wrong"] += stats.num_tokens_guessed - stats.num_tokens_accepted
            if isinstance(engine.speculator.proposer, DraftModelProposer):
                engine.speculator.proposer.check()
                assert engine.speculator.proposer.pool.num_free == engine.scheduler.config.num_blocks
        self.seen["preemptions"] += stats.num_preemptions
        self.seen["swapped in"] += stats.num_blocks_swapped_in
        self.seen["copied"] += stats.num_blocks_copied
        self.seen["cached"] += stats.num_prompt_tokens_cached
        return self.seen


@pytest.fixture(scope="module", params=BACKENDS, ids=lambda options: "-".join(options.values()))
def engines(request):
    """One engine a block size, and what each request gives alone on it."""
    made = {}
    for block_size in BLOCK_SIZES:
        engine = make_engine(
            "tiny-draft",
            block_size=block_size,
            num_blocks=1024 // block_size,
            max_model_len=128,
            swap_space=1 << 23,
            speculative_model="tiny",
            adaptive_speculation=False,
            max_num_batched_tokens=300,
            **request.param,
        )
        assert engine.scheduler.config.num_host_blocks >= NUM_HOST_BLOCKS
        made[block_size] = engine, engine.speculator.proposer.runner
    alone, _ = made[16]
    alone.speculator = None
    alone._use(dataclasses.replace(alone.scheduler.config, enable_prefix_caching=False))
    expected = [
        (prompt, params, generate(alone, prompt, params).outputs)
        for prompt, params in random_requests(random.Random("everything"), 96)
    ]
    yield made, expected
    for engine, draft_runner in made.values():
        engine.close()
        draft_runner.close()


def run_traces(engines, monkeypatch, numbers: range) -> None:
    engines, expected = engines
    seen = Counter()
    for number in numbers:
        rng = random.Random(number)
        monkeypatch.setattr(SwapSpace, "_is_cheaper", lambda *_, rng=rng: rng.random() < 0.7)
        seen += Trace(rng, *engines[rng.choice(BLOCK_SIZES)], expected, f"trace {number}").run()
    print(len(numbers), "traces:", dict(seen))
    for event in ("preemptions", "swapped in", "copied", "cached", "aborts", "guessed right", "guessed wrong"):
        assert seen[event] > len(numbers) / 10, f"{event} hardly happened: {seen}"


def test_everything_together(engines, monkeypatch):
    engine, _ = engines[0][16]
    run_traces(engines, monkeypatch, range(NUM_TRACES if engine.formats.weights == "float32" else NUM_TRACES // 5))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_everything_together_for_long(engines, monkeypatch):
    run_traces(engines, monkeypatch, range(1000, 1500))
