"""A trace as a file for Perfetto (https://ui.perfetto.dev) and chrome://tracing: the Trace Event Format.

One process has a row for the steps and their parts, another a row a sequence; counters show the blocks.
"""

from __future__ import annotations

import json

ENGINE, SEQUENCES = 1, 2
PARTS = ("plan", "compute", "sample and update")


def to_chrome(trace) -> str:
    """The file's text. Times are in microseconds, as the format wants them."""
    name = " ".join(["engine", *(str(trace.about[key]) for key in ("model", "device") if key in trace.about)])
    events = [_name(ENGINE, None, name), _name(ENGINE, 0, "steps"), _name(SEQUENCES, None, "sequences")]
    events += [_name(SEQUENCES, number, entry[0]) for number, entry in enumerate(trace.sequences)]
    for step in trace.steps:
        events += _step(step)
    return json.dumps({"displayTimeUnit": "ms", "traceEvents": events}, ensure_ascii=False, separators=(",", ":"))


def _name(process: int, thread: int | None, name: str) -> dict:
    kind = "process_name" if thread is None else "thread_name"
    return {"ph": "M", "pid": process, "tid": thread or 0, "name": kind, "args": {"name": name}}


def _step(step) -> list[dict]:
    begin, micro = round(step.time * 1e6), [round(part * 1e6) for part in step.seconds]
    duration = sum(micro)
    args = {"tokens": step.num_tokens, "events": step.events()}
    events = [_span(ENGINE, 0, f"step {step.index}", begin, duration, args)]
    at = begin
    for part, length in zip(PARTS, micro, strict=True):
        events.append(_span(ENGINE, 0, part, at, length, {}))
        at += length
    numbers = {sequence.sequence_id: sequence.number for sequence in step.sequences}
    for work in step.work:
        args = {
            "tokens": work.num_tokens,
            "tokens there before": work.num_computed_tokens,
            "from the prefix cache": work.num_cached_tokens,
            "guesses": work.num_lookahead_tokens,
            "guesses right": work.num_accepted_tokens,
        }
        name = work.kind if work.kind == "decode" else f"prefill {work.num_tokens}"
        events.append(_span(SEQUENCES, work.sequence.number, name, begin, duration, args))
    for kind in ("preempted", "finished"):
        for sequence_id in getattr(step, kind):
            if sequence_id in numbers:
                when = begin if kind == "preempted" else begin + duration
                mark = {"ph": "i", "s": "t", "pid": SEQUENCES, "tid": numbers[sequence_id], "ts": when, "name": kind}
                events.append(mark)
    blocks = {"in use": step.num_used, "cached and free": step.num_cached_free, "free": step.num_free}
    events.append({"ph": "C", "pid": ENGINE, "ts": begin, "name": "blocks", "args": blocks})
    return events


def _span(process: int, thread: int, name: str, begin: int, duration: int, args: dict) -> dict:
    return {"ph": "X", "pid": process, "tid": thread, "name": name, "ts": begin, "dur": duration, "args": args}
