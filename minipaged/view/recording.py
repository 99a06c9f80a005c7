"""Recording a trace of an engine: the engine keeps a list of observers and tells them of each step.

An observer has two methods, called on the engine's thread: ``scheduled(plan, started)`` after a step was
planned, and ``updated(began, computed, ended)`` after one was computed and its tokens were taken in; all are
times of ``time.monotonic()``. A step that computes nothing has no end.
"""

from __future__ import annotations

from minipaged.errors import InvalidParameterError, TraceError
from minipaged.view.recorder import Recorder
from minipaged.view.trace import Trace


def start(engine, max_steps: int | None) -> None:
    """As :meth:`Engine.start_trace`."""
    if max_steps is not None and (isinstance(max_steps, bool) or not isinstance(max_steps, int) or max_steps < 1):
        raise InvalidParameterError(f"max_steps is {max_steps!r}; it must be an integer of at least 1, or None.")
    if _recorder_of(engine):
        raise TraceError("a trace is being recorded already; stop_trace() ends it.")
    about = {"model": engine.model.name, "device": engine.backend.name}
    engine.observers.append(Recorder(engine.scheduler, max_steps, about))


def stop(engine) -> Trace:
    """As :meth:`Engine.stop_trace`."""
    recorder = _recorder_of(engine)
    if recorder is None:
        raise TraceError("no trace is being recorded; start_trace() begins one.")
    engine.observers.remove(recorder)
    return recorder.stop()


def _recorder_of(engine) -> Recorder | None:
    return next((observer for observer in engine.observers if isinstance(observer, Recorder)), None)
