"""The one thread that owns all compute of an engine; other threads reach it through a queue."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable

from minipaged.engine import Engine
from minipaged.errors import EngineClosedError, MinipagedError
from minipaged.outputs import RequestOutput
from minipaged.sequence_group import SequenceGroup

Sink = Callable[[RequestOutput | Exception], None]
"""Called on the engine's thread with each output of a request, or with the error that ended it."""


class EngineThread:
    """Runs an :class:`~minipaged.engine.Engine` on one thread; others talk to it through a queue.

    The thread sleeps while there is nothing to do. Whatever kills it is delivered to every
    unfinished request and to later callers; nothing waits forever.

    Args:
        engine: from now on this thread's alone, but for what only reads.
        after_step: called on this thread after each step. It must not raise.
    """

    def __init__(self, engine: Engine, after_step: Callable[[], None] | None = None):
        self.engine: Engine | None = engine
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._sinks: dict[str, Sink] = {}
        self._after_step = after_step or (lambda: None)
        self._death: BaseException | None = None
        self._process = os.getpid()
        self._lock = threading.Lock()  # orders "is it alive?" and "put" against the thread's end
        self._thread = threading.Thread(target=self._loop, name="minipaged-engine", daemon=True)
        self._thread.start()

    def open_engine(self) -> Engine:
        """The engine, for what only reads. Raises :class:`EngineClosedError` if it has stopped."""
        engine = self.engine
        if engine is None:
            raise self._dead() from self._death
        return engine

    def submit(self, prepared: SequenceGroup, sink: Sink) -> None:
        """Queue a prepared request; its outputs, the last one finished, go to ``sink``."""
        request_id = prepared.request_id

        def command():
            try:
                self.engine.submit(prepared)
            except MinipagedError as error:
                sink(error)
            else:
                self._sinks[request_id] = sink

        self._put(command)

    def abort(self, request_id: str) -> None:
        """End a request; its sink gets an output with ``finish_reason="abort"``. One that is
        finished already is left alone."""

        def command():
            output = self.engine.abort_if_unfinished(request_id)
            if output is not None:
                self._deliver(output)

        self._put(command)

    def abort_quietly(self, request_id: str) -> None:
        """As :meth:`abort`, where it does not matter if the engine has stopped meanwhile."""
        try:
            self.abort(request_id)
        except EngineClosedError:
            pass

    def call(self, function: Callable[[], object]) -> object:
        """Run ``function`` on the engine's thread, between two steps, and return its result."""
        answer: queue.SimpleQueue[tuple[bool, object]] = queue.SimpleQueue()

        def command():
            try:
                answer.put((True, function()))
            except Exception as error:
                answer.put((False, error))

        self._put(command)
        while True:
            try:
                ok, value = answer.get(timeout=0.1)
            except queue.Empty:
                if self._thread.is_alive() or not answer.empty():
                    continue
                raise self._dead() from self._death
            if not ok:
                raise value
            return value

    def close(self) -> None:
        """Abort what is unfinished and end the thread. Closing twice is harmless."""
        if os.getpid() != self._process:  # a fork has no such thread, and the lock may be held forever
            return
        with self._lock:
            if self._death is None:
                self._commands.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _put(self, command: Callable[[], None]) -> None:
        if os.getpid() != self._process:
            raise EngineClosedError(
                f"this engine was made in process {self._process}, and this is process {os.getpid()}, a fork of it: "
                "its thread does not exist here. Make the engine after the fork, or start processes with 'spawn'."
            )
        with self._lock:
            if self._death is not None:
                raise self._dead() from self._death
            self._commands.put(command)

    def _dead(self) -> EngineClosedError:
        return EngineClosedError(f"the engine has stopped: {self._death}")

    def _loop(self) -> None:
        try:
            while self._obey():
                self.engine.step(self._deliver)
                self._after_step()
            death: BaseException = EngineClosedError("it was closed.")
        except BaseException as error:
            death = error
        with self._lock:
            self._death = death
        while not self._commands.empty():  # what was put before the death was known is answered too
            command = self._commands.get()
            if command is not None:
                command()
        closed = isinstance(death, EngineClosedError)
        for request_id, sink in self._sinks.items():
            output = self.engine.abort_if_unfinished(request_id)
            sink(output if closed and output is not None else self._dead())
        self._sinks.clear()
        self.engine.close()
        self.engine = None  # lets the model's memory go, whoever still holds this thread

    def _obey(self) -> bool:
        """Carry out queued commands; wait for one if there is no work. False: time to end."""
        while not self.engine.has_unfinished() or not self._commands.empty():
            command = self._commands.get()
            if command is None:
                return False
            command()
        return True

    def _deliver(self, output: RequestOutput) -> None:
        sink = self._sinks.pop(output.request_id) if output.finished else self._sinks[output.request_id]
        sink(output)
