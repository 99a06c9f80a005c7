"""Speculation as the engine sees it: guesses for a step, and what came of them."""

from __future__ import annotations

from collections.abc import Callable

from minipaged.core.request import Request
from minipaged.core.scheduler_output import SchedulerOutput
from minipaged.sampling.sampler import SampledToken
from minipaged.sampling.speculative.adaptive import Candidate, LengthController
from minipaged.sampling.speculative.proposer import DraftWish, Proposer
from minipaged.sampling.speculative.verification import Guess, verify
from minipaged.sampling.state import SamplingState
from minipaged.sampling.step_logits import StepLogits


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
        self._running: list[Request] = []
        self._wishes: dict[str, DraftWish] = {}  # granted in this step
        self._accepted: dict[str, int] = {}
        self._considered = False
        self._seconds = 0.0

    def guess(
        self, running: list[Request], sampling_of: Callable[[Request], SamplingState | None]
    ) -> dict[str, list[int]]:
        """Draft tokens by request id, for the next step.

        Args:
            running: requests that the scheduler runs.
            sampling_of: how a request is sampled; ``None`` if it is not to be speculated on.
        """
        self._wishes, self._accepted, self._seconds = {}, {}, 0.0
        self._considered = self.controller is None or not self.controller.resting
        if not self._considered:
            return {}
        before = self.proposer.seconds
        self._retain(running)
        wishes, num_sequences = self._all_wishes(running, sampling_of)
        if self.proposer.round_each_token:  # each guess takes time: ask for no more than pay
            wishes = self._worthwhile(wishes, num_sequences)
            drafts = self.proposer.propose(wishes)
        else:  # guesses are cheap: look which there are, and verify no more than pay
            drafts = self.proposer.propose(wishes)
            for wish, draft in zip(wishes, drafts, strict=True):
                wish.num_tokens = len(draft)
            found = {wish.request: draft for wish, draft in zip(wishes, drafts, strict=True) if draft}
            if wishes and not found and self.controller is not None:
                self.controller.find_nothing()
            wishes = self._worthwhile([wish for wish in wishes if wish.num_tokens], num_sequences)
            drafts = [found[wish.request][: wish.num_tokens] for wish in wishes]
        self._wishes = {wish.request.request_id: wish for wish in wishes}
        self._seconds = self.proposer.seconds - before
        return {wish.request.request_id: draft for wish, draft in zip(wishes, drafts, strict=True) if draft}

    def _retain(self, running: list[Request]) -> None:
        """Forget what does not run any more."""
        if running != self._running:
            self._running = running.copy()
            self.proposer.retain(set(running))
            if self.controller is not None:
                self.controller.retain(set(running))

    def _all_wishes(
        self, running: list[Request], sampling_of: Callable[[Request], SamplingState | None]
    ) -> tuple[list[DraftWish], int]:
        """Sequences that may be speculated on, at full length; and how many decode in all."""
        wishes, num_sequences = [], 0
        for request in running:
            if request.num_tokens - request.num_computed_tokens != 1:
                continue  # a prompt, or a sequence that waits for others
            num_sequences += 1
            limit = min(self._num_tokens, request.max_total_tokens - 1 - request.num_tokens)
            sampling = sampling_of(request)
            if limit > 0 and sampling is not None:
                wishes.append(DraftWish(request, sampling, limit))
        return wishes, num_sequences

    def _worthwhile(self, wishes: list[DraftWish], num_sequences: int) -> list[DraftWish]:
        """Wishes cut to the lengths that the controller chooses, without those it leaves nothing of."""
        if self.controller is None or not wishes:
            return wishes
        candidates = [Candidate(w.request, w.num_tokens, self.proposer.backlog(w.request)) for w in wishes]
        for wish, length in zip(wishes, self.controller.choose(candidates, num_sequences), strict=True):
            wish.num_tokens = length
        return [wish for wish in wishes if wish.num_tokens]

    def verify(self, plan: SchedulerOutput, logits: StepLogits, drawn: dict[str, list[SampledToken]]) -> dict[str, int]:
        """Add to the tokens ``drawn``, by request id, those that follow draft tokens that were right.

        Returns the number of draft tokens that were right, by request id.
        """
        sampling = [sequence for sequence in plan.scheduled if sequence.samples]
        guesses: dict[str, Guess] = {}
        for sequence, row in zip(sampling, logits.sample_rows, strict=True):
            name, count = sequence.request_id, sequence.num_lookahead_tokens
            if count and drawn[name][0].error is None:
                wish = self._wishes[name]
                guesses[name] = Guess(int(row), sequence.token_ids[-count:], wish.sampling, drawn[name])
        verify(logits.draw, list(guesses.values()))
        self._accepted = {name: len(guess.tokens) - 1 for name, guess in guesses.items()}
        return self._accepted

    def observe(self, plan: SchedulerOutput, seconds: float) -> None:
        """Learn from a step that was verified, and how long it took without :meth:`guess`."""
        if not self._considered:
            self.controller.rest(seconds)
            return
        num_guessed = sum(sequence.num_lookahead_tokens for sequence in plan.scheduled)
        num_right = sum(self._accepted.values())
        self.num_guessed += num_guessed
        self.num_right += num_right
        self.num_verifications += len(self._accepted)
        if self.controller is None:
            return
        for sequence in plan.scheduled:
            name, guessed = sequence.request_id, sequence.num_lookahead_tokens
            if name in self._accepted:
                self.controller.observe_guesses(self._wishes[name].request, guessed, self._accepted[name])
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
