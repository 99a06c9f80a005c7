"""Misuse of the C interface: each is answered by a status and a text, and changes nothing."""

from __future__ import annotations

import json
import threading

import pytest

# Statuses by the name they have in the header, without prefix.
ARGUMENT, ENGINE, NOT_FOUND, STRUCT, UTF8, BUFFER, BUSY = -2, -3, -4, -5, -6, -7, -8
CONFIG, PARAMETER, REQUEST, PROMPT_TOO_LONG, POOL_TOO_SMALL, TOKEN_RANGE = -13, -14, -15, -16, -17, -18
MODEL_NOT_FOUND, ENGINE_DIED, NOT_FINISHED, MODE = -19, -25, -27, -28


def null_arguments(api, function):
    """NULL for every pointer and 0 for every number."""
    kind = api.ffi.typeof(getattr(api.lib, function))
    return [0 if a.kind == "primitive" else api.ffi.NULL for a in kind.args], kind.result


def test_null_everywhere(api, engine):
    harmless = {"minipaged_engine_destroy", "minipaged_set_log_callback"}
    for function in api.functions:
        arguments, result = null_arguments(api, function)
        if result.cname != "int32_t" or not arguments or not any(a == api.ffi.NULL for a in arguments):
            continue
        status = getattr(api.lib, function)(*arguments)
        assert status == (0 if function in harmless else ARGUMENT), function
        assert function in harmless or "NULL" in api.error_text(), function
        # The same with a good engine, so that what is behind it is looked at.
        places = [i for i, a in enumerate(api.ffi.typeof(getattr(api.lib, function)).args) if "engine *" in a.cname]
        if places and function != "minipaged_engine_destroy" and "create" not in function:
            arguments[places[0]] = engine
            status = getattr(api.lib, function)(*arguments)
            allowed = {ARGUMENT, NOT_FOUND, MODE} | ({0} if "json" in function or "detokenize" in function else set())
            assert status in allowed, function


def test_the_text_is_the_threads_own(api, engine):
    assert api.wait(engine, 1, 0) == NOT_FOUND
    mine = api.error_text()
    assert mine.startswith("this engine has no request 1")
    seen = []

    def other():
        seen.append(api.error_text())
        api.cancel(engine, 77)
        seen.append(api.error_text())

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen[0] == "" and "77" in seen[1] and api.error_text() == mine


def test_dead_and_false_engines(api):
    engine = api.create()
    request = api.submit(engine, "ROMEO:\n")
    api.check(api.engine_destroy(engine))
    garbage = [api.ffi.cast("minipaged_engine *", n) for n in (1, 8, 0x7FFFFFFFFFF, 2**63)]
    local = api.ffi.new("char[64]")
    for handle in [engine, *garbage, api.ffi.cast("minipaged_engine *", local)]:
        assert api.engine_destroy(handle) == ENGINE
        assert api.wait(handle, request, 0) == ENGINE and "destroyed" in api.error_text()
        assert api.engine_step(handle) == ENGINE
        assert api.submit_text(api.ffi.new("uint64_t *"), handle, b"x", 1, api.ffi.NULL, api.ffi.NULL) == ENGINE


def test_dead_and_false_requests(api, engine):
    request = api.submit(engine, "ROMEO:\n")
    api.check(api.request_free(engine, request))
    info = api.struct("request_info")
    for number in (0, 1, request, request + 1, 2**64 - 1):
        assert api.wait(engine, number, 5) == api.cancel(engine, number) == NOT_FOUND
        assert api.request_free(engine, number) == api.request_poll(engine, number, info) == NOT_FOUND
        assert api.request_text(engine, number, 0, api.ffi.NULL, 0, api.ffi.NULL) == NOT_FOUND


def test_freeing_wakes_who_waits(api):
    engine = api.create(mode=1)  # nobody steps: it does not end by itself
    request, status = api.submit(engine, "LONG\n"), []
    thread = threading.Thread(target=lambda: status.append(api.wait(engine, request, api.FOREVER)))
    thread.start()
    thread.join(0.1)
    assert thread.is_alive()
    api.check(api.request_free(engine, request))
    thread.join(20)
    assert status == [NOT_FOUND]
    api.check(api.engine_destroy(engine))


@pytest.mark.parametrize("size", [0, 1, 3, 5, 7, 66, 2**32 - 1])
def test_impossible_struct_sizes(api, engine, size):
    number = api.ffi.new("uint64_t *")
    for name, call in {
        "sampling": lambda s: api.submit_text(number, engine, b"x", 1, s, api.ffi.NULL),
        "request_options": lambda s: api.submit_text(number, engine, b"x", 1, api.ffi.NULL, s),
        "engine_options": lambda s: api.engine_create(api.ffi.new("minipaged_engine **"), b"tiny-draft", s),
        "stats": lambda s: api.engine_stats(engine, s),
        "model_info": lambda s: api.engine_model_info(engine, s),
        "request_info": lambda s: api.request_poll(engine, 1, s),
        "choice_info": lambda s: api.request_choice(engine, 1, 0, s),
        "reader": lambda s: api.request_read(engine, 1, s, 0),
    }.items():
        struct = api.struct(name)
        struct.struct_size = size
        assert call(struct) == STRUCT, name
        assert f"minipaged_{name}" in api.error_text() and str(size) in api.error_text()


def test_structs_of_older_and_newer_callers(api, engine):
    sampling = api.struct("sampling", temperature=0, max_tokens=3, top_p=7.0)
    sampling.struct_size = api.ffi.offsetof("minipaged_sampling", "top_p")  # an older caller: top_p is not its field
    request = api.submit(engine, "ROMEO:\n", sampling)
    assert api.wait(engine, request, api.FOREVER) == 0 and len(api.tokens(engine, request)) == 3
    api.check(api.request_free(engine, request))
    ours = api.ffi.sizeof("minipaged_sampling")
    newer = api.ffi.new(
        "char[]", bytes(api.ffi.buffer(api.struct("sampling", temperature=0, max_tokens=2))) + bytes(64)
    )
    sampling = api.ffi.cast("minipaged_sampling *", newer)
    sampling.struct_size = ours + 64
    request = api.submit(engine, "ROMEO:\n", sampling)
    assert api.wait(engine, request, api.FOREVER) == 0 and len(api.tokens(engine, request)) == 2
    api.check(api.request_free(engine, request))
    newer[ours + 5] = b"\x01"  # a field that this library does not know is set
    number = api.ffi.new("uint64_t *")
    assert api.submit_text(number, engine, b"x", 1, sampling, api.ffi.NULL) == STRUCT
    assert "later version" in api.error_text()
    stats = api.ffi.new("char[]", b"\xee" * (api.ffi.sizeof("minipaged_stats") + 16))
    typed = api.ffi.cast("minipaged_stats *", stats)
    typed.struct_size = 16  # an older caller's struct ends there: nothing behind is written
    api.check(api.engine_stats(engine, typed))
    assert bytes(api.ffi.buffer(stats))[16:-1] == b"\xee" * (len(stats) - 17)
    assert typed.struct_size == 16 and typed.block_size > 0


BAD_UTF8 = [
    b"\xff",
    b"abc\x80",
    b"\xc3",
    b"\xc0\xaf",
    b"\xe0\x80\x80",
    b"\xed\xa0\x80",
    b"\xf0\x9f\x98",
    b"\xf5\x80\x80\x80",
]


@pytest.mark.parametrize("text", BAD_UTF8)
def test_what_is_not_utf8(api, engine, text):
    with pytest.raises(UnicodeDecodeError):
        text.decode()
    null, number = api.ffi.NULL, api.ffi.new("uint64_t *")
    assert api.submit_text(number, engine, text, api.ZSTRING, null, null) == UTF8
    assert api.submit_chat(number, engine, text, len(text), null, null) == UTF8
    assert api.tokenize(engine, text, api.ZSTRING, 0, null, 0, null) == UTF8
    assert api.chat_prompt(engine, text, api.ZSTRING, null, 0, null) == UTF8
    assert api.engine_create(api.ffi.new("minipaged_engine **"), text, null) == UTF8
    assert api.submit_text(number, engine, b"x", 1, api.struct("sampling", json=text), null) == UTF8
    assert api.submit_text(number, engine, b"x", 1, null, api.struct("request_options", cache_salt=text)) == UTF8
    assert number[0] == 0


def ends_with(api, engine, status, pattern, prompt="ROMEO:\n", sampling=None, **options):
    """The request, alone, ends with this status and text; waiting, polling and asking all say so."""
    request = api.submit(engine, prompt, sampling, **options)
    assert api.wait(engine, request, api.FOREVER) == status, api.error_text()
    assert pattern in api.error_text()
    assert pattern in api.sized(api.request_error, engine, request)
    info = api.filled(api.request_poll, "request_info", engine, request)
    assert (info.finished, info.status, info.finish_reason, info.num_choices) == (1, status, 4, 0)
    assert api.request_read(engine, request, api.struct("reader"), 0) == status
    assert api.request_text(engine, request, 0, api.ffi.NULL, 0, api.ffi.NULL) == ARGUMENT
    api.check(api.request_free(engine, request))


def test_requests_that_cannot_run(api, engine):
    ends_with(api, engine, PARAMETER, "temperature is -3", sampling=api.struct("sampling", temperature=-3))
    ends_with(api, engine, PARAMETER, "nan", sampling=api.struct("sampling", top_p=float("nan")))
    ends_with(api, engine, PARAMETER, "inf", sampling=api.struct("sampling", min_p=float("inf")))
    ends_with(api, engine, PARAMETER, "n is 0", sampling=api.struct("sampling", n=0))
    ends_with(
        api, engine, PARAMETER, "unknown option 'temprature'", sampling=api.struct("sampling", json='{"temprature": 1}')
    )
    ends_with(api, engine, ARGUMENT, "not valid JSON", sampling=api.struct("sampling", json="{"))
    ends_with(api, engine, ARGUMENT, "must be an object", sampling=api.struct("sampling", json="[1]"))
    ends_with(api, engine, ARGUMENT, "given twice", sampling=api.struct("sampling", top_k=3, json='{"top_k": 3}'))
    ends_with(api, engine, ARGUMENT, "not valid JSON", sampling=api.struct("sampling", json="[" * 100_000))
    ends_with(api, engine, PARAMETER, "regexp", sampling=api.struct("sampling", grammar_kind="regexp", grammar="a"))
    ends_with(api, engine, TOKEN_RANGE, "-1", prompt=[1, 2, -1])
    ends_with(api, engine, TOKEN_RANGE, "2147483647", prompt=[2**31 - 1])
    ends_with(api, engine, REQUEST, "empty", prompt=[])
    ends_with(api, engine, PROMPT_TOO_LONG, "max_model_len", sampling=api.struct("sampling", max_tokens=10**9))
    ends_with(api, engine, PARAMETER, "messages is empty", prompt="[]", chat=True)
    ends_with(api, engine, ARGUMENT, "no messages", prompt="{}", chat=True)
    ends_with(api, engine, ARGUMENT, "not valid JSON", prompt="hello", chat=True)
    request = api.submit(engine, "ROMEO:\n", api.struct("sampling", temperature=0))
    assert api.wait(engine, request, api.FOREVER) == 0  # the others never noticed
    api.check(api.request_free(engine, request))


def test_a_refused_request_tells_its_callback_once(api, engine):
    seen = []

    @api.ffi.callback("minipaged_chunk_fn")
    def callback(chunk, user_data):
        seen.append((chunk.finished, chunk.status, api.ffi.string(chunk.error).decode(), chunk.choice_finish_reason))
        return 0

    options = api.struct("request_options", callback=callback)
    request = api.submit(engine, [10**6], None, options)
    assert api.wait(engine, request, api.FOREVER) == TOKEN_RANGE
    assert seen == [(1, TOKEN_RANGE, api.error_text(), 4)]
    assert api.request_read(engine, request, api.struct("reader"), 0) == ARGUMENT  # it has a callback
    api.check(api.request_free(engine, request))


def test_out_of_memory_in_the_pool(api):
    engine = api.create(num_blocks=4, max_model_len=512)
    ends_with(api, engine, POOL_TOO_SMALL, "blocks", sampling=api.struct("sampling", max_tokens=300))
    requests = [api.submit(engine, f"{i}\n", api.struct("sampling", max_tokens=30, ignore_eos=1)) for i in range(6)]
    for request in requests:  # more than fit at once: they take turns
        assert api.wait(engine, request, api.FOREVER) == 0 and len(api.tokens(engine, request)) == 30
    api.check(api.engine_destroy(engine))


def test_arguments_that_the_struct_shows_to_be_wrong(api, engine):
    null, number = api.ffi.NULL, api.ffi.new("uint64_t *")

    def status(**fields):
        return api.submit_text(number, engine, b"x", 1, api.struct("sampling", **fields), null)

    assert status(num_stop=3) == ARGUMENT and "stop is NULL" in api.error_text()
    assert status(num_stop_token_ids=1) == ARGUMENT
    assert status(num_logit_bias=1) == ARGUMENT
    assert status(ignore_eos=2) == ARGUMENT and "ignore_eos is 2" in api.error_text()
    assert status(early_stopping=3) == ARGUMENT
    assert status(grammar="x") == ARGUMENT and "grammar_kind" in api.error_text()
    strings = api.ffi.new("char *[2]")
    assert status(stop=api.ffi.cast("const char *const *", strings), num_stop=2) == ARGUMENT
    assert api.submit_tokens(number, engine, null, 5, null, null) == ARGUMENT
    assert api.submit_text(number, engine, b"x", 2**63, null, null) == ARGUMENT
    options = api.struct("request_options", auto_free=1)
    assert api.submit_text(number, engine, b"x", 1, null, options) == ARGUMENT and "auto_free" in api.error_text()


def test_readers_with_too_little_room(api, engine):
    request = api.submit(engine, "ROMEO:\n", api.struct("sampling", temperature=0))
    api.check(api.wait(engine, request, api.FOREVER))
    text, tokens = api.ffi.new("char[4]"), api.ffi.new("int32_t[1]")
    assert api.request_read(engine, request, api.struct("reader", text=text, text_capacity=4), 0) == BUFFER
    assert api.request_read(engine, request, api.struct("reader", token_ids=tokens), 0) == BUFFER
    length = api.ffi.new("size_t *")
    assert api.request_text(engine, request, 0, text, 4, length) == BUFFER and length[0] > 4
    assert api.request_text(engine, request, 0, api.ffi.NULL, 4, length) == ARGUMENT
    assert api.request_text(engine, request, 1, text, 4, length) == ARGUMENT and "1 choices" in api.error_text()
    assert api.request_choice(engine, request, -1, api.struct("choice_info")) == ARGUMENT
    api.check(api.request_free(engine, request))


def test_callbacks_that_reenter(api, engine):
    """What would wait for itself is refused; everything else works there."""
    results, other = {}, api.create()

    @api.ffi.callback("minipaged_chunk_fn")
    def callback(chunk, user_data):
        if results:
            return 0
        results["destroy"] = api.engine_destroy(engine)
        results["destroy other"] = api.engine_destroy(other)
        results["create"] = api.engine_create(api.ffi.new("minipaged_engine **"), b"tiny-draft", api.ffi.NULL)
        results["wait"] = api.wait(engine, chunk.request, api.FOREVER)
        results["next"] = api.next(api.ffi.new("uint64_t *"), engine, 10)
        results["step"] = api.engine_step(other)
        results["wait 0"] = api.wait(engine, chunk.request, 0)
        results["text"] = api.request_text(engine, chunk.request, 0, api.ffi.NULL, 0, api.ffi.NULL)
        results["stats"] = api.engine_stats(engine, api.struct("stats"))
        results["tokenize"] = api.tokenize(engine, b"x", 1, 0, api.ffi.NULL, 0, api.ffi.NULL)
        results["inner"] = api.submit(engine, "JULIET:\n", api.struct("sampling", max_tokens=2))
        results["cancel"] = api.cancel(engine, chunk.request)
        return 0

    options = api.struct("request_options", callback=callback)
    request = api.submit(engine, "LONG\n", api.struct("sampling", max_tokens=300, ignore_eos=1), options)
    assert api.wait(engine, request, 60000) == 0
    inner = results.pop("inner")
    assert results == dict.fromkeys(("destroy", "destroy other", "create", "wait", "next", "step"), BUSY) | {
        "wait 0": 1,
        "text": NOT_FINISHED,
        "stats": 0,
        "tokenize": 0,
        "cancel": 0,
    }
    assert api.wait(engine, inner, api.FOREVER) == 0
    for number in (request, inner):
        api.check(api.request_free(engine, number))
    api.check(api.engine_destroy(other))


def test_freeing_inside_the_callback(api, engine):
    done = threading.Event()

    @api.ffi.callback("minipaged_chunk_fn")
    def callback(chunk, user_data):
        api.check(api.request_free(engine, chunk.request))
        done.set()
        return 0

    request = api.submit(
        engine, "LONG\n", api.struct("sampling", max_tokens=50), api.struct("request_options", callback=callback)
    )
    assert done.wait(20) and api.wait(engine, request, 0) == NOT_FOUND


def test_engines_that_cannot_be_made(api):
    handle = api.ffi.new("minipaged_engine **", api.ffi.cast("minipaged_engine *", 5))
    for status, pattern, model, options in [
        (MODEL_NOT_FOUND, "neither a model's name", "no-such-model", {}),
        (MODEL_NOT_FOUND, "", "/nonexistent/model", {}),
        (MODEL_NOT_FOUND, "", "/", {}),
        (CONFIG, "model", "", {}),
        (CONFIG, "device is 'toaster'", "tiny-draft", {"device": "toaster"}),
        (CONFIG, "block_size is 3", "tiny-draft", {"block_size": 3}),
        (CONFIG, "unknown option 'blocks'", "tiny-draft", {"json": '{"blocks": 3}'}),
        (ARGUMENT, "given twice", "tiny-draft", {"block_size": 8, "json": '{"block_size": 8}'}),
        (ARGUMENT, "model is given twice", "tiny-draft", {"json": '{"model": "tiny"}'}),
        (ARGUMENT, "not valid JSON", "tiny-draft", {"json": "nonsense"}),
        (ARGUMENT, "mode is 7", "tiny-draft", {"mode": 7}),
        (ARGUMENT, "enable_prefix_caching is 5", "tiny-draft", {"enable_prefix_caching": 5}),
    ]:
        assert api.engine_create(handle, model.encode(), api.struct("engine_options", **options)) == status
        assert pattern in api.error_text() and handle[0] == api.ffi.NULL


def test_the_wrong_mode(api, engine):
    assert api.engine_step(engine) == MODE and "MINIPAGED_MODE_STEP" in api.error_text()


def test_an_engine_that_dies_tells_everyone(api, monkeypatch):
    """Here the interpreter is the tests' own, so the engine's step can be broken from outside."""
    from minipaged.engine import Engine

    def broken(self, deliver=None):
        raise RuntimeError("the machine is on fire")

    for mode in (0, 1):
        engine = api.create(mode=mode)
        request = api.submit(engine, "LONG\n", api.struct("sampling", max_tokens=400, ignore_eos=1))
        monkeypatch.setattr(Engine, "step", broken)
        if mode:
            assert api.engine_step(engine) < 0
        assert api.wait(engine, request, 20000) == ENGINE_DIED and "on fire" in api.error_text()
        if not mode:
            later = api.submit(engine, "LATER\n")
            assert api.wait(engine, later, 20000) == ENGINE_DIED and "on fire" in api.error_text()
            assert api.engine_stats(engine, api.struct("stats")) == ENGINE_DIED
        else:
            assert api.engine_step(engine) == ENGINE_DIED
        api.check(api.engine_destroy(engine))
        monkeypatch.undo()


def test_destroy_ends_what_runs_and_wakes_who_waits(api):
    engine, ends, statuses = api.create(), [], []

    @api.ffi.callback("minipaged_chunk_fn")
    def callback(chunk, user_data):
        ends.extend([chunk.choice_finish_reason] * chunk.finished)
        return 0

    sampling = api.struct("sampling", max_tokens=400, ignore_eos=1)
    options = api.struct("request_options", callback=callback)
    requests = [api.submit(engine, f"{i}\n", sampling, options) for i in range(5)]
    waited = api.submit(engine, "waited\n", sampling)
    threads = [
        threading.Thread(target=lambda r=r: statuses.append(api.wait(engine, r, api.FOREVER)))
        for r in (waited, *requests)
    ]
    for thread in threads:
        thread.start()
    assert api.wait(engine, waited, 50) == 1
    api.check(api.engine_destroy(engine))
    for thread in threads:
        thread.join(20)
    assert ends == [3] * 5 and statuses == [0] * 6


def test_json_of_options_is_the_same_as_the_struct(api):
    engine = api.create(num_blocks=api.UNSET, json=json.dumps({"num_blocks": 17, "block_size": 8}))
    stats = api.filled(api.engine_stats, "stats", engine)
    assert (stats.num_blocks_total, stats.block_size) == (17, 8)
    api.check(api.engine_destroy(engine))
