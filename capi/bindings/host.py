"""The engine behind a handle: takes commands from the C side, and gives its outputs to their sinks.

An engine's bridge thread checks and tokenises each request and hands it to the engine's thread; each output goes
straight from that thread into the request's record, where callers read it without Python. In step mode one thread
does all of that in turn.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import threading

import _minipaged_native as native
from _minipaged_capi import ffi, lib
from minipaged_capi.options import chat_text, sampling_params
from minipaged_capi.sink import Sink

from minipaged import errors

CANCEL, TEXT, TOKENS, CHAT = range(4)


def text_of(data, size: int) -> str:
    return ffi.buffer(data, size)[:].decode("utf-8") if size else ""


def crowded(engine) -> bool:
    """Whether the engine computes on every core that this process may use."""
    if engine.backend.name == "cuda":
        return False
    team = getattr(engine.runner.decoder, "team", None)
    num_threads = engine.config.num_threads if team is None else team.num_threads
    return num_threads is None or num_threads >= len(os.sched_getaffinity(0))  # None: NumPy's products take all


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
            # Nothing of this object: it would keep itself, and so the model, alive.
            settle = functools.partial(native.settle, int(ffi.cast("uintptr_t", pointer)))
            self.thread = EngineThread(self.model_engine, settle if crowded(self.model_engine) else None)
            self.bridge = threading.Thread(target=self.serve, name="minipaged-bridge", daemon=True)
            self.bridge.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def serve(self) -> None:
        # Admitting is work, and whoever submits shall not wait for it: being woken, a thread of this policy does
        # not take the core of the one that wakes it.
        with contextlib.suppress(AttributeError, OSError):
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
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
                live=True,  # a sink takes what is new out of each output
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
