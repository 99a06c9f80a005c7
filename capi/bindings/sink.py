"""From the engine's outputs to the records of the C side."""

from __future__ import annotations

import _minipaged_native as native
from _minipaged_capi import ffi
from minipaged_capi.options import NUMERICAL, OK, explain

FINISH_REASONS = {None: 0, "stop": 1, "length": 2, "abort": 3, "error": 4}


class Sink:
    """Takes a request's outputs on the engine's thread, and puts what is new into its record."""

    __slots__ = ("engine", "number", "known", "ended")

    def __init__(self, engine, number: int):
        self.engine = int(ffi.cast("uintptr_t", engine))
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
        native.end(self.engine, self.number, status, text, 0, 0, 0, 0, 0)

    def deliver(self, output) -> None:
        metrics = output.metrics
        for index, choice in enumerate(output.outputs):  # what is ranked has other numbers inside
            self.push(index, choice, nanoseconds(metrics.last_token_time), tell=not output.finished)
        if not output.finished:
            return
        if output.prompt_logprobs:
            self.push_logprobs(-1, output.prompt_token_ids, output.prompt_logprobs)
        error = (output.error or "").encode()
        native.end(
            self.engine,
            self.number,
            NUMERICAL if error else OK,
            error,
            len(output.prompt_token_ids),
            output.num_cached_tokens,
            metrics.num_preemptions,
            nanoseconds(metrics.first_scheduled_time),
            nanoseconds(metrics.first_token_time),
        )

    def push(self, index: int, choice, sampled_ns: int, tell: bool) -> None:
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
            native.push(self.engine, self.number, index, new, text, sampled_ns, tell)

    def end(self, index: int, choice) -> None:
        self.ended.add(index)
        stop = choice.stop_reason
        string = stop.encode() if isinstance(stop, str) else b""
        native.end_choice(
            self.engine,
            self.number,
            index,
            FINISH_REASONS[choice.finish_reason],
            stop if isinstance(stop, int) else -1,
            string,
            choice.logprobs is not None,
            choice.cumulative_logprob or 0.0,
            getattr(choice, "beam_score", None) or 0.0,
        )

    def push_logprobs(self, index: int, token_ids, entries) -> None:
        found, counts = [], []
        for token_id, entry in zip(token_ids, entries, strict=True):
            # The token that is there comes first, then the others by rank.
            ranked = sorted((entry or {}).items(), key=lambda item: (item[0] != token_id, item[1].rank))
            found += [(other, logprob.rank, logprob.logprob) for other, logprob in ranked]
            counts.append(len(ranked))
        native.push_logprobs(self.engine, self.number, index, found, counts)


def nanoseconds(seconds: float | None) -> int:
    return 0 if seconds is None else round(seconds * 1e9)
