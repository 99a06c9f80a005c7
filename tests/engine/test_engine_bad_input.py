"""Bad input is refused with numbers, harms no other request, and loses no block."""

import subprocess
import sys

import numpy as np
import pytest

from minipaged import LLM, SamplingParams
from minipaged.config import EngineConfig
from minipaged.errors import (
    BackendUnavailableError,
    ConfigError,
    EngineClosedError,
    InvalidParameterError,
    MinipagedError,
    ModelNotFoundError,
    PoolTooSmallError,
    PromptTooLongError,
    RequestError,
    TokenRangeError,
    UnknownRequestError,
)
from tests.support.engines import assert_all_blocks_back, generate, make_engine, nan_logits, run_to_end

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def engine():
    return make_engine(num_blocks=20, block_size=16, max_model_len=400, max_num_batched_tokens=64)


@pytest.mark.parametrize(
    "prompt, params, error, words",
    [
        ("", GREEDY, RequestError, ["empty"]),
        ([], GREEDY, RequestError, ["empty"]),
        ([1024], GREEDY, TokenRangeError, ["1024", "1023"]),
        ([5, -1], GREEDY, TokenRangeError, ["-1", "token 1"]),
        ([5, 2.5], GREEDY, TokenRangeError, ["2.5"]),
        ([5, True], GREEDY, TokenRangeError, ["True"]),
        (["a", "b"], GREEDY, TokenRangeError, ["'a'"]),
        (None, GREEDY, RequestError, ["NoneType"]),
        (3.5, GREEDY, RequestError, ["float"]),
        ({}, GREEDY, RequestError, ["prompt_token_ids"]),
        ({"text": "hello"}, GREEDY, RequestError, ["text"]),
        ({"prompt": None}, GREEDY, RequestError, ["NoneType"]),
        ({"prompt_token_ids": None}, GREEDY, RequestError, ["NoneType"]),
        ({"prompt_token_ids": "hello"}, GREEDY, RequestError, ["str"]),
        ({"prompt_token_ids": {"prompt": "hello"}}, GREEDY, RequestError, ["dict"]),
        ({"prompt": 5, "prompt_token_ids": [1]}, GREEDY, RequestError, ["int"]),
        (b"hello", GREEDY, RequestError, ["bytes"]),
        (np.array(3), GREEDY, RequestError, ["ndarray"]),
        ([5] * 395, GREEDY, PromptTooLongError, ["395", "8", "400"]),
        ([5] * 380, GREEDY, PoolTooSmallError, ["20"]),
        ([5], {"temperature": 0}, InvalidParameterError, ["SamplingParams"]),
        ([5], SamplingParams(stop_token_ids=[5000]), InvalidParameterError, ["5000", "1023"]),
        ([5], SamplingParams(logit_bias={4096: 1.0}), InvalidParameterError, ["4096"]),
        ([5], SamplingParams(allowed_token_ids=[99999]), InvalidParameterError, ["99999"]),
    ],
)
def test_impossible_requests_are_refused_with_the_numbers(engine, prompt, params, error, words):
    before = engine.stats()
    with pytest.raises(error) as caught:
        engine.add_request(prompt, params)
    for word in words:
        assert word in str(caught.value)
    assert not engine.has_unfinished()
    assert engine.stats() == before
    assert_all_blocks_back(engine)


@pytest.mark.parametrize(
    "options",
    [{"priority": "high"}, {"priority": True}, {"cache_salt": 7}],
)
def test_other_arguments_are_checked(engine, options):
    with pytest.raises(InvalidParameterError):
        engine.add_request([5], GREEDY, **options)


def test_request_ids_in_use_are_refused(engine):
    engine.add_request([5, 6], GREEDY, request_id="twice")
    with pytest.raises(RequestError, match="twice"):
        engine.add_request([5, 6], GREEDY, request_id="twice")
    assert set(run_to_end(engine)) == {"twice"}
    generate(engine, [5, 6], GREEDY, request_id="twice")  # free again
    with pytest.raises(UnknownRequestError, match="never-was"):
        engine.abort("never-was")


def test_a_refused_request_does_not_disturb_those_that_run(engine):
    alone = generate(engine, [7, 8, 9], GREEDY).outputs[0].token_ids
    running = engine.add_request([7, 8, 9], GREEDY)
    for bad in ([], [5] * 395, [-3]):
        engine.step()
        with pytest.raises(MinipagedError):
            engine.add_request(bad, GREEDY)
    assert run_to_end(engine)[running].outputs[0].token_ids == alone
    assert_all_blocks_back(engine)


def test_nan_logits_end_their_own_request_only(engine):
    """The row of one request turns NaN in mid-flight; its neighbour goes on."""
    alone = generate(engine, [7, 8, 9], GREEDY).outputs[0].token_ids
    good = engine.add_request([7, 8, 9], GREEDY)
    bad = engine.add_request([10, 11, 12], GREEDY)
    with nan_logits(engine, row=-1, call=3):
        outputs = run_to_end(engine)
    assert outputs[bad].outputs[0].finish_reason == "error"
    assert outputs[bad].error and "NaN" in outputs[bad].error
    assert outputs[good].outputs[0].token_ids == alone
    assert_all_blocks_back(engine)


def test_generate_checks_all_prompts_before_any_runs():
    with LLM("tiny-draft", device="reference", num_blocks=8) as llm:
        with pytest.raises(TokenRangeError):
            llm.generate([[5, 6], [5000]], GREEDY)
        assert llm.stats().num_steps == 0
        assert llm.generate([[5, 6]], GREEDY)[0].finished


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"blok_size": 16}, ConfigError, ["block_size"]),
        ({"block_size": 12}, ConfigError, ["12", "power of two"]),
        ({"block_size": 512}, ConfigError, ["512", "256"]),
        ({"max_num_seqs": 0}, ConfigError, ["0"]),
        ({"max_num_batched_tokens": 2, "max_num_seqs": 4}, ConfigError, ["2", "4"]),
        ({"max_model_len": 513}, ConfigError, ["513", "512"]),
        ({"num_blocks": 2**31 - 1}, ConfigError, ["free"]),
        ({"kv_cache_memory": 10}, ConfigError, ["10"]),
        ({"device": "tpu"}, ConfigError, ["tpu"]),
        ({"dtype": "bfloat16", "device": "reference"}, ConfigError, ["bfloat16", "float32"]),
        ({"quantization": "int8", "device": "reference"}, ConfigError, ["int8"]),
        ({"speculative_model": 3, "device": "reference"}, ConfigError, ["speculative_model"]),
        ({"device": "cuda"}, BackendUnavailableError, ["cuda"]),
        ({"enable_prefix_caching": 1}, ConfigError, ["enable_prefix_caching"]),
    ],
)
def test_engine_options_are_checked(options, error, words):
    with pytest.raises(error) as caught:
        LLM("tiny-draft", **options)
    for word in words:
        assert word in str(caught.value)


def test_unknown_models_are_refused_by_name():
    with pytest.raises(ModelNotFoundError, match="no-such-model"):
        LLM("no-such-model")


def test_engine_config_rejects_a_model_that_is_no_name():
    with pytest.raises(ConfigError):
        EngineConfig(model="")


def test_a_closed_llm_says_so():
    llm = LLM("tiny-draft", device="reference")
    llm.close()
    llm.close()
    with pytest.raises(EngineClosedError):
        llm.generate("x", GREEDY)
    with pytest.raises(EngineClosedError):
        llm.stats()


def test_damaged_kv_is_never_published(engine):
    """The KV of a step with NaN logits is suspect: a later request with the same prompt computes it anew."""
    prompt = list(range(100, 132))
    forward = engine.runner.decoder.forward

    def poisoned(batch, kv_cache):
        logits = forward(batch, kv_cache)
        logits[:] = np.nan
        engine.runner.decoder.examined = None  # of other logits
        return logits

    engine.runner.decoder.forward = poisoned
    try:
        assert generate(engine, prompt, GREEDY).outputs[0].finish_reason == "error"
        with_prompt = generate(engine, prompt, GREEDY.clone(prompt_logprobs=1))
        assert with_prompt.outputs[0].finish_reason == "error"
        assert "prompt token" in with_prompt.error or "NaN" in with_prompt.error
    finally:
        engine.runner.decoder.forward = forward
    output = generate(engine, prompt, GREEDY)
    assert output.num_cached_tokens == 0 and output.outputs[0].finish_reason == "length"
    assert_all_blocks_back(engine)


def test_a_stream_has_one_output_for_each_token(engine):
    """Chunks of a prompt give none."""
    request_id = engine.add_request(list(range(4, 200)), GREEDY, stream=True)
    outputs = []
    while engine.has_unfinished():
        outputs += engine.step()
    assert [len(o.outputs[0].token_ids) for o in outputs if o.request_id == request_id] == list(range(1, 9))


def test_an_engine_that_cannot_be_made_leaves_no_thread_behind():
    """A process that ends while another thread still sets up LLVM may crash."""
    program = """
import threading
from minipaged import LLM
try:
    LLM("no-such-model", device="cpu")
except Exception as error:
    print(type(error).__name__, [thread.name for thread in threading.enumerate()])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "ModelNotFoundError ['MainThread']\n"
