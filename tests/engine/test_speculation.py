"""Speculation through the engine: options, refusals, statistics, and its part in all that an engine does."""

import json
import shutil
from pathlib import Path

import pytest

from minipaged import LLM, SamplingParams
from minipaged.config import EngineConfig
from minipaged.errors import ConfigError
from minipaged.model import catalog
from tests.support.engines import assert_all_blocks_back, generate, make_engine, run_to_end

TEXT = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\n"
GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)


def make(draft, **options):
    return make_engine("tiny", speculative_model=draft, adaptive_speculation=False, **options)


@pytest.fixture(scope="module")
def plain():
    return make_engine("tiny")


@pytest.fixture(scope="module", params=["ngram", "tiny-draft"])
def speculating(request):
    return make(request.param)


def both(plain, speculating, params, prompt=TEXT):
    """The outputs of a request without and with speculation, which must be equal."""
    wanted, got = generate(plain, prompt, params), generate(speculating, prompt, params)
    assert [(o.token_ids, o.text, o.finish_reason, o.stop_reason) for o in got.outputs] == [
        (o.token_ids, o.text, o.finish_reason, o.stop_reason) for o in wanted.outputs
    ]
    assert_all_blocks_back(speculating)
    return got


def test_several_tokens_come_from_one_step(plain, speculating):
    before = speculating.stats()
    both(plain, speculating, GREEDY)
    after = speculating.stats()
    accepted = after.num_tokens_accepted - before.num_tokens_accepted
    assert accepted > 3
    assert after.num_steps - before.num_steps <= 40 - accepted + 1
    assert after.num_generated_tokens - before.num_generated_tokens == 40
    assert 0 < after.acceptance_rate < 1
    assert after.tokens_per_step > 1
    assert after.num_verifications < after.num_steps


def test_a_stop_string_inside_a_draft_ends_the_text_there(plain, speculating):
    text = generate(plain, TEXT, GREEDY).outputs[0].text
    for start in range(0, len(text) - 4, 7):
        both(plain, speculating, GREEDY.clone(stop=text[start : start + 3]))
    assert speculating.scheduler.num_generated_tokens  # and what was verified beyond it is not counted:
    fresh = make(speculating.config.speculative_model)
    output = generate(fresh, TEXT, GREEDY.clone(stop=text[20:23]))
    assert fresh.stats().num_generated_tokens == len(output.outputs[0].token_ids)


@pytest.mark.parametrize("n", [2, 5])
def test_parallel_samples_are_speculated_on_one_by_one(plain, speculating, n):
    both(plain, speculating, SamplingParams(n=n, temperature=0.8, seed=4, max_tokens=24, ignore_eos=True))


def test_beams_are_left_alone(plain, speculating):
    before = speculating.stats().num_tokens_guessed
    both(plain, speculating, SamplingParams(n=3, use_beam_search=True, max_tokens=12))
    assert speculating.stats().num_tokens_guessed == before


def test_with_a_grammar(plain, speculating):
    pytest.importorskip("llguidance")
    for temperature in (0, 0.9):
        grammar = {"regex": "([a-z]{2,6}, ){3}king of (France|England)\\."}
        params = SamplingParams(temperature=temperature, seed=1, max_tokens=60, structured_outputs=grammar)
        both(plain, speculating, params)


def test_streams_grow_by_whole_steps_and_never_shrink(speculating):
    request_id = speculating.add_request(TEXT, GREEDY, stream=True)
    text = ""
    while speculating.has_unfinished():
        for output in speculating.step():
            assert output.request_id == request_id
            text += output.outputs[0].delta
            assert output.outputs[0].text == text
    assert text == generate(speculating, TEXT, GREEDY).outputs[0].text


def test_what_was_accepted_is_found_by_the_prefix_cache(speculating):
    output = generate(speculating, TEXT, GREEDY)
    both_ids = output.prompt_token_ids + output.outputs[0].token_ids
    again = generate(speculating, both_ids, GREEDY.clone(max_tokens=1))
    assert again.num_cached_tokens == (len(both_ids) - 1) // 16 * 16


def test_a_pool_without_room_for_guesses_serves_plainly(plain):
    """Guesses take free blocks only; here each sequence barely finds its own."""
    speculating = make("tiny-draft", num_blocks=13, block_size=4, max_num_seqs=4, max_num_batched_tokens=16)
    ids = [speculating.add_request([5, 6, 7 + i], GREEDY) for i in range(4)]
    outputs = run_to_end(speculating)
    assert speculating.stats().num_preemptions
    for i, request_id in enumerate(ids):
        wanted = generate(plain, [5, 6, 7 + i], GREEDY)
        assert outputs[request_id].outputs[0].token_ids == wanted.outputs[0].token_ids
    assert_all_blocks_back(speculating)


def test_aborts_give_the_drafts_blocks_back_too():
    speculating = make("tiny-draft")
    request_id = speculating.add_request(TEXT, GREEDY)
    for _ in range(4):
        speculating.step()
    speculating.abort(request_id)
    assert_all_blocks_back(speculating)
    generate(speculating, [5, 6], GREEDY.clone(max_tokens=4))
    speculating.close()
    pool = speculating.speculator.proposer.pool
    assert pool.num_free == pool.num_blocks


def test_draft_and_target_share_the_memory_given():
    """A pool sized by memory counts a block of both models as one."""
    plain = make_engine("tiny", num_blocks=None, kv_cache_memory=2_000_000)
    speculating = make_engine("tiny", num_blocks=None, kv_cache_memory=2_000_000, speculative_model="tiny-draft")
    draft = speculating.speculator.proposer.runner.kv_cache
    assert speculating.runner.kv_cache.nbytes + draft.nbytes <= 2_000_000
    assert draft.num_blocks == speculating.scheduler.pool.num_blocks < plain.scheduler.pool.num_blocks


# -- refusals ---------------------------------------------------------------------------------------


def copy_of_draft(folder: Path) -> Path:
    source = Path(catalog.resolve("tiny-draft", pull=False))
    return Path(shutil.copytree(source, folder / "draft"))


def test_a_draft_with_other_tokens_is_refused(tmp_path):
    path = copy_of_draft(tmp_path)
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    first, second = list(vocab)[700:702]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match="1024 tokens each, but 2 of them differ, the first is 7"):
        make(str(path))


def test_a_draft_with_another_vocabulary_is_refused(tmp_path):
    path = copy_of_draft(tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"vocab_size": 1100}))
    with pytest.raises(ConfigError, match="vocabularies of 1100 and 1024 tokens"):
        make(str(path))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"speculative_model": ""}, "speculative_model is ''"),
        ({"speculative_model": 3}, "speculative_model is 3"),
        ({"speculative_model": "ngram", "num_speculative_tokens": 0}, "is 0; it must be at least 1"),
        ({"speculative_model": "ngram", "num_speculative_tokens": 65}, "is 65; it must be at most 64"),
        ({"speculative_model": "ngram", "adaptive_speculation": 1}, "adaptive_speculation is 1"),
        ({"num_speculative_tokens": 3}, "num_speculative_tokens is 3, but speculative_model is None"),
        ({"adaptive_speculation": False}, "adaptive_speculation is False, but speculative_model is None"),
    ],
)
def test_options_are_checked(options, words):
    with pytest.raises(ConfigError, match=words):
        EngineConfig(**options)


def test_from_llm():
    with LLM("tiny", device="reference", speculative_model="ngram", num_blocks=64) as llm:
        llm.generate([5, 6, 7, 8] * 8, GREEDY)
        assert llm.stats().num_generated_tokens == 40
        assert llm.stats().tokens_per_step >= 1
