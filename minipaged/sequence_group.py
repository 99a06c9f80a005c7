"""A user's request as the engine sees it: a prompt and the sequences that continue it.

    SequenceGroup "r"           what the caller asked for; becomes one RequestOutput
      ├─ Sequence               one continuation: becomes one CompletionOutput
      │    request   "r"          what the scheduler knows of it: tokens, blocks
      │    sampling               what the sampler remembers of it
      │    output                 text, log-probabilities, the reason to stop
      └─ Sequence "r#1" …       forked from it; shares its blocks until they differ

The scheduler and the runner know single sequences only; the engine hands each sequence's sampled
tokens to its group, which decides what becomes of it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from minipaged.core.request import Request
from minipaged.core.scheduler import Scheduler
from minipaged.output_builder import OutputBuilder
from minipaged.outputs import RequestMetrics, RequestOutput
from minipaged.sampling.sampler import SampledToken
from minipaged.sampling.state import SamplingState


class Sequence:
    """One continuation of a group's prompt."""

    __slots__ = ("group", "index", "request", "sampling", "output")

    def __init__(
        self, group: SequenceGroup, index: int, request: Request, sampling: SamplingState, output: OutputBuilder
    ):
        self.group = group
        self.index = index
        self.request = request
        self.sampling = sampling
        self.output = output


class SequenceGroup:
    """A request that was checked and may be submitted; nothing of the engine has changed yet.

    Args:
        request, sampling, output: those of its first sequence.
        prompt: the prompt's text, if it is known.
        stream: the caller wants an output for each new token, not only the last.

    Attributes:
        request_id: what the caller knows it by.
        sequences: its continuations, finished ones too.
        prompt_logprobs: one entry a prompt token as far as known, or ``None`` if not asked for.
    """

    def __init__(
        self, request: Request, sampling: SamplingState, output: OutputBuilder, *, prompt: str | None, stream: bool
    ):
        self.request_id = request.request_id
        self.params = request.params
        self.prompt = prompt
        self.prompt_token_ids = request.prompt_token_ids
        self.stream = stream
        self.sequences = [Sequence(self, 0, request, sampling, output)]
        self.prompt_logprobs: list | None = None if request.params.prompt_logprobs is None else [None]
        self.num_cached_tokens = 0
        self.metrics = RequestMetrics(arrival_time=time.monotonic())
        self.error: str | None = None

    @property
    def finished(self) -> bool:
        """Whether every sequence is."""
        return all(sequence.output.finished for sequence in self.sequences)

    def unfinished(self) -> list[Sequence]:
        """The sequences that the scheduler still knows."""
        return [sequence for sequence in self.sequences if not sequence.output.finished]

    # -- what a step does to it -------------------------------------------------------------------

    def note_scheduled(self, now: float) -> None:
        """A step that began at ``now`` worked on one of the sequences."""
        if self.metrics.first_scheduled_time is None:
            self.metrics.first_scheduled_time = now
            self.num_cached_tokens = self.sequences[0].request.num_cached_tokens

    def states(self, sequence: Sequence) -> list[SamplingState]:
        """For each token to draw from the sequence's row of logits, the state to draw it with."""
        return [sequence.sampling]

    def take(self, sequence: Sequence, tokens: list[SampledToken], scheduler: Scheduler) -> None:
        """Hand a sequence the tokens that were drawn, one for each of :meth:`states`; those without
        an error were given to the scheduler already."""
        (token,) = tokens
        if self.metrics.first_token_time is None:
            self.metrics.first_token_time = time.monotonic()
        sequence.sampling.append(token.token_id)
        sequence.output.append(token)
        if sequence.output.finished:
            scheduler.finish(sequence.request.request_id)
            self._note_ends()

    def fail(self, sequence: Sequence, error: str, scheduler: Scheduler) -> None:
        """End a sequence whose logits cannot be used."""
        self.error = self.error or error
        self._drop([sequence], "error", scheduler)

    def abort(self, scheduler: Scheduler) -> None:
        """End what is not finished."""
        self._drop(self.unfinished(), "abort", scheduler)

    def _drop(self, sequences: Iterable[Sequence], reason: str, scheduler: Scheduler) -> None:
        for sequence in sequences:
            scheduler.abort(sequence.request.request_id)
            sequence.output.end(reason)
        self._note_ends()

    def _note_ends(self) -> None:
        if self.finished:
            self.metrics.finished_time = time.monotonic()
            self.metrics.num_preemptions = sum(sequence.request.num_preemptions for sequence in self.sequences)

    # -- what the caller sees ---------------------------------------------------------------------

    def build(self) -> RequestOutput:
        """A snapshot; each output's ``delta`` is the text that came since the last one."""
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=[sequence.output.build(sequence.index) for sequence in self.sequences],
            finished=self.finished,
            prompt_logprobs=self.prompt_logprobs,
            num_cached_tokens=self.num_cached_tokens,
            metrics=self.metrics,
            error=self.error,
        )
