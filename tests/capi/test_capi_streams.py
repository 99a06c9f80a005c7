"""How output comes while a request runs: callbacks, reading, the queue of news, and how it is ended early."""

from __future__ import annotations

import threading

from minipaged import SamplingParams
from tests.support.capi import PROMPTS, Listener, wait_until


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


def test_a_chunk_says_when_its_token_was_sampled(api, engine):
    listener = Listener(api)
    options = api.struct("request_options", callback=listener.callback)
    request = api.submit(engine, "ROMEO:\n", api.struct("sampling", max_tokens=1), options)
    api.check(api.wait(engine, request, api.FOREVER))
    info = api.filled(api.request_poll, "request_info", engine, request)
    assert [chunk["produced_ns"] for chunk in listener.chunks] == [info.first_token_ns]
    assert info.submitted_ns < info.first_token_ns < info.finished_ns
    api.check(api.request_free(engine, request))


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
