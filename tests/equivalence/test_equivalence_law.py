"""A request's tokens do not depend on its company.

Random traces in tiny pools: requests of mixed lengths arrive while others run, share prefixes, are
preempted, aborted and prioritised, under random block sizes and chunk sizes. Each must give exactly
what it gives alone. After every step the laws of the block pool are checked, and after the last
request every block is back.
"""

import os
import random

import pytest

from minipaged.config import SamplingParams
from tests.support.engines import assert_all_blocks_back, make_engine
from tests.support.law import Comparison, run_alone
from tests.support.random_params import random_options

NUM_TRACES = int(os.environ.get("MINIPAGED_TEST_TRACES", "300"))
NUM_REQUESTS = 60
VOCAB = 1024
# Where logits are bit-identical whatever the company, no near-tie is excused.
BACKENDS = [
    {"device": "reference"},
    {"device": "cpu", "dtype": "float32"},
    {"device": "cpu", "quantization": "int8", "kv_cache_dtype": "int8"},
    {"device": "cpu", "quantization": "int4", "kv_cache_dtype": "bfloat16"},
]


def random_params(rng: random.Random) -> SamplingParams:
    """Greedy half of the time, else sampled with a seed and whatever else."""
    return SamplingParams(**random_options(rng, greedy=0.5))


def random_prompts(rng: random.Random) -> list[list[int]]:
    """Prompts of 1 to 90 tokens; most begin like another one, some are equal, some a prefix of it."""
    roots = [[rng.randrange(4, VOCAB) for _ in range(rng.choice([16, 32, 40, 64]))] for _ in range(4)]
    prompts = []
    for _ in range(NUM_REQUESTS):
        if rng.random() < 0.3:
            prompts.append([rng.randrange(4, VOCAB) for _ in range(rng.randint(1, 60))])
        else:
            root = rng.choice(roots)
            tail = [rng.randrange(4, VOCAB) for _ in range(rng.choice([0, 0, 1, 5, 26]))]
            prompts.append(root[: rng.randint(1, len(root))] + tail)
    return prompts


@pytest.fixture(scope="module", params=BACKENDS, ids=lambda options: "-".join(options.values()))
def options(request):
    """A backend, and the formats it keeps numbers in."""
    return request.param


@pytest.fixture(scope="module")
def expectations(options):
    """What each request gives alone, without prefix cache, its prompt whole; for both models."""
    from tests.support.law import record_margins

    cache = {}

    def of(model: str):
        if model not in cache:
            rng = random.Random(f"requests for {model}")
            engine = make_engine(model, enable_prefix_caching=False, block_size=16, **options)
            margins = record_margins(engine)
            cache[model] = [
                run_alone(engine, prompt, random_params(rng), margins) for prompt in random_prompts(rng)
            ]
        return cache[model]

    return of


def run_trace(
    rng: random.Random, model: str, options: dict, expectations: list, comparison: Comparison, where: str
) -> dict:
    """One random trace on a fresh engine; returns its counters."""
    block_size = rng.choice([1, 2, 4, 8, 16, 32])
    chosen = [rng.choice(expectations) for _ in range(rng.randint(2, 9))]
    largest = max(len(e.prompt) + e.params.max_tokens for e in chosen)
    smallest_pool = -(-largest // block_size)
    max_num_seqs = rng.choice([1, 2, 4, 8, 8])
    policy = rng.choice(["fcfs", "fcfs", "priority"])
    engine = make_engine(
        model,
        block_size=block_size,
        num_blocks=smallest_pool + rng.choice([0, 0, 0, 1, smallest_pool // 2]),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + rng.choice([0, 1, 5, 15, 200]),
        enable_prefix_caching=rng.random() < 0.8,
        policy=policy,
        **options,
    )
    waiting = list(enumerate(chosen))
    rng.shuffle(waiting)
    running: dict[str, int] = {}
    aborts = rng.random() < 0.4
    steps = 0
    while waiting or running:
        while waiting and rng.random() < 0.5:
            index, expected = waiting.pop()
            request_id = engine.add_request(
                expected.prompt,
                expected.params,
                priority=rng.randint(-2, 2) if policy == "priority" else 0,
                cache_salt=rng.choice([None, None, "tenant"]),
                stream=rng.random() < 0.3,
            )
            running[request_id] = index
        if aborts and running and rng.random() < 0.05:
            request_id = rng.choice(list(running))
            output = engine.abort(request_id)
            comparison.compare(chosen[running.pop(request_id)], output.outputs[0], where)
        for output in engine.step():
            if output.finished:
                comparison.compare(chosen[running.pop(output.request_id)], output.outputs[0], where)
        steps += 1
        assert steps < 5000, f"{where}: no end in sight"
    assert_all_blocks_back(engine)
    stats = engine.stats()
    return {"preemptions": stats.num_preemptions, "cached": stats.num_prompt_tokens_cached}


def test_tokens_do_not_depend_on_company(options, expectations):
    comparison = Comparison()
    totals = {"preemptions": 0, "cached": 0}
    num_traces = NUM_TRACES if options["device"] == "reference" else max(20, NUM_TRACES // 3)
    for trace in range(num_traces):
        rng = random.Random(trace)
        model = "tiny" if trace % 10 == 0 else "tiny-draft"
        counts = run_trace(rng, model, options, expectations(model), comparison, f"trace {trace} on {model}")
        totals = {name: totals[name] + counts[name] for name in totals}
    comparison.check_excuses(exact=options["device"] != "reference")
    # The law is only tested if what it is about has happened.
    assert totals["preemptions"] > num_traces / 10, totals
    assert totals["cached"] > num_traces, totals
