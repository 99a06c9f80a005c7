"""Swapping in the engine: the same tokens as alone, counters that show it, and options refused with numbers."""

from __future__ import annotations

import random

import pytest

from minipaged.config import EngineConfig, SamplingParams
from minipaged.core.swap import SwapSpace
from minipaged.engine import Engine
from minipaged.errors import ConfigError
from tests.support.engines import assert_all_blocks_back, generate, make_engine, run_to_end

BACKENDS = [
    {"device": "reference"},
    {"device": "cpu", "dtype": "float32"},
    {"device": "cpu", "quantization": "int8", "kv_cache_dtype": "int8"},
    {"device": "cpu", "quantization": "int4", "kv_cache_dtype": "bfloat16"},
]


def requests():
    rng = random.Random(3)
    for seed in range(12):
        greedy = {"temperature": 0} if seed % 2 else {"temperature": 0.9, "seed": seed}
        yield (
            [rng.randrange(4, 1024) for _ in range(rng.randint(1, 40))],
            SamplingParams(max_tokens=rng.randint(5, 50), ignore_eos=True, logprobs=1, **greedy),
        )


@pytest.mark.parametrize("caching", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("options", BACKENDS, ids=lambda options: "-".join(options.values()))
def test_swapped_requests_give_the_same_tokens(options, caching, monkeypatch):
    monkeypatch.setattr(SwapSpace, "_is_cheaper", lambda *_: True)
    engine = make_engine(**options)
    alone = [generate(engine, *request).outputs[0] for request in requests()]
    engine = make_engine(
        **options, num_blocks=24, block_size=4, swap_space=1 << 20, enable_prefix_caching=caching, max_num_seqs=8
    )
    ids = [engine.add_request(*request) for request in requests()]
    together = run_to_end(engine)
    for request_id, expected in zip(ids, alone, strict=True):
        got = together[request_id].outputs[0]
        assert got.token_ids == expected.token_ids
        if options["device"] == "cpu":
            assert got.logprobs == expected.logprobs, "bit for bit"
    stats = engine.stats()
    assert stats.num_preemptions > 0 and stats.num_blocks_swapped_out >= stats.num_blocks_swapped_in > 0
    assert stats.num_host_blocks_used == 0 < stats.num_host_blocks_total
    assert_all_blocks_back(engine)
    if not caching:
        prompts = sum(len(prompt) for prompt, _ in requests())
        assert stats.num_prompt_tokens_computed == prompts, "what is swapped is not computed again"


def test_without_swap_space_nothing_is_swapped():
    engine = make_engine(num_blocks=24, block_size=4)
    for request in requests():
        engine.add_request(*request)
    run_to_end(engine)
    stats = engine.stats()
    assert stats.num_preemptions > 0 == stats.num_blocks_swapped_out == stats.num_host_blocks_total


def test_an_aborted_request_gives_its_host_blocks_back(monkeypatch):
    monkeypatch.setattr(SwapSpace, "_is_cheaper", lambda *_: True)
    engine = make_engine(num_blocks=24, block_size=4, swap_space=1 << 20)
    for request in requests():
        engine.add_request(*request)
    while not engine.stats().num_host_blocks_used:
        engine.step()
    (swapped, *_) = [r.request_id for r in engine.scheduler.waiting if r.host_block_ids]
    engine.abort(swapped)
    engine.scheduler.check()
    run_to_end(engine)
    assert engine.stats().num_host_blocks_used == 0
    assert_all_blocks_back(engine)


def test_options_that_make_no_sense_are_refused_with_numbers():
    with pytest.raises(ConfigError, match="swap_space is 100 bytes, but one block of 16 tokens takes"):
        make_engine(swap_space=100)
    with pytest.raises(ConfigError, match="are free; lower it"):
        make_engine(swap_space=1 << 60)
    with pytest.raises(ConfigError, match="'static' never preempts"):
        Engine(EngineConfig(model="tiny-draft", swap_space=1 << 20, policy="static"))
