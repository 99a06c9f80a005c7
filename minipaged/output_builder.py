"""From sampled tokens to what the caller sees: text, log-probabilities, the reason to stop."""

from __future__ import annotations

import time

from minipaged.config import SamplingParams
from minipaged.model.tokenizer import IncrementalDetokenizer, Tokenizer
from minipaged.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from minipaged.sampling.sampler import SampledToken
from minipaged.sampling.stop import StopChecker


class OutputBuilder:
    """Accumulates one request's tokens and decides when it is finished.

    The text given out never ends inside a UTF-8 character, never holds part of the prompt, and
    holds back what might be the beginning of a stop string.
    """

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        tokenizer: Tokenizer,
        eos_token_ids: tuple[int, ...],
    ):
        self.request_id = request_id
        self.prompt = prompt
        self.prompt_token_ids = prompt_token_ids
        self.params = params
        self.tokenizer = tokenizer
        self.metrics = RequestMetrics(arrival_time=time.monotonic())
        self.num_cached_tokens = 0
        self.token_ids: list[int] = []
        self.text = ""
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.error: str | None = None
        # As in vLLM, log-probabilities cost a pass over the vocabulary and are made on request only.
        self.cumulative_logprob: float | None = None if params.logprobs is None else 0.0
        self.logprobs: list[dict[int, Logprob]] | None = None if params.logprobs is None else []
        self.prompt_logprobs: list | None = None if params.prompt_logprobs is None else [None]
        self._eos_token_ids = frozenset() if params.ignore_eos else frozenset(eos_token_ids)
        self._stop_token_ids = frozenset(params.stop_token_ids)
        self._detokenizer = IncrementalDetokenizer(
            tokenizer, prompt_token_ids, skip_special_tokens=params.skip_special_tokens
        )
        self._stop = StopChecker(params.stop, params.include_stop_str_in_output)
        self._given_out = 0

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def append(self, sampled: SampledToken) -> None:
        """Take one sampled token; sets ``finish_reason`` if it ends the request."""
        token_id = sampled.token_id
        self.token_ids.append(token_id)
        if self.metrics.first_token_time is None:
            self.metrics.first_token_time = time.monotonic()
        if self.logprobs is not None:
            self.cumulative_logprob += sampled.logprob
            self.logprobs.append(self.logprob_entry(sampled))

        # Below min_tokens neither these ids (the sampler masks them) nor stop strings end the text.
        may_stop = len(self.token_ids) > self.params.min_tokens
        if token_id in self._eos_token_ids or token_id in self._stop_token_ids:
            if token_id not in self._eos_token_ids:
                self.stop_reason = token_id
            self._finish("stop", last=[token_id] if self.params.include_stop_str_in_output else ())
        else:
            self._push(self._detokenizer.append([token_id]), may_stop)
            if not self.finished and len(self.token_ids) >= self.params.max_tokens:
                self._finish("length")

    def add_prompt_logprobs(self, entries: list[dict[int, Logprob]]) -> None:
        """Take the log-probabilities of the next prompt tokens, in order."""
        self.prompt_logprobs.extend(entries)

    def logprob_entry(self, sampled: SampledToken) -> dict[int, Logprob]:
        """The chosen token's log-probability and those of the likeliest, by token id."""
        text = self.tokenizer.token_text
        entry = {
            int(token_id): Logprob(float(logprob), rank, text(int(token_id)))
            for rank, (token_id, logprob) in enumerate(zip(*sampled.top, strict=True), start=1)
        }
        entry.setdefault(sampled.token_id, Logprob(sampled.logprob, sampled.rank, text(sampled.token_id)))
        return entry

    def end(self, reason: str, error: str | None = None) -> None:
        """End from outside: ``"abort"`` or ``"error"`` with its text."""
        self.error = error
        self._finish(reason)

    def build(self) -> RequestOutput:
        """A snapshot; ``delta`` is the text that came since the last one."""
        delta, self._given_out = self.text[self._given_out :], len(self.text)
        completion = CompletionOutput(
            index=0,
            text=self.text,
            token_ids=list(self.token_ids),
            cumulative_logprob=self.cumulative_logprob,
            logprobs=None if self.logprobs is None else list(self.logprobs),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            delta=delta,
        )
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=[completion],
            finished=self.finished,
            prompt_logprobs=self.prompt_logprobs,
            num_cached_tokens=self.num_cached_tokens,
            metrics=self.metrics,
            error=self.error,
        )

    def _push(self, text: str, may_stop: bool) -> None:
        if not may_stop:
            self.text += text
            return
        emitted, stop_string = self._stop.push(text)
        self.text += emitted
        if stop_string is not None:
            self.finish_reason = "stop"
            self.stop_reason = stop_string
            self.metrics.finished_time = time.monotonic()

    def _finish(self, reason: str, last=()) -> None:
        """Give out what was held back. A stop string completed by it still ends the text."""
        rest = self._detokenizer.append(list(last)) if last else ""
        self._push(rest + self._detokenizer.flush(), may_stop=len(self.token_ids) > self.params.min_tokens)
        if not self.finished:
            self.text += self._stop.flush()
            self.finish_reason = reason
            self.metrics.finished_time = time.monotonic()
