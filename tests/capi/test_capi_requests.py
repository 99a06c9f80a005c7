"""Requests through the C interface: the same tokens, texts and log-probabilities as from Python."""

from __future__ import annotations

import json

import pytest

from minipaged import SamplingParams
from tests.support.capi import PROMPTS, Listener


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0, "max_tokens": 20},
        {"temperature": 0.8, "max_tokens": 20, "seed": 2**64 - 1, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
        {"temperature": 1.5, "max_tokens": 12, "seed": 5, "presence_penalty": 0.5, "frequency_penalty": -0.25},
        {"temperature": 0, "max_tokens": 15, "repetition_penalty": 1.3, "min_tokens": 3, "ignore_eos": True},
    ],
)
def test_the_same_tokens_as_from_python(api, engine, llm, options):
    sampling = api.struct("sampling", **options, **({"has_seed": 1} if "seed" in options else {}))
    requests = [api.submit(engine, prompt, sampling) for prompt in PROMPTS]
    for request, expected in zip(requests, llm.generate(PROMPTS, SamplingParams(**options)), strict=True):
        assert api.wait(engine, request, api.FOREVER) == 0
        assert api.tokens(engine, request) == expected.outputs[0].token_ids
        assert api.text(engine, request) == expected.outputs[0].text
        info = api.filled(api.request_poll, "request_info", engine, request)
        assert (info.finished, info.status, info.num_choices) == (1, 0, 1)
        assert info.num_prompt_tokens == len(expected.prompt_token_ids)
        assert info.num_generated_tokens == len(expected.outputs[0].token_ids)
        assert info.submitted_ns <= info.first_scheduled_ns <= info.first_token_ns <= info.finished_ns
        assert info.finished_ns - info.submitted_ns < 60e9
        api.check(api.request_free(engine, request))


def test_lists_of_the_struct(api, engine, llm):
    ffi = api.ffi
    texts = [ffi.new("char[]", text) for text in (b"\n\n", b"zebra")]
    stop, bad = ffi.new("char *[]", texts[:1]), ffi.new("char *[]", texts[1:])
    ids = ffi.new("int32_t[]", list(range(4, 90)))
    biases, bias_ids = ffi.new("double[]", [5.0, -100.0]), ffi.new("int32_t[]", [40, 41])
    sampling = api.struct("sampling", temperature=0, max_tokens=30, logprobs=2, include_stop_str_in_output=1)
    sampling.stop, sampling.num_stop = ffi.cast("const char *const *", stop), 1
    sampling.bad_words, sampling.num_bad_words = ffi.cast("const char *const *", bad), 1
    sampling.allowed_token_ids, sampling.num_allowed_token_ids = ids, 86
    sampling.stop_token_ids, sampling.num_stop_token_ids = ids + 80, 2
    sampling.logit_bias_ids, sampling.logit_bias, sampling.num_logit_bias = bias_ids, biases, 2
    request = api.submit(engine, "ROMEO:\n", sampling)
    ffi.memmove(texts[0], b"xx", 2)  # inputs were copied
    params = SamplingParams(
        temperature=0, max_tokens=30, logprobs=2, include_stop_str_in_output=True, stop=["\n\n"], bad_words=["zebra"]
    ).clone(allowed_token_ids=list(range(4, 90)), stop_token_ids=[84, 85], logit_bias={40: 5.0, 41: -100.0})
    (expected,) = llm.generate("ROMEO:\n", params)[0].outputs
    api.check(api.wait(engine, request, api.FOREVER))
    assert api.tokens(engine, request) == expected.token_ids
    choice = api.filled(api.request_choice, "choice_info", engine, request, 0)
    assert choice.finish_reason == {"stop": 1, "length": 2}[expected.finish_reason]
    assert choice.has_logprobs == 1 and choice.cumulative_logprob == pytest.approx(expected.cumulative_logprob)
    for position, token_id in enumerate(expected.token_ids):
        found = api.logprobs(engine, request, 0, position)
        assert found[0].token_id == token_id
        assert {e.token_id: (e.rank, e.logprob) for e in found} == {
            t: (e.rank, e.logprob) for t, e in expected.logprobs[position].items()
        }
    assert api.logprobs(engine, request, 0, len(expected.token_ids)) == []
    api.check(api.request_free(engine, request))


def test_stop_strings_tokens_and_end_of_sequence(api, engine, llm):
    text = llm.generate("ROMEO:\n", SamplingParams(temperature=0, max_tokens=30))[0].outputs[0].text
    word = text.split()[2]
    request = api.submit(engine, "ROMEO:\n", api.struct("sampling", temperature=0, json=json.dumps({"stop": word})))
    api.check(api.wait(engine, request, api.FOREVER))
    assert api.sized(api.request_stop_string, engine, request, 0) == word
    choice = api.filled(api.request_choice, "choice_info", engine, request, 0)
    assert (choice.finish_reason, choice.stop_token_id) == (1, -1)
    stop = api.tokens(engine, request)[-1]
    api.check(api.request_free(engine, request))
    request = api.submit(
        engine, "ROMEO:\n", api.struct("sampling", temperature=0, json=f'{{"stop_token_ids": [{stop}]}}')
    )
    api.check(api.wait(engine, request, api.FOREVER))
    choice = api.filled(api.request_choice, "choice_info", engine, request, 0)
    assert (choice.finish_reason, choice.stop_token_id) == (1, stop)
    assert api.sized(api.request_stop_string, engine, request, 0) == ""
    api.check(api.request_free(engine, request))


def test_prompt_logprobs(api, engine, llm):
    expected = llm.generate("ROMEO:\n", SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1))[0]
    request = api.submit(engine, "ROMEO:\n", api.struct("sampling", temperature=0, max_tokens=1, prompt_logprobs=1))
    api.check(api.wait(engine, request, api.FOREVER))
    assert api.logprobs(engine, request, -1, 0) == []
    for position, entry in enumerate(expected.prompt_logprobs[1:], start=1):
        found = api.logprobs(engine, request, -1, position)
        assert found[0].token_id == expected.prompt_token_ids[position]
        assert {e.token_id: e.logprob for e in found} == {t: e.logprob for t, e in entry.items()}
    api.check(api.request_free(engine, request))


def test_token_prompts_and_max_tokens_zero(api, engine, llm):
    ids = llm.tokenizer.encode("ROMEO:\n")
    sampling = api.struct("sampling", temperature=0, max_tokens=0, ignore_eos=1)
    request = api.submit(engine, ids * 10, sampling)
    api.check(api.wait(engine, request, api.FOREVER))
    assert len(api.tokens(engine, request)) == llm.max_model_len - 10 * len(ids)
    api.check(api.request_free(engine, request))


def test_several_choices_and_beams(api, engine, llm):
    sampling = api.struct("sampling", n=3, temperature=1, has_seed=1, seed=11, max_tokens=10)
    compare(api, engine, llm, sampling, SamplingParams(n=3, temperature=1, seed=11, max_tokens=10))
    sampling = api.struct("sampling", n=2, best_of=4, temperature=1, has_seed=1, seed=11, max_tokens=10)
    compare(api, engine, llm, sampling, SamplingParams(n=2, best_of=4, temperature=1, seed=11, max_tokens=10))
    sampling = api.struct("sampling", n=2, beam_width=3, length_penalty=0.8, early_stopping=1, max_tokens=10)
    params = dict(n=2, use_beam_search=True, beam_width=3, length_penalty=0.8, early_stopping=True, max_tokens=10)
    compare(api, engine, llm, sampling, SamplingParams(**params))


def compare(api, engine, llm, sampling, params):
    """The same choices as Python's, in the same order: waited for, and by callback."""
    listener = Listener(api)
    waited = llm.generate("ROMEO:\n", params)[0].outputs
    *_, streamed = llm.stream("ROMEO:\n", params)
    for options in (None, api.struct("request_options", callback=listener.callback)):
        expected = streamed.outputs if options else waited
        request = api.submit(engine, "ROMEO:\n", sampling, options)
        api.check(api.wait(engine, request, api.FOREVER))
        info = api.filled(api.request_poll, "request_info", engine, request)
        assert info.num_choices == len(expected)
        for index, output in enumerate(expected):
            assert api.tokens(engine, request, index) == output.token_ids
            assert api.text(engine, request, index) == output.text
            choice = api.filled(api.request_choice, "choice_info", engine, request, index)
            assert choice.beam_score == pytest.approx(getattr(output, "beam_score", None) or 0.0)
        api.check(api.request_free(engine, request))
    for index, output in enumerate(streamed.outputs):
        assert (listener.tokens(index), listener.text(index)) == (output.token_ids, output.text)
    assert [chunk["finished"] for chunk in listener.chunks].count(1) == 1 and not listener.errors


@pytest.mark.parametrize(
    ("kind", "grammar", "accepts"),
    [
        ("regex", "[a-c]{3}", lambda text: len(text) == 3 and set(text) <= set("abc")),
        ("choice", '["yes", "no"]', {"yes", "no"}.__contains__),
        ("json_object", None, lambda text: isinstance(json.loads(text), dict)),
    ],
)
def test_grammars(api, engine, kind, grammar, accepts):
    pytest.importorskip("llguidance")
    sampling = api.struct(
        "sampling", temperature=0, max_tokens=60, grammar_kind=kind, **({"grammar": grammar} if grammar else {})
    )
    if kind == "json_object":
        sampling.temperature, sampling.max_tokens = api.UNSET, 400
    request = api.submit(engine, "ROMEO:\n", sampling)
    api.check(api.wait(engine, request, api.FOREVER))
    reason = api.filled(api.request_choice, "choice_info", engine, request, 0).finish_reason
    assert reason != 1 or accepts(api.text(engine, request))
    assert kind == "json_object" or reason == 1
    api.check(api.request_free(engine, request))
