"""Everything that continues a prompt, on the device: equal to the reference backend's, token for token.

Logits are float32 there and here, and differ in their last bits, so the tokens can only differ where a choice hangs on
those; log-probabilities are compared to 1e-4.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from tests.support.cuda_devices import DEVICES, make_device

# isort: split

from minipaged import LLM, SamplingParams
from minipaged.core.swap import SwapSpace
from minipaged.errors import SavedPrefixError
from minipaged.ops.cuda import available
from tests.support.engines import assert_all_blocks_back, generate, make_engine, run_to_end

GOLDEN = json.loads((Path(__file__).parents[1] / "fixtures" / "tiny_golden.json").read_text())
PROMPTS = [case["prompt_ids"] for case in GOLDEN["prompts"]]
OPTIONS = {"dtype": "float32", "max_num_batched_tokens": 64, "max_num_seqs": 8, "block_size": 4}


@pytest.fixture(autouse=True, params=DEVICES)
def device(request, monkeypatch):
    """``device="cuda"`` is the emulated device, or the card."""
    make_device(request.param).close()
    if request.param == "emulated":
        monkeypatch.setenv(available.VARIABLE, "emulate")
    else:
        monkeypatch.delenv(available.VARIABLE, raising=False)


def both(requests, **options):
    """The outputs of ``requests`` from the reference backend, one by one; and from cuda, together, with its engine."""
    reference = make_engine("tiny-draft", **OPTIONS | options | {"num_blocks": 256, "swap_space": 0})
    alone = [generate(reference, prompt, params) for prompt, params in requests]
    engine = make_engine("tiny-draft", device="cuda", **OPTIONS | options)
    ids = [engine.add_request(prompt, params) for prompt, params in requests]
    finished = run_to_end(engine)
    assert_all_blocks_back(engine)
    engine.close()
    return alone, [finished[request_id] for request_id in ids], engine


def assert_equal(expected, found):
    """Two outputs: the same tokens, and log-probabilities that differ by no more than the backends do."""
    for a, b in zip(expected.outputs, found.outputs, strict=True):
        assert (a.token_ids, a.text, a.finish_reason) == (b.token_ids, b.text, b.finish_reason)
        assert b.cumulative_logprob == pytest.approx(a.cumulative_logprob, abs=1e-4)
        assert b.beam_score == pytest.approx(a.beam_score, abs=1e-4)
        for mine, theirs in zip(a.logprobs or [], b.logprobs or [], strict=True):
            assert_same_entry(mine, theirs)
    for mine, theirs in zip(expected.prompt_logprobs or [], found.prompt_logprobs or [], strict=True):
        if mine is not None:
            assert_same_entry(mine, theirs)


def assert_same_entry(expected, found):
    assert list(expected) == list(found)
    for token_id, logprob in expected.items():
        assert found[token_id].rank == logprob.rank
        assert found[token_id].logprob == pytest.approx(logprob.logprob, abs=1e-4)


def sampled(max_tokens=3, **options) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.9, "seed": 5, "max_tokens": max_tokens, "ignore_eos": True} | options)


def test_every_parameter_in_one_batch():
    """Filters, penalties, masks, bias, log-probabilities: nothing comes to the host but tokens."""
    requests = [
        (PROMPTS[0][:9], sampled(2, logprobs=3, top_p=0.8)),
        (PROMPTS[1][:9], sampled(temperature=0, repetition_penalty=1.3, frequency_penalty=0.5, logprobs=0)),
        (PROMPTS[1][:5], sampled(2, top_k=5, min_p=0.01, presence_penalty=1.0, prompt_logprobs=2)),
        (PROMPTS[0][:5], sampled(temperature=0, logit_bias={17: 100}, min_tokens=2, ignore_eos=False)),
        (PROMPTS[0][:7], sampled(allowed_token_ids=[7, 99, 300, 512], seed=None, bad_words=["the"])),
    ]
    alone, together, engine = both(requests)
    for a, b in zip(alone, together, strict=True):
        assert_equal(a, b)
    assert engine.stats().num_logits_rows_on_host == 0


def test_several_samples_of_a_prompt():
    """``n`` and ``best_of``: drawn from one row, then forked; the block they share is copied when it is written."""
    requests = [(PROMPTS[1][:6], sampled(n=3)), (PROMPTS[0][:5], sampled(n=1, best_of=3, temperature=1.3))]
    alone, together, engine = both(requests)
    for a, b in zip(alone, together, strict=True):
        assert_equal(a, b)
    assert engine.stats().num_blocks_copied > 0 == engine.stats().num_logits_rows_on_host


def test_beam_search(caplog):
    beams = {"use_beam_search": True, "max_tokens": 4, "ignore_eos": False}
    requests = [
        (PROMPTS[1][:6], SamplingParams(beam_width=3, n=2, logprobs=2, **beams)),
        (PROMPTS[0][:5], SamplingParams(beam_width=2, repetition_penalty=1.5, **beams)),
    ]
    with caplog.at_level(logging.INFO, "minipaged"):
        alone, together, engine = both(requests)
    for a, b in zip(alone, together, strict=True):
        assert_equal(a, b)
    assert engine.stats().num_blocks_copied > 0
    assert 4 <= engine.stats().num_logits_rows_on_host <= 7, "those of the beams with a penalty"
    told = [record.message for record in caplog.records if "come to the host" in record.message]
    assert told == ["logits come to the host and are sampled there for beam search with penalties, masks or a grammar"]


def test_a_grammar_sends_its_mask():
    pytest.importorskip("llguidance")
    greedy = {"temperature": 0, "ignore_eos": False}
    requests = [
        (PROMPTS[0][:5], sampled(6, structured_outputs={"regex": "[a-z]{3,5}"}, ignore_eos=False, logprobs=1)),
        (PROMPTS[1][:5], sampled(6, structured_outputs={"choice": ["yes", "no"]}, **greedy)),
        (PROMPTS[1][:5], sampled(4, structured_outputs={"regex": "[^a]+"}, logprobs=0, **greedy)),
    ]
    alone, together, engine = both(requests)
    for a, b in zip(alone, together, strict=True):
        assert_equal(a, b)
    assert alone[1].outputs[0].text in ("yes", "no")
    assert engine.stats().num_logits_rows_on_host == 0


@pytest.mark.parametrize("model", ["ngram", "tiny-draft"])
def test_speculation(model):
    repeated = PROMPTS[1][:4] * 3
    requests = [(repeated, sampled(6, temperature=0)), (repeated[:9], sampled(6, repetition_penalty=1.1, logprobs=1))]
    options = {"speculative_model": model, "num_speculative_tokens": 2, "adaptive_speculation": False}
    alone, together, engine = both(requests, **options)
    for a, b in zip(alone, together, strict=True):
        assert_equal(a, b)
    stats = engine.stats()
    assert stats.num_tokens_guessed > 0 == stats.num_logits_rows_on_host
    if model == "tiny-draft":  # its own draft: what it guesses greedily is right
        assert stats.num_tokens_accepted > 0


@pytest.mark.parametrize("kv_cache_dtype", ["int8", pytest.param("float32", marks=pytest.mark.slow)])
def test_swapping(kv_cache_dtype, monkeypatch):
    """What was preempted comes back from the host's memory, bit for bit."""
    monkeypatch.setattr(SwapSpace, "_is_cheaper", lambda *_: True)
    requests = [(PROMPTS[i][:3], sampled(7, seed=i, logprobs=0)) for i in range(2)]
    small = {"num_blocks": 4, "swap_space": 1 << 20, "enable_prefix_caching": False}
    options = OPTIONS | {"device": "cuda", "kv_cache_dtype": kv_cache_dtype}
    large = make_engine("tiny-draft", **options)
    alone = [generate(large, *request) for request in requests]
    engine = make_engine("tiny-draft", **options | small)
    ids = [engine.add_request(*request) for request in requests]
    finished = run_to_end(engine)
    for request_id, expected in zip(ids, alone, strict=True):
        (a,), (b,) = expected.outputs, finished[request_id].outputs
        assert a.token_ids == b.token_ids and a.logprobs == b.logprobs
    stats = engine.stats()
    assert stats.num_preemptions > 0 and stats.num_blocks_swapped_out >= stats.num_blocks_swapped_in > 0
    assert stats.num_host_blocks_used == 0
    assert_all_blocks_back(engine)


def test_saved_prefixes(tmp_path):
    """Another engine finds the prefix, and goes on as if it had computed it; another kind of device refuses it."""
    prompt, params = PROMPTS[1][:11], sampled(3, logprobs=0)
    options = OPTIONS | {"device": "cuda", "num_blocks": 64}
    with LLM("tiny-draft", **options) as llm:
        assert llm.save_prefix(prompt, tmp_path / "prefix.kv") == 8
        (expected,) = llm.generate([prompt], params)
    with LLM("tiny-draft", **options) as llm:
        assert llm.load_prefix(tmp_path / "prefix.kv") == 8
        (found,) = llm.generate([prompt], params)
        assert found.num_cached_tokens == 8
        assert found.outputs[0].token_ids == expected.outputs[0].token_ids
        assert found.outputs[0].logprobs == expected.outputs[0].logprobs, "bit for bit"
    with LLM("tiny-draft", **options | {"device": "reference"}) as llm:
        with pytest.raises(SavedPrefixError, match="device 'cuda' .here 'reference'"):
            llm.load_prefix(tmp_path / "prefix.kv")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_everything_together(monkeypatch):
    """All kinds at once, guessed ahead, in a pool that is too small: bit for bit what each gives alone."""
    monkeypatch.setattr(SwapSpace, "_is_cheaper", lambda *_: True)
    beams = {"use_beam_search": True, "max_tokens": 4}
    requests = [
        (PROMPTS[1][:4] * 2, sampled(9, temperature=0, logprobs=1, allowed_token_ids=[7, 99])),  # repeats itself
        (PROMPTS[1][:4] * 3, sampled(9, repetition_penalty=1.2, prompt_logprobs=1)),
        (PROMPTS[0][:7], sampled(8, n=2, top_p=0.9, top_k=20)),
        (PROMPTS[0][:6], SamplingParams(beam_width=2, logprobs=1, **beams)),
        (PROMPTS[0][:9], SamplingParams(beam_width=2, frequency_penalty=0.5, **beams)),
        (PROMPTS[1][:5], sampled(8, min_p=0.02, logit_bias={40: 3}, min_tokens=4, ignore_eos=False)),
    ]
    options = OPTIONS | {"device": "cuda", "block_size": 4}
    large = make_engine("tiny-draft", **options, enable_prefix_caching=False)
    alone = [generate(large, *request) for request in requests]
    ahead = {"speculative_model": "ngram", "num_speculative_tokens": 2, "adaptive_speculation": False}
    engine = make_engine("tiny-draft", **options, **ahead, num_blocks=13, swap_space=1 << 20)
    for _ in range(2):
        ids = [engine.add_request(*request) for request in requests]
        finished = run_to_end(engine)
        for request_id, expected in zip(ids, alone, strict=True):
            found = finished[request_id]
            assert found.prompt_logprobs == expected.prompt_logprobs
            for a, b in zip(expected.outputs, found.outputs, strict=True):
                assert (a.token_ids, a.text, a.logprobs) == (b.token_ids, b.text, b.logprobs)
                assert (a.cumulative_logprob, a.beam_score) == (b.cumulative_logprob, b.beam_score)
    stats = engine.stats()
    assert min(stats.num_blocks_swapped_in, stats.num_blocks_copied, stats.num_tokens_accepted) > 0
    assert min(stats.num_prompt_tokens_cached, stats.num_logits_rows_on_host) > 0
    assert_all_blocks_back(engine)
