"""The functions of ``src/externs.h``, and what happens when Python has started."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import json
import logging

from _minipaged_capi import ffi, lib
from minipaged_capi.host import Host, StepHost, text_of
from minipaged_capi.options import ARGUMENT, ENGINE, OK, PACKAGE, CallError, chat_text, explain, options_of

import minipaged
from minipaged import errors

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


# -- start ------------------------------------------------------------------------------------------


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


start()
