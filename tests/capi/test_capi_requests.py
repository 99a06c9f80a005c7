"""Requests through the C interface: the same tokens as from Python, by every way of getting at them."""

from __future__ import annotations

import json
import threading
import time

import pytest

from minipaged import LLM, SamplingParams

PROMPTS = ["ROMEO:\n", "Where is the king?", "SCENE 2. A street.\n", "Caf\u00e9 \u2603 \U0001f600"]


@pytest.fixture(scope="module")
def llm():
    with LLM("tiny-draft", device="reference", num_blocks=256) as llm:
        yield llm


class Listener:
    """Collects the chunks of requests; ``answer`` may decide what the callback returns."""

    def __init__(self, api, answer=None):
        self.chunks: list[dict] = []
        self.answer = answer
        self.threads = set()
        self.ffi = api.ffi
        self.callback = api.ffi.callback("minipaged_chunk_fn", self.take, onerror=self.note, error=1)
        self.errors = []

    def note(self, kind, error, trace):
        self.errors.append(error)

    def take(self, chunk, user_data):
        self.threads.add(threading.get_ident())
        self.chunks.append(
            {
                "request": chunk.request,
                "choice": chunk.choice,
                "tokens": self.ffi.unpack(chunk.token_ids, chunk.num_tokens) if chunk.num_tokens else [],
                "text": self.ffi.buffer(chunk.text, chunk.text_length)[:].decode(),
                "reason": chunk.choice_finish_reason,
                "finished": chunk.finished,
                "status": chunk.status,
                "error": self.ffi.string(chunk.error).decode(),
            }
        )
        return self.answer(chunk) if self.answer else 0

    def tokens(self, choice: int = 0) -> list[int]:
        return [token for chunk in self.chunks if chunk["choice"] == choice for token in chunk["tokens"]]

    def text(self, choice: int = 0) -> str:
        return "".join(chunk["text"] for chunk in self.chunks if chunk["choice"] == choice)


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


def test_callbacks_give_the_tokens_in_order_on_one_other_thread(api, engine, llm):
    listeners = [Listener(api) for _ in PROMPTS]
    sampling = api.struct("sampling", temperature=0, max_tokens=25)
    requests = [
        api.submit(engine, prompt, sampling, api.struct("request_options", callback=listener.callback))
        for prompt, listener in zip(PROMPTS, listeners, strict=True)
    ]
    expected = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=25))
    for request, listener, output in zip(requests, listeners, expected, strict=True):
        api.check(api.wait(engine, request, api.FOREVER))
        assert listener.tokens() == output.outputs[0].token_ids == api.tokens(engine, request)
        assert listener.text() == output.outputs[0].text
        assert [chunk["finished"] for chunk in listener.chunks] == [0] * (len(listener.chunks) - 1) + [1]
        assert listener.chunks[-1]["reason"] in (1, 2) and {c["request"] for c in listener.chunks} == {request}
        api.check(api.request_free(engine, request))
    (thread,) = set.union(*(listener.threads for listener in listeners))
    assert thread != threading.get_ident()


def test_a_callback_can_stop_its_request(api, engine):
    listener = Listener(api, answer=lambda chunk: len(listener.chunks) >= 3)
    options = api.struct("request_options", callback=listener.callback)
    request = api.submit(engine, "LONG\n", api.struct("sampling", temperature=0, max_tokens=400, ignore_eos=1), options)
    api.check(api.wait(engine, request, api.FOREVER))
    assert listener.chunks[-1]["finished"] == 1 and listener.chunks[-1]["reason"] == 3
    assert 1 <= len(api.tokens(engine, request)) < 400
    assert api.filled(api.request_poll, "request_info", engine, request).finish_reason == 3
    api.check(api.request_free(engine, request))


def test_auto_free_and_user_data(api, engine):
    listener, freed = Listener(api), []
    on_free = api.ffi.callback("minipaged_free_fn", lambda data: freed.append(int(api.ffi.cast("intptr_t", data))))
    options = api.struct(
        "request_options",
        callback=listener.callback,
        auto_free=1,
        user_data=api.ffi.cast("void *", 42),
        free_user_data=on_free,
    )
    request = api.submit(engine, "ROMEO:\n", api.struct("sampling", temperature=0, max_tokens=5), options)
    assert api.wait(engine, request, api.FOREVER) in (0, -4)  # -4: it was gone already
    wait_until(lambda: freed == [42])
    assert api.wait(engine, request, 0) == -4 and listener.chunks[-1]["finished"] == 1


def test_reading_with_small_buffers_gives_every_byte_once(api, engine, llm):
    expected = llm.generate(PROMPTS[3], SamplingParams(temperature=1.5, seed=3, max_tokens=40))[0].outputs[0]
    sampling = api.struct("sampling", temperature=1.5, has_seed=1, seed=3, max_tokens=40)
    request = api.submit(engine, PROMPTS[3], sampling, api.struct("request_options", stream=1))
    tokens, text = api.ffi.new("int32_t[3]"), api.ffi.new("char[5]")
    got_tokens, got_text = [], b""
    while True:
        reader = api.struct("reader", token_ids=tokens, token_capacity=3, text=text, text_capacity=5)
        status = api.check(api.request_read(engine, request, reader, api.FOREVER))
        if status == 2:
            break
        assert reader.num_tokens <= 3 and reader.text_length < 5
        got_tokens += api.ffi.unpack(tokens, reader.num_tokens) if reader.num_tokens else []
        piece = api.ffi.buffer(text, reader.text_length)[:]
        piece.decode()  # never half a character
        got_text += piece
    assert got_tokens == expected.token_ids and got_text.decode() == expected.text
    assert api.request_read(engine, request, reader, 0) == 2  # again, and for ever
    assert api.text(engine, request) == expected.text  # reading takes nothing away
    api.check(api.request_free(engine, request))


def test_streams_come_while_the_request_runs(api, engine):
    sampling = api.struct("sampling", temperature=0, max_tokens=300, ignore_eos=1)
    request = api.submit(engine, "LONG\n", sampling, api.struct("request_options", stream=1))
    tokens = api.ffi.new("int32_t[512]")
    reader = api.struct("reader", token_ids=tokens, token_capacity=512)
    assert api.check(api.request_read(engine, request, reader, api.FOREVER)) == 0
    assert 0 < reader.num_tokens < 300
    assert api.request_text(engine, request, 0, api.ffi.NULL, 0, api.ffi.NULL) == -27  # NOT_FINISHED
    assert api.filled(api.request_poll, "request_info", engine, request).finished == 0
    api.check(api.request_free(engine, request))


def test_next_names_requests_with_news(api, engine):
    number = api.ffi.new("minipaged_request *")
    while api.next(number, engine, 0) == 0:
        pass
    assert api.next(number, engine, 20) == 1 and number[0] == 0
    sampling = api.struct("sampling", temperature=0, max_tokens=6)
    requests = {api.submit(engine, prompt, sampling) for prompt in PROMPTS}
    named = set()
    while named != requests:
        assert api.next(number, engine, 20000) == 0
        assert number[0] in requests and number[0] not in named  # without stream only once, at the end
        named.add(number[0])
        assert api.wait(engine, number[0], 0) == 0
    for request in requests:
        api.check(api.request_free(engine, request))
    assert api.next(number, engine, 0) == 1


def test_cancel_ends_soon_and_keeps_what_there_is(api, engine):
    sampling = api.struct("sampling", temperature=0, max_tokens=400, ignore_eos=1)
    request = api.submit(engine, "LONG\n", sampling, api.struct("request_options", stream=1))
    assert api.wait(engine, request, 30) == 1
    api.check(api.cancel(engine, request))
    api.check(api.cancel(engine, request))
    assert api.wait(engine, request, 20000) == 0
    assert api.filled(api.request_poll, "request_info", engine, request).finish_reason == 3
    api.check(api.cancel(engine, request))  # it has ended: nothing happens
    api.check(api.request_free(engine, request))
    stats = api.filled(api.engine_stats, "stats", engine)
    assert (stats.num_requests_held, stats.num_blocks_used) == (0, 0)


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
    import shutil

    from minipaged.model import catalog

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
    import logging

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


def wait_until(condition, seconds: float = 20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)
