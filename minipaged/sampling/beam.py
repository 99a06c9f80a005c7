"""Beam search: the likeliest continuations of each beam, and which beams go on.

The rules are those of Hugging Face transformers (version 5, ``GenerationMixin._beam_search``), so
that sequences and scores agree with it:

- the candidates of a step are the ``max(2, 1 + number of end tokens) * width`` best continuations
  over all beams, by cumulative log-probability;
- of the first ``width`` of them, those that end are hypotheses: kept, if among the ``width`` best by
  ``score = cumulative log-probability / generated length ** length_penalty``;
- the first ``width`` that do not end are the next beams.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from minipaged.config import SamplingParams
from minipaged.sampling.logprobs import likeliest, log_total, token_logprobs
from minipaged.sampling.sampler import DAMAGED, SampledToken, why_not_finite
from minipaged.sampling.state import SamplingState


@dataclass(slots=True)
class Continuation(SampledToken):
    """A token that may follow a beam; ``log_weight`` is what it adds to the beam's score, its
    log-probability after penalties and masks."""

    log_weight: float = 0.0


def continuations(row: np.ndarray, state: SamplingState, count: int) -> list[Continuation]:
    """The ``count`` likeliest tokens after a beam, best first; of equal ones the lower id first.

    As in transformers, logits become log-probabilities first, and penalties and masks edit those.

    Args:
        row: float32 logits ``[vocab]``, only read.
        state: of the beam; its processors are applied.
        count: how many; fewer are returned if the rest is masked.

    Returns:
        At least one entry; where none can be had, a single one with its ``error`` set.
    """
    if not np.isfinite(row).all():
        return [Continuation(-1, error=DAMAGED)]
    total = log_total(row)
    weights = row - np.float32(total)
    with np.errstate(over="ignore", invalid="ignore"):
        for processor in state.processors:
            processor.apply(weights, state.output_token_ids)
    largest = float(weights.max())
    if not np.isfinite(largest):
        return [Continuation(-1, error=why_not_finite(largest))]
    found = []
    for token_id in likeliest(weights, min(count, len(row))).tolist():
        if weights[token_id] == -np.inf:
            break
        token = Continuation(token_id, logprob=float(row[token_id]) - total, log_weight=float(weights[token_id]))
        if state.num_logprobs is not None:
            facts = token_logprobs(row, token_id, state.num_logprobs)
            token.rank, token.top = facts.rank, facts.top
        found.append(token)
    return found


@dataclass(slots=True)
class Candidate:
    """One way to go on: a beam, the token after it, and the cumulative score of both."""

    beam: Hashable
    token: Continuation
    score: float


class Ended(Protocol):
    """What a candidate becomes: it knows whether it ended."""

    finished: bool


class BeamSelection:
    """What a beam search remembers beside its beams.

    Args:
        params: ``beam_width``, ``length_penalty``, ``early_stopping`` and ``max_tokens`` (a number).
        num_end_tokens: token ids that end a beam.

    Attributes:
        hypotheses: ``(score, what ended)``, best first, at most ``beam_width``.
        done: no beam goes on.
    """

    def __init__(self, params: SamplingParams, num_end_tokens: int):
        self.params = params
        self.width = params.num_sequences
        # Enough that ``width`` beams go on even if each may end with each of the end tokens.
        self.num_candidates = max(2, 1 + num_end_tokens) * self.width
        self.hypotheses: list[tuple[float, Ended]] = []
        self.length = 0
        self.done = False

    def select(
        self, candidates: list[Candidate], extend: Callable[[Candidate], Ended]
    ) -> list[tuple[Candidate, Ended]]:
        """Go one token further.

        Args:
            candidates: the continuations of all beams; of equal scores the earlier is preferred.
            extend: makes of a candidate what may become a hypothesis; called as often as needed.

        Returns:
            The candidates that go on with what they became, best first; none once ``done``.
        """
        self.length += 1
        going_on, ended = [], []
        ranked = sorted(candidates, key=lambda candidate: -candidate.score)[: self.num_candidates]
        for rank, candidate in enumerate(ranked):
            if rank >= self.width and len(going_on) == self.width:
                break
            extended = extend(candidate)
            if not extended.finished:
                going_on.append((candidate, extended))
            elif rank < self.width:
                ended.append((self.normalised(candidate.score), extended))
        # A stable sort: of equal hypotheses the older stays.
        self.hypotheses = sorted(self.hypotheses + ended, key=lambda hypothesis: -hypothesis[0])[: self.width]
        self.done = not going_on or self._may_stop(going_on[0][0].score)
        return [] if self.done else going_on

    def normalised(self, score: float, length: int | None = None) -> float:
        """A cumulative score over the length (default: the present one) to the power of the penalty."""
        return score / (self.length if length is None else length) ** self.params.length_penalty

    def _may_stop(self, best: float) -> bool:
        """Whether there are enough hypotheses and none of the beams, the best of which has the
        score ``best``, is expected to become better than the worst of them."""
        if len(self.hypotheses) < self.width:
            return False
        if self.params.early_stopping is True:
            return True
        if self.params.early_stopping == "never" and self.params.length_penalty > 0:
            # Longer is better: suppose that the best beam loses nothing on its way to the end.
            return self.normalised(best, self.params.max_tokens) <= self.hypotheses[-1][0]
        return self.normalised(best) <= self.hypotheses[-1][0]
