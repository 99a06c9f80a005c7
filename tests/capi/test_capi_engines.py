"""What an engine is asked for besides requests, its two modes, and two of them beside each other."""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time

import pytest

from minipaged import LLM, SamplingParams
from minipaged.model import catalog
from tests.support.capi import PROMPTS, Listener, wait_until


def test_text_and_tokens(api, engine, llm):
    for text in [*PROMPTS, ""]:
        ids = api.sized(api.tokenize, engine, text.encode(), api.ZSTRING, 1, kind="int32_t")
        assert ids == llm.tokenizer.encode(text)
        assert api.sized(api.detokenize, engine, ids, len(ids), 1) == llm.tokenizer.decode(ids)
    ids = api.ffi.new("int32_t[2]")
    length = api.ffi.new("size_t *")
    assert api.tokenize(engine, PROMPTS[1].encode(), api.ZSTRING, 1, ids, 2, length) == -7
    assert length[0] > 2 and list(ids) == [0, 0]


def test_chat(api, llm, chat_model):
    """A model with a chat template: the conversation as JSON, in both forms."""
    engine, python = chat_model
    messages = [{"role": "user", "content": 'Say "caf\u00e9".\n'}]
    expected = python.chat_prompt(messages)["prompt"]
    whole = {"messages": messages, "add_generation_prompt": True}
    for conversation in (messages, whole):
        assert api.sized(api.chat_prompt, engine, json.dumps(conversation).encode(), api.ZSTRING) == expected
    request = api.submit(engine, json.dumps(messages), api.struct("sampling", temperature=0, max_tokens=8), chat=True)
    api.check(api.wait(engine, request, api.FOREVER))
    answer = python.chat(messages, SamplingParams(temperature=0, max_tokens=8))[0].outputs[0]
    assert api.tokens(engine, request) == answer.token_ids


@pytest.fixture
def chat_model(api, tmp_path):
    """``tiny-draft`` with a chat template, from both sides."""
    path = tmp_path / "model"
    shutil.copytree(catalog.resolve("tiny-draft"), path)
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}KING:\n{% endif %}"
    )
    (path / "chat_template.jinja").write_text(template)
    engine = api.create(str(path))
    with LLM(str(path), device="reference", num_blocks=64) as llm:
        yield engine, llm
    api.check(api.engine_destroy(engine))


def test_model_info_and_stats(api, engine, llm):
    info = api.filled(api.engine_model_info, "model_info", engine)
    assert (info.vocab_size, info.num_layers) == (llm.model_config.vocab_size, llm.model_config.num_layers)
    assert info.max_model_len == llm.max_model_len
    assert api.ffi.string(info.architecture).decode() == llm.model_config.architecture
    assert api.ffi.string(info.device) == b"reference"
    request = api.submit(engine, PROMPTS[0], api.struct("sampling", max_tokens=2))
    api.check(api.wait(engine, request, api.FOREVER))
    api.check(api.request_free(engine, request))
    stats = api.filled(api.engine_stats, "stats", engine)
    found = json.loads(api.sized(api.engine_stats_json, engine))
    assert found["num_blocks_total"] == stats.num_blocks_total == 256
    assert found["num_steps"] == stats.num_steps > 0 and stats.step_seconds > 0


def test_step_mode_computes_only_inside_step(api, llm):
    before = threading.active_count()
    engine = api.create(mode=1)
    assert threading.active_count() == before
    listener = Listener(api)
    sampling = api.struct("sampling", temperature=0, max_tokens=10)
    heard = api.submit(engine, PROMPTS[0], sampling, api.struct("request_options", callback=listener.callback))
    read = api.submit(engine, PROMPTS[1], sampling, api.struct("request_options", stream=1))
    cancelled = api.submit(engine, PROMPTS[2], sampling)
    time.sleep(0.05)
    assert api.wait(engine, read, 0) == 1 and not listener.chunks
    api.check(api.cancel(engine, cancelled))
    assert api.engine_step(engine) == 0
    assert api.wait(engine, cancelled, 0) == 0 and len(listener.tokens()) == 1
    waiter = threading.Thread(target=api.wait, args=(engine, read, api.FOREVER))
    waiter.start()
    for _ in range(9):
        assert api.engine_step(engine) == 0
    waiter.join(20)
    assert not waiter.is_alive()
    assert api.engine_step(engine) == 2  # nothing to do
    expected = [o.outputs[0] for o in llm.generate(PROMPTS[:2], SamplingParams(temperature=0, max_tokens=10))]
    assert listener.tokens() == expected[0].token_ids and api.tokens(engine, read) == expected[1].token_ids
    assert listener.threads == {threading.get_ident()} and api.wait(engine, heard, 0) == 0
    api.submit(engine, PROMPTS[0], sampling)
    api.check(api.engine_destroy(engine))


def test_two_engines_do_not_know_each_other(api, engine, llm):
    other = api.create("tiny")
    sampling = api.struct("sampling", temperature=0, max_tokens=8)
    here, there = api.submit(engine, "ROMEO:\n", sampling), api.submit(other, "ROMEO:\n", sampling)
    assert here != there
    assert api.wait(engine, there, 0) == -4 and api.cancel(other, here) == -4
    api.check(api.wait(engine, here, api.FOREVER))
    api.check(api.wait(other, there, api.FOREVER))
    expected = llm.generate("ROMEO:\n", SamplingParams(temperature=0, max_tokens=8))[0].outputs[0].token_ids
    assert api.tokens(engine, here) == expected != api.tokens(other, there)
    api.check(api.engine_destroy(other))
    api.check(api.request_free(engine, here))


def test_priority_and_salt_reach_the_engine(api):
    engine = api.create(policy="priority", max_num_seqs=1)
    sampling = api.struct("sampling", temperature=0, max_tokens=12, ignore_eos=1)
    slow = api.submit(
        engine, "A first one to keep it busy.\n", api.struct("sampling", temperature=0, max_tokens=60, ignore_eos=1)
    )
    late = api.submit(engine, "ROMEO:\n" * 8, sampling, api.struct("request_options", priority=5, cache_salt="a"))
    soon = api.submit(engine, "ROMEO:\n" * 8, sampling, api.struct("request_options", priority=-5, cache_salt="b"))
    for request in (slow, late, soon):
        api.check(api.wait(engine, request, api.FOREVER))
    finished = {r: api.filled(api.request_poll, "request_info", engine, r) for r in (late, soon)}
    assert finished[soon].finished_ns < finished[late].finished_ns
    assert finished[soon].num_cached_tokens == finished[late].num_cached_tokens == 0  # other salts
    again = api.submit(engine, "ROMEO:\n" * 8, sampling, api.struct("request_options", cache_salt="a"))
    api.check(api.wait(engine, again, api.FOREVER))
    assert api.filled(api.request_poll, "request_info", engine, again).num_cached_tokens > 0
    api.check(api.engine_destroy(engine))


def test_the_log_reaches_its_callback(api):
    seen = []
    callback = api.ffi.callback(
        "minipaged_log_fn", lambda level, text, data: seen.append((level, api.ffi.string(text)))
    )
    api.check(api.set_log_callback(callback, 20, api.ffi.NULL))
    engine = api.create()
    logger = logging.getLogger("minipaged.test")
    logger.setLevel(logging.DEBUG)
    logger.warning("from a thread of the host: caf\u00e9")
    logger.debug("too fine")
    wait_until(lambda: any(b"caf\xc3\xa9" in text for _, text in seen))
    api.check(api.set_log_callback(api.ffi.NULL, 0, api.ffi.NULL))
    logger.error("nobody listens")
    api.check(api.engine_destroy(engine))
    assert all(level >= 20 for level, _ in seen) and not any(b"nobody" in text for _, text in seen)
