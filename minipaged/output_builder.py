"""From sampled tokens to what the caller sees: text, log-probabilities, the reason to stop."""

from __future__ import annotations

import copy

from minipaged.config import SamplingParams
from minipaged.model.tokenizer import IncrementalDetokenizer, Tokenizer
from minipaged.outputs import CompletionOutput, Logprob
from minipaged.sampling.logprobs import TokenLogprobs
from minipaged.sampling.sampler import SampledToken
from minipaged.sampling.stop import StopChecker


class OutputBuilder:
    """Accumulates one sequence's tokens and decides when it is finished.

    The text given out never ends inside a UTF-8 character, never holds part of the prompt, and
    holds back what might be the beginning of a stop string.
    """

    __slots__ = (
        "params",
        "tokenizer",
        "token_ids",
        "text",
        "finish_reason",
        "stop_reason",
        "cumulative_logprob",
        "logprobs",
        "_eos_token_ids",
        "_end_token_ids",
        "_detokenizer",
        "_stop",
        "_max_tokens",
        "_given_out",
    )

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: list[int],
        tokenizer: Tokenizer,
        eos_token_ids: tuple[int, ...],
    ):
        ranked = params.num_sequences > 1 or params.use_beam_search
        self.params = params
        self.tokenizer = tokenizer
        self.token_ids: list[int] = []
        self.text = ""
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        # As in vLLM, log-probabilities cost a pass over the vocabulary and are made on request only.
        self.cumulative_logprob: float | None = 0.0 if ranked or params.logprobs is not None else None
        self.logprobs: list[dict[int, Logprob]] | None = None if params.logprobs is None else []
        self._eos_token_ids = frozenset() if params.ignore_eos else frozenset(eos_token_ids)
        self._end_token_ids = self._eos_token_ids.union(params.stop_token_ids)
        self._detokenizer = IncrementalDetokenizer(
            tokenizer, prompt_token_ids, skip_special_tokens=params.skip_special_tokens
        )
        self._stop = StopChecker(params.stop, params.include_stop_str_in_output) if params.stop else None
        self._max_tokens = params.max_tokens
        self._given_out = 0

    @property
    def num_end_tokens(self) -> int:
        """Token ids that end the text."""
        return len(self._end_token_ids)

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def append(self, sampled: SampledToken) -> None:
        """Take one sampled token; sets ``finish_reason`` if it ends the sequence."""
        token_id = sampled.token_id
        self.token_ids.append(token_id)
        if self.cumulative_logprob is not None:
            self.cumulative_logprob += sampled.logprob
        if self.logprobs is not None:
            self.logprobs.append(logprob_entry(sampled, self.tokenizer))

        if token_id in self._end_token_ids:
            if token_id not in self._eos_token_ids:
                self.stop_reason = token_id
            self._finish("stop", last=[token_id] if self.params.include_stop_str_in_output else ())
        else:
            self._push(self._detokenizer.push(token_id))
            if self.finish_reason is None and len(self.token_ids) >= self._max_tokens:
                self._finish("length")

    def fork(self) -> OutputBuilder:
        """A copy with the same past and its own future."""
        twin = copy.copy(self)
        twin.token_ids = self.token_ids.copy()
        twin.logprobs = None if self.logprobs is None else self.logprobs.copy()
        twin._detokenizer = self._detokenizer.fork()
        twin._stop = self._stop and self._stop.fork()
        return twin

    def end(self, reason: str) -> None:
        """End from outside: ``"abort"`` or ``"error"``."""
        self._finish(reason)

    def build(self, index: int, live: bool = False) -> CompletionOutput:
        """A snapshot; ``delta`` is the text that came since the last one.

        Its lists are copies while the sequence goes on, unless it is ``live``: to touch all tokens so far at each
        new one takes longer than anything else that is done for it.
        """
        share = live or self.finish_reason is not None
        delta, self._given_out = self.text[self._given_out :], len(self.text)
        return CompletionOutput(
            index,
            self.text,
            self.token_ids if share else self.token_ids.copy(),
            self.cumulative_logprob,
            self.logprobs if share or self.logprobs is None else self.logprobs.copy(),
            self.finish_reason,
            self.stop_reason,
            delta,
        )

    def _push(self, text: str) -> None:
        # Below min_tokens neither stop token ids (the sampler masks them) nor stop strings end the text.
        if self._stop is None or len(self.token_ids) <= self.params.min_tokens:
            self.text += text
            return
        emitted, stop_string = self._stop.push(text)
        self.text += emitted
        if stop_string is not None:
            self.finish_reason = "stop"
            self.stop_reason = stop_string

    def _finish(self, reason: str, last=()) -> None:
        """Give out what was held back. A stop string completed by it still ends the text."""
        rest = self._detokenizer.append(list(last)) if last else ""
        self._push(rest + self._detokenizer.flush())
        if not self.finished:
            self.text += self._stop.flush() if self._stop else ""
            self.finish_reason = reason


def logprob_entry(token: SampledToken | TokenLogprobs, tokenizer: Tokenizer) -> dict[int, Logprob]:
    """The token's log-probability and those of the likeliest, by token id."""
    text = tokenizer.token_text
    entry = {
        int(token_id): Logprob(float(logprob), rank, text(int(token_id)))
        for rank, (token_id, logprob) in enumerate(zip(*token.top, strict=True), start=1)
    }
    entry.setdefault(token.token_id, Logprob(token.logprob, token.rank, text(token.token_id)))
    return entry
