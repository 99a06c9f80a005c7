"""A user's request as the engine sees it: a prompt and the sequences that continue it.

    SequenceGroup "r"           what the caller asked for; becomes one RequestOutput
      ├─ Sequence               one continuation: becomes one CompletionOutput
      │    request   "r"          what the scheduler knows of it: tokens, blocks
      │    sampling               what the sampler remembers of it
      │    output                 text, log-probabilities, the reason to stop
      └─ Sequence "r#1" …       forked from it; shares its blocks until they differ

The scheduler and the runner know single sequences only; the engine hands each sequence's sampled
tokens to its group, which decides what becomes of it.

Parallel sampling (``n`` > 1): the prompt is computed once, by the first sequence. From its last row
of logits one token is drawn for each continuation; then the others are forked from the first,
before any of the tokens is appended, and copy the partly filled last block when they first write.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from minipaged.core.request import Request
from minipaged.live_sequences import LiveSequences
from minipaged.model.tokenizer import Tokenizer
from minipaged.output_builder import OutputBuilder, logprob_entry
from minipaged.outputs import RequestMetrics, RequestOutput
from minipaged.sampling.sampler import SampledToken
from minipaged.sampling.seeds import choice_seed
from minipaged.sampling.state import SamplingState
from minipaged.sampling.step_logits import DrawOrder, PromptOrder, StepLogits


class Sequence:
    """One continuation of a group's prompt. ``request`` is ``None`` until it is forked, ``group`` once it has ended.

    ``order``: what is wanted of its row of logits where nothing is forked from it.
    """

    __slots__ = ("group", "request", "sampling", "output", "order")

    def __init__(self, group: SequenceGroup, request: Request | None, sampling: SamplingState, output: OutputBuilder):
        self.group = group
        self.request = request
        self.sampling = sampling
        self.output = output
        self.order = DrawOrder([sampling])


class SequenceGroup:
    """A request that was checked and may be submitted; nothing of the engine has changed yet.

    Args:
        request, sampling, output: those of its first sequence.
        prompt: the prompt's text, if it is known.
        stream: the caller wants an output for each new token, not only the last.
        live: the outputs share their lists with the request, which goes on: to be read at once, and not kept.

    Attributes:
        request_id: what the caller knows it by.
        sequences: its continuations, finished ones too.
        finished: whether every one of them is.
        stream: as given; but what is ranked before it is chosen (``best_of`` above ``n``) comes at the end.
        prompt_logprobs: one entry a prompt token as far as known, or ``None`` if not asked for.
    """

    __slots__ = (
        "request_id",
        "params",
        "prompt",
        "prompt_token_ids",
        "prompt_logprobs",
        "num_cached_tokens",
        "metrics",
        "error",
        "stream",
        "live",
        "finished",
        "sequences",
        "_unforked",
    )

    def __init__(
        self,
        request: Request,
        sampling: SamplingState,
        output: OutputBuilder,
        *,
        prompt: str | None,
        stream: bool,
        live: bool = False,
    ):
        self.request_id = request.request_id
        self.params = request.params
        self.prompt = prompt
        self.prompt_token_ids = request.prompt_token_ids
        self.prompt_logprobs: list | None = None if self.params.prompt_logprobs is None else [None]
        self.num_cached_tokens = 0
        self.metrics = RequestMetrics(arrival_time=time.monotonic())
        self.error: str | None = None
        self.stream = stream and self.params.num_sequences == self.params.n
        self.live = live
        self.finished = False
        self.sequences = [Sequence(self, request, sampling, output)]
        self._unforked: list[Sequence] = []
        self._add_siblings()

    def _add_siblings(self) -> None:
        """The other continuations, whose requests will be forked when the prompt is computed."""
        root = self.sequences[0]
        for index in range(1, self.params.num_sequences):
            sampling = root.sampling.fork(choice_seed(root.sampling.seed, index))
            self._unforked.append(Sequence(self, None, sampling, root.output.fork()))
        self.sequences += self._unforked

    # -- what a step does to it -------------------------------------------------------------------

    def note_scheduled(self, now: float) -> None:
        """A step that began at ``now`` was the first to work on one of the sequences."""
        self.metrics.first_scheduled_time = now
        self.num_cached_tokens = self.sequences[0].request.num_cached_tokens

    def note_sampled(self, now: float) -> None:
        """The tokens that :meth:`take` is about to get were sampled at ``now``."""
        if self.metrics.first_token_time is None:
            self.metrics.first_token_time = now
        self.metrics.last_token_time = now

    def order(self, sequence: Sequence) -> DrawOrder:
        """What is wanted of the sequence's row of logits."""
        if self._unforked:
            return DrawOrder([drawn.sampling for drawn in (sequence, *self._unforked)])
        return sequence.order

    def prompt_order(self) -> PromptOrder:
        """What is still wanted of the prompt's logits, if ``prompt_logprobs`` is not ``None``. (A preempted request
        computes its prompt again, and must not report it twice.)"""
        return PromptOrder(self.prompt_token_ids, self.params.prompt_logprobs, len(self.prompt_logprobs) - 1)

    def take_prompt_logprobs(self, logits: StepLogits, first: int, rows: slice, tokenizer: Tokenizer) -> None:
        """Add the entries for the prompt positions from ``first`` on, whose logits are ``rows``, that are not known
        yet. Raises :class:`~minipaged.errors.NumericalError` if the logits cannot be used."""
        known = len(self.prompt_logprobs) - 1
        new = range(rows.start + max(known - first, 0), rows.stop)
        targets = self.prompt_token_ids[known + 1 : known + 1 + len(new)]
        tokens = logits.prompt_logprobs(new, targets, self.params.prompt_logprobs)
        self.prompt_logprobs += [logprob_entry(token, tokenizer) for token in tokens]

    def take(self, sequence: Sequence, tokens: list[SampledToken], live: LiveSequences) -> None:
        """Go on with the tokens that were drawn, as :meth:`order` wanted them."""
        continuing = [sequence, *self._unforked]
        if self._unforked:
            for child in self._unforked:
                live.fork(sequence, child)
            self._unforked = []
        for member, token in zip(continuing, tokens, strict=True):
            live.append(member, token.token_id)
            member.sampling.append(token.token_id)
            member.output.append(token)
            if member.output.finish_reason is not None:
                live.finish(member)
                self._note_end()

    def fail(self, sequence: Sequence, error: str, live: LiveSequences) -> None:
        """End a sequence whose logits cannot be used, and those that were to be forked from it."""
        self.error = self.error or error
        self._drop([sequence, *self._unforked], "error", live)

    def abort(self, live: LiveSequences) -> None:
        """End what is not finished."""
        self._drop([sequence for sequence in self.sequences if not sequence.output.finished], "abort", live)

    def _drop(self, sequences: Iterable[Sequence], reason: str, live: LiveSequences) -> None:
        for sequence in sequences:
            live.drop(sequence)
            sequence.output.end(reason)
        self._note_end()

    def _note_end(self) -> None:
        self.finished = all(sequence.output.finished for sequence in self.sequences)
        if self.finished and self.metrics.finished_time is None:
            self.metrics.finished_time = time.monotonic()

    def let_go(self) -> None:
        """After the last output. Sequences that know their group hold it in a circle, and what lies in one keeps its
        memory until the garbage collector comes by, many requests later."""
        for sequence in self.sequences:
            sequence.group = None

    # -- what the caller sees ---------------------------------------------------------------------

    def build(self) -> RequestOutput:
        """A snapshot; each output's ``delta`` is the text that came since the last one."""
        outputs = [sequence.output.build(index, self.live) for index, sequence in enumerate(self.sequences)]
        if len(outputs) > 1:
            if not self.stream:
                outputs.sort(key=lambda output: -output.cumulative_logprob)
            outputs = outputs[: self.params.n]
        return self._result(outputs)

    def _result(self, outputs: list) -> RequestOutput:
        return RequestOutput(
            self.request_id,
            self.prompt,
            self.prompt_token_ids,
            outputs,
            self.finished,
            self.prompt_logprobs,
            self.num_cached_tokens,
            self.metrics,
            self.error,
        )
