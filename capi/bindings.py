"""The Python half of libminipaged: what is compiled into it as the code that runs when Python has started.

An engine of the C side has a host here. Its bridge thread takes commands from the C side, checks and tokenises
each, and hands it to the engine's thread; each output goes straight from the engine's thread into the request's
record on the C side, where callers read it without Python. In step mode one thread does all of that in turn.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import json
import logging
import signal
import threading

from _minipaged_capi import ffi, lib
from _minipaged_native import push

import minipaged
from minipaged import errors

FINISH_REASONS = {None: 0, "stop": 1, "length": 2, "abort": 3, "error": 4}
CANCEL, TEXT, TOKENS, CHAT = range(4)
OK, INTERNAL, ARGUMENT, ENGINE, MEMORY, PACKAGE, NUMERICAL = 0, -1, -2, -3, -10, -12, -26
STATUS = [  # the first class that fits
    (errors.ConfigError, -13),
    (errors.InvalidParameterError, -14),
    (errors.PromptTooLongError, -16),
    (errors.PoolTooSmallError, -17),
    (errors.TokenRangeError, -18),
    (errors.RequestError, -15),
    (errors.ModelNotFoundError, -19),
    (errors.ModelFormatError, -20),
    (errors.UnsupportedModelError, -21),
    (errors.TokenizerError, -22),
    (errors.DownloadError, -23),
    (errors.BackendUnavailableError, -24),
    (errors.EngineClosedError, -25),
    (errors.NumericalError, NUMERICAL),
    (ImportError, PACKAGE),
    (MemoryError, MEMORY),
    (OSError, -19),
]


class CallError(Exception):
    """An error of the C interface itself."""

    def __init__(self, status: int, text: str):
        super().__init__(text)
        self.status = status


def explain(error: BaseException) -> tuple[int, bytes]:
    """Status and text of an exception."""
    if isinstance(error, CallError):
        status, text = error.status, str(error)
    else:
        status = next((status for kind, status in STATUS if isinstance(error, kind)), INTERNAL)
        named = status in (INTERNAL, PACKAGE, MEMORY)
        text = f"{type(error).__name__}: {error}" if named else str(error)
    return status, text.encode("utf-8", "replace")


# -- options and prompts ------------------------------------------------------------------------------


def parse(text: str, what: str):
    """JSON, or a :class:`CallError` that says where it is malformed."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CallError(ARGUMENT, f"{what} is not valid JSON: {error}") from None


def options_of(fields: str, extra: str, what: str) -> dict:
    """The fields of a struct, and those of the JSON object in it, of which none may be in both."""
    options = parse(fields, what)
    rest = parse(extra, f"{what}.json") if extra.strip() else {}
    if not isinstance(rest, dict):
        raise CallError(ARGUMENT, f"{what}.json is a JSON {type(rest).__name__}; it must be an object.")
    twice = sorted(options.keys() & rest.keys())
    if twice:
        raise CallError(ARGUMENT, f"{twice[0]} is given twice, as a field of {what} and in its json.")
    return options | rest


def structured_outputs(kind: str, source: str):
    """``grammar_kind`` and ``grammar`` in the form that ``SamplingParams`` takes."""
    if kind == "json_object":
        return {kind: True}
    return {kind: parse(source, "grammar") if kind == "choice" else source}


def sampling_params(defaults, fields: str, extra: str):
    """The model's defaults, changed by what the caller gave."""
    options = options_of(fields, extra, "minipaged_sampling")
    if options.get("max_tokens") == 0:
        options["max_tokens"] = None
    if "grammar_kind" in options:
        options["structured_outputs"] = structured_outputs(options.pop("grammar_kind"), options.pop("grammar"))
    if isinstance(options.get("logit_bias"), dict):  # the keys of a JSON object are strings
        options["logit_bias"] = {int(k) if k.isdecimal() else k: v for k, v in options["logit_bias"].items()}
    return defaults.clone(**options)


def chat_text(model, text: str) -> str:
    """What the model's chat template makes of a conversation given as JSON."""
    given = parse(text, "the conversation")
    options = given if isinstance(given, dict) else {"messages": given}
    unknown = sorted(options.keys() - {"messages", "tools", "add_generation_prompt"})
    if unknown or not isinstance(options.get("messages"), list):
        raise CallError(
            ARGUMENT,
            "a conversation is a JSON list of messages, or an object with 'messages', 'tools' and "
            f"'add_generation_prompt'; {f'{unknown[0]!r} is unknown' if unknown else 'there are no messages'}.",
        )
    if model.chat_template is None:
        raise errors.TokenizerError(f"{model.name} has no chat template; submit plain text.")
    return model.chat_template.render(
        options["messages"],
        add_generation_prompt=options.get("add_generation_prompt", True),
        tools=options.get("tools"),
    )


def text_of(data, size: int) -> str:
    return ffi.buffer(data, size)[:].decode("utf-8") if size else ""


# -- outputs --------------------------------------------------------------------------------------------


class Sink:
    """Takes a request's outputs on the engine's thread, and puts what is new into its record."""

    __slots__ = ("engine", "address", "number", "known", "ended")

    def __init__(self, engine, number: int):
        self.engine = engine
        self.address = int(ffi.cast("uintptr_t", engine))
        self.number = number
        self.known: dict[int, tuple[int, int, int]] = {}  # by choice: tokens, characters, log-probabilities
        self.ended: set[int] = set()

    def __call__(self, item) -> None:
        try:
            if isinstance(item, Exception):
                self.fail(item)
            else:
                self.deliver(item)
        except Exception as error:  # nothing the caller did may stop the engine's thread
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        status, text = explain(error)
        lib.mpx_end(self.engine, self.number, status, text, len(text), 0, 0, 0, 0, 0)

    def deliver(self, output) -> None:
        for index, choice in enumerate(output.outputs):  # what is ranked has other numbers inside
            self.push(index, choice, tell=not output.finished)
        if not output.finished:
            return
        if output.prompt_logprobs:
            self.push_logprobs(-1, output.prompt_token_ids, output.prompt_logprobs)
        error = (output.error or "").encode()
        metrics = output.metrics
        lib.mpx_end(
            self.engine,
            self.number,
            NUMERICAL if error else OK,
            error,
            len(error),
            len(output.prompt_token_ids),
            output.num_cached_tokens,
            metrics.num_preemptions,
            nanoseconds(metrics.first_scheduled_time),
            nanoseconds(metrics.first_token_time),
        )

    def push(self, index: int, choice, tell: bool) -> None:
        tokens, characters, logprobs = self.known.get(index, (0, 0, 0))
        if choice.logprobs and len(choice.logprobs) > logprobs:
            self.push_logprobs(index, choice.token_ids[logprobs:], choice.logprobs[logprobs:])
            logprobs = len(choice.logprobs)
        ends = choice.finish_reason is not None and index not in self.ended
        if ends:  # first, so that the chunk with the last tokens says why there are no more
            self.end(index, choice)
        new = choice.token_ids[tokens:]
        text = choice.text[characters:].encode()
        if new or text or ends:
            self.known[index] = len(choice.token_ids), len(choice.text), logprobs
            push(self.address, self.number, index, new, text, tell)

    def end(self, index: int, choice) -> None:
        self.ended.add(index)
        stop = choice.stop_reason
        string = stop.encode() if isinstance(stop, str) else b""
        lib.mpx_end_choice(
            self.engine,
            self.number,
            index,
            FINISH_REASONS[choice.finish_reason],
            stop if isinstance(stop, int) else -1,
            string,
            len(string),
            choice.logprobs is not None,
            choice.cumulative_logprob or 0.0,
            getattr(choice, "beam_score", None) or 0.0,
        )

    def push_logprobs(self, index: int, token_ids, entries) -> None:
        ids, ranks, values, counts = [], [], [], []
        for token_id, entry in zip(token_ids, entries, strict=True):
            # The token that is there comes first, then the others by rank.
            found = sorted((entry or {}).items(), key=lambda item: (item[0] != token_id, item[1].rank))
            ids += [other for other, _ in found]
            ranks += [logprob.rank for _, logprob in found]
            values += [logprob.logprob for _, logprob in found]
            counts.append(len(found))
        lib.mpx_push_logprobs(self.engine, self.number, index, ids, ranks, values, counts, len(counts))


def nanoseconds(seconds: float | None) -> int:
    return 0 if seconds is None else round(seconds * 1e9)


# -- engines --------------------------------------------------------------------------------------------


class Host:
    """The engine behind one handle, on a thread of its own, and the bridge to it."""

    def __init__(self, pointer, config):
        from minipaged.engine import Engine
        from minipaged.engine_thread import EngineThread

        self.pointer = pointer
        self.model_engine = Engine(config)
        self.defaults = self.model_engine.default_sampling_params()
        # Signals are for the program's own threads; a new thread has the mask of the one that starts it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            self.thread = EngineThread(self.model_engine)
            self.bridge = threading.Thread(target=self.serve, name="minipaged-bridge", daemon=True)
            self.bridge.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def serve(self) -> None:
        while self.obey_one(wait=True):
            pass

    def obey_one(self, wait: bool) -> bool:
        """Carry out the next command; ``False``: there is none."""
        command = lib.mpx_next_command(self.pointer, wait)
        if command == ffi.NULL:
            return False
        try:
            if command.kind == CANCEL:
                self.abort(str(command.request))
            else:
                self.admit(command)
        finally:
            lib.mpx_free_command(command)
        return True

    def admit(self, command) -> None:
        sink = Sink(self.pointer, command.request)
        try:
            fields, extra = text_of(command.sampling, command.sampling_size), text_of(command.extra, command.extra_size)
            prepared = self.model_engine.prepare(
                self.prompt_of(command),
                sampling_params(self.defaults, fields, extra),
                request_id=str(command.request),
                priority=command.priority,
                cache_salt=text_of(command.salt, command.salt_size) if command.has_salt else None,
                stream=bool(command.stream),
            )
            self.submit(prepared, sink)
        except Exception as error:
            sink.fail(error)

    def prompt_of(self, command):
        if command.kind == TOKENS:
            return ffi.unpack(ffi.cast("int32_t *", command.data), command.size // 4) if command.size else []
        text = text_of(command.data, command.size)
        if command.kind == TEXT:
            return text
        model = self.model_engine.model
        text = chat_text(model, text)
        return {"prompt": text, "prompt_token_ids": model.tokenizer.encode(text, add_special_tokens=False)}

    def submit(self, prepared, sink: Sink) -> None:
        self.thread.submit(prepared, sink)

    def abort(self, request_id: str) -> None:
        self.thread.abort_quietly(request_id)

    def stats(self):
        return self.thread.call(self.model_engine.stats)

    def close(self) -> None:
        self.bridge.join()
        self.thread.close()


class StepHost(Host):
    """An engine without a thread: whoever calls :meth:`step` is it."""

    def __init__(self, pointer, config):
        from minipaged.engine import Engine

        self.pointer = pointer
        self.model_engine = Engine(config)
        self.defaults = self.model_engine.default_sampling_params()
        self.sinks: dict[str, Sink] = {}
        self.lock = threading.Lock()  # a step against stats of another thread
        self.death: Exception | None = None

    def step(self) -> bool:
        """Admit, compute and deliver once; ``False``: there was nothing to do."""
        with self.lock:
            if self.death is not None:
                raise errors.EngineClosedError(f"the engine has stopped: {self.death}")
            busy = False
            while self.obey_one(wait=False):
                busy = True
            if self.model_engine.has_unfinished():
                busy = True
                try:
                    outputs = self.model_engine.step()
                except Exception as error:
                    self.death = error
                    self.fail_all(errors.EngineClosedError(f"the engine has stopped: {error}"))
                    raise
                for output in outputs:
                    self.deliver(output)
            return busy

    def deliver(self, output) -> None:
        sink = self.sinks.pop(output.request_id) if output.finished else self.sinks[output.request_id]
        sink(output)

    def fail_all(self, error: Exception) -> None:
        for sink in self.sinks.values():
            sink(error)
        self.sinks.clear()

    def submit(self, prepared, sink: Sink) -> None:
        self.model_engine.submit(prepared)
        self.sinks[prepared.request_id] = sink

    def abort(self, request_id: str) -> None:
        output = self.model_engine.abort_if_unfinished(request_id)
        if output is not None:
            self.deliver(output)

    def stats(self):
        with self.lock:
            return self.model_engine.stats()

    def close(self) -> None:
        with self.lock:
            for request_id in list(self.sinks):
                self.abort(request_id)
            self.model_engine.close()


HOSTS: dict[int, Host] = {}


def host_of(pointer) -> Host:
    host = HOSTS.get(int(ffi.cast("uintptr_t", pointer)))
    if host is None:
        raise CallError(ENGINE, "this engine is being destroyed.")
    return host


# -- what the C side calls ------------------------------------------------------------------------------


def extern(function):
    """Make a function of ``externs.h``: its last argument is the reply, and what it raises goes there."""

    @functools.wraps(function)
    def call(*arguments):
        reply = arguments[-1]
        try:
            function(*arguments)
            reply.status = OK
        except BaseException as error:
            status, text = explain(error)
            lib.mpx_reply_error(reply, status, text, len(text))

    return ffi.def_extern()(call)


@extern
def mpy_create(pointer, model, options, extra, mode, reply):
    given = options_of(ffi.string(options).decode(), ffi.string(extra).decode(), "minipaged_engine_options")
    if "model" in given:
        raise CallError(ARGUMENT, "model is given twice, as an argument and in minipaged_engine_options.json.")
    config = minipaged.EngineConfig(model=ffi.string(model).decode(), **given)
    HOSTS[int(ffi.cast("uintptr_t", pointer))] = (StepHost if mode else Host)(pointer, config)


@extern
def mpy_close(pointer, reply):
    host = HOSTS.pop(int(ffi.cast("uintptr_t", pointer)), None)
    if host is not None:
        host.close()


@extern
def mpy_step(pointer, reply):
    reply.number = host_of(pointer).step()


@extern
def mpy_model_info(pointer, info, reply):
    engine = host_of(pointer).model_engine
    config, tokenizer = engine.model.config, engine.model.tokenizer
    for name in ("vocab_size", "num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim"):
        setattr(info, name, getattr(config, name))
    info.has_chat_template = engine.model.chat_template is not None
    bos, eos = tokenizer.bos_token_id, next(iter(config.eos_token_ids), None)
    info.bos_token_id = -1 if bos is None else bos
    info.eos_token_id = -1 if eos is None else eos
    info.max_model_len = engine.max_model_len
    info.architecture = config.architecture.encode()[:63]
    info.device = engine.backend.name.encode()[:15]


@extern
def mpy_stats(pointer, stats, reply):
    found = host_of(pointer).stats()
    for name in dir(stats):
        if hasattr(found, name):
            setattr(stats, name, getattr(found, name))


@extern
def mpy_stats_json(pointer, reply):
    answer(reply, json.dumps(dataclasses.asdict(host_of(pointer).stats())).encode())


@extern
def mpy_tokenize(pointer, text, size, special, reply):
    ids = host_of(pointer).model_engine.model.tokenizer.encode(text_of(text, size), add_special_tokens=bool(special))
    answer(reply, bytes(ffi.buffer(ffi.new("int32_t[]", ids))))


@extern
def mpy_detokenize(pointer, token_ids, count, skip, reply):
    engine = host_of(pointer).model_engine
    ids = ffi.unpack(token_ids, count) if count else []
    for index, token_id in enumerate(ids):
        if not 0 <= token_id < engine.model.config.vocab_size:
            raise errors.TokenRangeError(
                f"token {index} is {token_id}, but the model has ids 0 to {engine.model.config.vocab_size - 1}."
            )
    answer(reply, engine.model.tokenizer.decode(ids, skip_special_tokens=bool(skip)).encode())


@extern
def mpy_chat_prompt(pointer, text, size, reply):
    answer(reply, chat_text(host_of(pointer).model_engine.model, text_of(text, size)).encode())


def answer(reply, data: bytes) -> None:
    lib.mpx_reply_data(reply, data, len(data))
    if reply.status != OK:
        raise MemoryError


# -- start ----------------------------------------------------------------------------------------------


class LogHandler(logging.Handler):
    """Hands messages to the C side, which has them delivered."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= lib.mpx_log_level():
            text = self.format(record).encode("utf-8", "replace")
            lib.mpx_log(record.levelno, text, len(text))


def check_version() -> None:
    built = ffi.string(lib.mpx_build_version()).decode()
    if built != minipaged.__version__:
        raise CallError(
            PACKAGE,
            f"libminipaged was built from minipaged {built}, but Python finds {minipaged.__version__} in "
            f"{minipaged.__path__[0]}; install minipaged again.",
        )


def start() -> None:
    check_version()
    logger = logging.getLogger("minipaged")
    logger.addHandler(LogHandler())
    if lib.mpx_own_interpreter():
        logger.setLevel(logging.DEBUG)
    atexit.register(lib.mpx_close_all)  # for a host that ends its interpreter


try:
    start()
except BaseException as start_error:
    start_status, start_text = explain(start_error)
    lib.mpx_start_error(start_status, start_text, len(start_text))
