"""Speculation as the engine sees it: guesses for a step, and what came of them."""

from __future__ import annotations

import time
from collections.abc import Callable

from minipaged.core.request import Request
from minipaged.core.scheduler_output import SchedulerOutput
from minipaged.sampling.sampler import SampledToken
from minipaged.sampling.speculative.adaptive import Candidate, LengthController
from minipaged.sampling.speculative.proposer import DraftWish, Proposer
from minipaged.sampling.state import SamplingState


class Speculator:
    """Guesses with a proposer, at lengths that pay.

    Args:
        proposer: where guesses come from.
        num_tokens: guesses for a sequence and step, at most.
        controller: chooses the lengths; ``None`` takes ``num_tokens`` always.

    Attributes:
        num_guessed: draft tokens that the target has verified.
        num_right: those that it sampled itself.
        num_verifications: times that the draft of a sequence was verified.
    """

    def __init__(self, proposer: Proposer, num_tokens: int, controller: LengthController | None = None):
        self.proposer = proposer
        self.controller = controller
        self.num_guessed = self.num_right = self.num_verifications = 0
        self._num_tokens = num_tokens
        self._requests: dict[str, Request] = {}  # those guessed for in this step
        self._seconds = 0.0

    def guess(
        self, running: list[Request], sampling_of: Callable[[Request], SamplingState | None]
    ) -> dict[str, list[int]]:
        """Draft tokens by request id, for the next step.

        Args:
            running: requests that the scheduler runs.
            sampling_of: how a request is sampled; ``None`` if it is not to be speculated on.
        """
        self._requests, self._seconds = {}, 0.0
        if self.controller is not None and self.controller.resting:
            return {}
        started = time.perf_counter()
        wishes = self._wishes(running, sampling_of)
        drafts = self.proposer.propose(wishes) if wishes else []
        self._requests = {wish.request.request_id: wish.request for wish in wishes}
        self._seconds = time.perf_counter() - started
        return {wish.request.request_id: draft for wish, draft in zip(wishes, drafts, strict=True) if draft}

    def _wishes(
        self, running: list[Request], sampling_of: Callable[[Request], SamplingState | None]
    ) -> list[DraftWish]:
        self.proposer.retain(set(running))
        wishes, num_sequences = [], 0
        for request in running:
            if request.num_tokens - request.num_computed_tokens != 1:
                continue  # a prompt, or a sequence that waits for others
            num_sequences += 1
            limit = min(self._num_tokens, request.max_total_tokens - 1 - request.num_tokens)
            sampling = sampling_of(request)
            if limit > 0 and sampling is not None:
                wishes.append(DraftWish(request, sampling, limit))
        if self.controller is not None:
            self.controller.retain(set(running))
            candidates = [Candidate(w.request, w.num_tokens, self.proposer.backlog(w.request)) for w in wishes]
            for wish, length in zip(wishes, self.controller.choose(candidates, num_sequences), strict=True):
                wish.num_tokens = length
        return [wish for wish in wishes if wish.num_tokens]

    def observe(self, plan: SchedulerOutput, sampled: dict[str, list[SampledToken]], seconds: float) -> None:
        """Learn from a step: what was sampled by request id, and how long it took without :meth:`guess`."""
        num_guessed = num_right = 0
        for sequence in plan.scheduled:
            guessed = sequence.num_lookahead_tokens
            if guessed:
                right = len(sampled[sequence.request_id]) - 1
                num_guessed += guessed
                num_right += right
                self.num_verifications += 1
                if self.controller is not None:
                    self.controller.observe_guesses(self._requests[sequence.request_id], guessed, right)
        self.num_guessed += num_guessed
        self.num_right += num_right
        if self.controller is None:
            return
        num_sequences = sum(sequence.samples for sequence in plan.scheduled)
        self.controller.observe_step(
            num_sequences,
            num_guessed,
            num_right,
            seconds=seconds,
            guessing=self._seconds,
            pure=plan.num_tokens == num_sequences + num_guessed,
        )

    def stats(self) -> dict[str, int]:
        """The fields of ``EngineStats`` about speculation."""
        return {
            "num_verifications": self.num_verifications,
            "num_tokens_guessed": self.num_guessed,
            "num_tokens_accepted": self.num_right,
        }

    def close(self) -> None:
        """Give back what the proposer holds."""
        self.proposer.close()
