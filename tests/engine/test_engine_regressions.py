"""Bugs that other engines had (or have) outside the scheduler, each a test named for what went wrong there."""

import pytest

from minipaged import LLM, SamplingParams
from minipaged.errors import ConfigError, InvalidParameterError, PromptTooLongError
from tests.support.engines import assert_all_blocks_back, generate, make_engine, run_to_end

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def test_nano_vllm_unknown_keyword_arguments_vanish():
    """There, a typo in an option is ignored. Here it raises, and names what may have been meant."""
    with pytest.raises(ConfigError, match="max_num_seqs"):
        LLM("tiny-draft", max_num_seq=4)
    with pytest.raises(InvalidParameterError, match="temperature"):
        SamplingParams(temprature=0.5)
    with LLM("tiny-draft", device="reference", num_blocks=8) as llm:
        for call in (llm.generate, llm.stream):
            with pytest.raises(TypeError, match="sampling"):
                call("x", sampling=GREEDY)


def test_nano_vllm_and_mini_sglang_allow_one_engine_a_process():
    """There, the context, the block size or a port is global. Here two engines take turns, step by step."""
    engines = [make_engine("tiny-draft", block_size=4), make_engine("tiny", block_size=32)]
    alone = [generate(engine, [5, 6, 7], GREEDY).outputs[0].token_ids for engine in engines]
    finished = [[], []]
    for engine in engines:
        engine.add_request([5, 6, 7], GREEDY)
    while any(engine.has_unfinished() for engine in engines):
        for engine, outputs in zip(engines, finished, strict=True):
            outputs += engine.step()
    assert [output.outputs[0].token_ids for (output,) in finished] == alone
    assert alone[0] != alone[1]
    for engine in engines:
        assert_all_blocks_back(engine)


def test_tiny_llm_one_overlong_prompt_aborts_the_whole_batch():
    """There, a prompt that is too long ends the batch it came with. Here it alone is refused."""
    engine = make_engine(max_model_len=64)
    alone = [generate(engine, [token], GREEDY).outputs[0].token_ids for token in (5, 6)]
    ids = [engine.add_request([5], GREEDY)]
    with pytest.raises(PromptTooLongError, match="64"):
        engine.add_request([7] * 64, GREEDY)
    ids.append(engine.add_request([6], GREEDY))
    finished = run_to_end(engine)
    assert [finished[request_id].outputs[0].token_ids for request_id in ids] == alone
    assert_all_blocks_back(engine)


def test_nano_vllm_greedy_is_forbidden():
    """There, temperature 0 is an error. Here it is greedy, whatever the seed."""
    engine = make_engine()
    tokens = {tuple(generate(engine, [5], GREEDY.clone(seed=seed)).outputs[0].token_ids) for seed in (None, 1, 2)}
    assert len(tokens) == 1


def test_an_aborted_request_reports_its_preemptions():
    engine = make_engine(num_blocks=4, block_size=4, max_num_batched_tokens=64)
    params = GREEDY.clone(max_tokens=9)
    ids = [engine.add_request([token] * 4, params) for token in (5, 6)]
    while engine.stats().num_preemptions == 0:
        engine.step()
    outputs = [engine.abort(request_id) for request_id in ids]
    assert sorted(output.metrics.num_preemptions for output in outputs) == [0, 1]
    assert_all_blocks_back(engine)
