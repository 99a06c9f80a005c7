"""How many tokens to guess for each sequence: as many as pay, judged by what was measured.

Two things are learned while running. How often a sequence's guesses are right (:class:`Acceptance`),
and what a step and a round of guessing cost in seconds (:class:`LinearCost`). A sequence whose guesses
are right with chance ``a`` gains from its j-th guess ``a ** j`` tokens: the guesses before must be
right too. So guesses are added, depth by depth, while the tokens that they promise are worth more
than their time, at the price of a token in this very step:

    depth 1   ●  ●  ●  ●     gain Σ a_i       pays       cost of a depth: one draft round,
    depth 2   ●  ●     ●     gain Σ a_i²      pays       one more row of the target for each ●
    depth 3   ○              gain Σ a_i³      does not

Measurements may mislead, and testing whether guessing pays costs time. Therefore a purse: guessing
is paid from it, tokens won flow into it, and so does a small share of all time. While it is empty
nothing is guessed, which bounds what speculation can ever lose to ``ALLOWANCE`` of the time and
``FIRST_STEPS`` steps.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from minipaged.core.request import Request
from minipaged.sampling.speculative.cost import LinearCost
from minipaged.sampling.speculative.proposer import Proposer

OPTIMISM = 0.9  # what the chance of a right guess is taken to be before anything is known
PRIOR_WEIGHT = 3.0  # how many guesses that counts for, or what is known of other sequences
REMEMBER_GUESSES = 0.95  # weight of earlier guesses, after each step that verified some
REMEMBER_STEPS = 0.98  # after each step without: what failed long ago is tried again
PLAIN_STEPS = 3  # first of all, to know what a plain step costs
PLAIN_EVERY = 32  # and again after so many speculative ones, for the cost of plain ones changes
FIRST_LIMIT = 2  # guesses for a sequence while it is not known what they cost
LEAST_GAIN = 1.05  # a step must promise so many times the tokens a second: choosing and verifying take time too
ALLOWANCE = 0.01  # share of all time that may be lost by speculating
FIRST_STEPS = 3  # plain steps' worth of time that may be lost at first
FULL_STEPS = 64  # what the purse holds at most
FIRST_REST, LONGEST_REST = 4, 64  # steps until guessing is considered again where it did not pay; doubles
LONGEST_PAUSE = 16  # the same where nothing was found to propose: text may begin to repeat itself at any token


class Acceptance:
    """The chance that a guess is right, from recent guesses and those of all sequences (``overall``)."""

    def __init__(self, overall: Acceptance | None = None) -> None:
        self._overall = overall
        self._right = self._wrong = 0.0

    @property
    def rate(self) -> float:
        """The chance, between 0 and 1; it forgets, and nears ``OPTIMISM`` again, while nothing is guessed."""
        expected = OPTIMISM if self._overall is None else self._overall.rate
        return (self._right + expected * PRIOR_WEIGHT) / (self._right + self._wrong + PRIOR_WEIGHT)

    def observe(self, num_guessed: int, num_right: int) -> None:
        """The first ``num_right`` of some guesses were right, then one was wrong (or none, if all were right)."""
        self.fade(REMEMBER_GUESSES)
        self._right += num_right
        self._wrong += num_right < num_guessed

    def fade(self, factor: float) -> None:
        """Count all that was seen ``factor`` times."""
        self._right *= factor
        self._wrong *= factor


@dataclass(slots=True)
class Candidate:
    """A sequence that may be speculated on: at most ``limit`` tokens, after computing ``backlog`` for the draft."""

    request: Request
    limit: int
    backlog: int


class LengthController:
    """Chooses draft lengths for each step, and learns from what came of them.

    Args:
        proposer: knows what a round of guessing costs, and whether each further token costs another.

    Attributes:
        step_cost: seconds of a step, without guessing, over its rows.
        purse: seconds that may still be lost.
        resting: steps to come in which nothing is considered.
    """

    def __init__(self, proposer: Proposer):
        self.step_cost = LinearCost()
        self.purse = 0.0
        self.resting = 0
        self._rest, self._rested = FIRST_REST, 0  # how long the next rest is; steps of the present one
        self._pause = 1  # how long the next one is if nothing is found to propose
        self._proposer = proposer
        self._overall = Acceptance()
        self._acceptances: dict[Request, Acceptance] = {}
        self._just_guessed: set[Request] = set()
        self._num_speculative = 0  # steps since a plain one

    # -- choosing ---------------------------------------------------------------------------------

    def choose(self, candidates: list[Candidate], num_sequences: int) -> list[int]:
        """The number of tokens to guess for each candidate, given that ``num_sequences`` get one anyway."""
        lengths = [0] * len(candidates)
        if not candidates or self.step_cost.num_observed < PLAIN_STEPS or self._num_speculative >= PLAIN_EVERY:
            return lengths
        if self.purse > 0:
            lengths = self._best_lengths(candidates, num_sequences)
        if any(lengths):
            self._rest = FIRST_REST
        else:
            self.resting, self._rested = self._rest, 0
            self._rest = min(2 * self._rest, LONGEST_REST)
        return lengths

    def find_nothing(self) -> None:
        """The proposer had nothing to propose: looking takes time too, so look less often for a while."""
        if self.step_cost.num_observed >= PLAIN_STEPS:
            self.resting, self._rested = self._pause, 0
            self._pause = min(2 * self._pause, LONGEST_PAUSE)

    def _best_lengths(self, candidates: list[Candidate], num_sequences: int) -> list[int]:
        rates = [self._acceptance(candidate.request).rate for candidate in candidates]
        affordable = self._affordable(candidates)
        seconds = self.step_cost(num_sequences)
        best, value = [0] * len(candidates), LEAST_GAIN * num_sequences / seconds  # tokens a second
        while True:  # Dinkelbach 1967: maximise a ratio by pricing its denominator at the best ratio so far
            lengths, gain, cost = self._worthwhile(rates, affordable, value)
            new_value = (num_sequences + gain) / (seconds + cost)
            if new_value <= value:
                return best
            best, value = lengths, new_value

    def _affordable(self, candidates: list[Candidate]) -> list[int]:
        """Limits, with 0 for those whose backlog the purse does not cover, the longest backlogs first."""
        limits = [0] * len(candidates)
        left = self.purse
        for i in sorted(range(len(candidates)), key=lambda i: candidates[i].backlog):
            left -= candidates[i].backlog * self._draft_seconds()[1]
            if left < 0:
                break
            limits[i] = candidates[i].limit if self._proposer.cost.known else min(candidates[i].limit, FIRST_LIMIT)
        return limits

    def _draft_seconds(self) -> tuple[float, float]:
        """Seconds of a round of guessing: the fixed part, and for each row."""
        cost, share = self._proposer.cost, self._proposer.cost_share
        if cost.known:
            return cost.fixed, cost.per_row
        return share * self.step_cost.fixed, share * self.step_cost.per_row

    def _worthwhile(self, rates: list[float], limits: list[int], value: float) -> tuple[list[int], float, float]:
        """Lengths that pay where a second is worth ``value`` tokens; tokens expected, seconds they cost."""
        lengths = [0] * len(rates)
        best, best_net = (lengths.copy(), 0.0, 0.0), 0.0
        deepest: Iterable[int] = range(len(rates))  # sequences that have a guess of every depth so far
        reached = rates.copy()  # chance that a sequence's guess of this depth is kept
        gain = cost = 0.0
        draft_fixed, draft_row = self._draft_seconds()
        for depth in range(max(limits, default=0)):
            is_round = self._proposer.round_each_token or depth == 0
            row_cost = self.step_cost.per_row + draft_row * is_round
            chosen = [i for i in deepest if depth < limits[i] and reached[i] > value * row_cost]
            if not chosen:
                break
            gain += sum(reached[i] for i in chosen)
            cost += len(chosen) * row_cost + draft_fixed * is_round
            for i in chosen:
                lengths[i] = depth + 1
                reached[i] *= rates[i]
            deepest = chosen
            if gain - value * cost > best_net:
                best, best_net = (lengths.copy(), gain, cost), gain - value * cost
        return best

    # -- learning ---------------------------------------------------------------------------------

    def observe_guesses(self, request: Request, num_guessed: int, num_right: int) -> None:
        """A step verified ``num_guessed`` tokens of ``request``, and kept the first ``num_right``."""
        if num_right:
            self._pause = 1
        self._acceptance(request).observe(num_guessed, num_right)
        self._overall.observe(num_guessed, num_right)
        self._just_guessed.add(request)

    def observe_step(
        self, num_sequences: int, num_guessed: int, num_right: int, *, seconds: float, guessing: float, pure: bool
    ) -> None:
        """A step was done.

        Args:
            num_sequences: sequences that got a token, each at least one.
            num_guessed: rows that verified guesses, in all sequences together.
            num_right: of these, those that gave a token.
            seconds: time of the step without guessing.
            guessing: seconds spent on guessing for it.
            pure: whether no row but these was computed (no chunk of a prompt).
        """
        if pure and num_sequences:
            is_first = self.step_cost.num_observed < PLAIN_STEPS
            seconds = self.step_cost.observe(num_sequences + num_guessed, seconds)
            if is_first:  # again with each, for the one before may have been disturbed
                self.purse = FIRST_STEPS * self.step_cost(num_sequences)
            self._num_speculative = self._num_speculative + 1 if num_guessed else 0
        self.purse += ALLOWANCE * (seconds + guessing) - guessing
        if num_sequences:
            plain = self.step_cost(num_sequences)
            self.purse += num_right * plain / num_sequences - num_guessed * self.step_cost.per_row
            self.purse = min(self.purse, FULL_STEPS * plain)
        self._forget(REMEMBER_STEPS)
        self._just_guessed.clear()

    def rest(self, seconds: float) -> None:
        """A step was done in which nothing was considered."""
        self.resting -= 1
        self._rested += 1
        self.purse += ALLOWANCE * seconds
        if not self.resting:
            self._forget(REMEMBER_STEPS**self._rested)

    def _forget(self, factor: float) -> None:
        """Nothing was learned in this step about some sequences, or about any."""
        for request, acceptance in self._acceptances.items():
            if request not in self._just_guessed:
                acceptance.fade(factor)
        if not self._just_guessed:
            self._overall.fade(factor)

    def retain(self, requests: Collection[Request]) -> None:
        """Forget every request but these."""
        for request in self._acceptances.keys() - requests:
            del self._acceptances[request]

    def _acceptance(self, request: Request) -> Acceptance:
        if request not in self._acceptances:
            self._acceptances[request] = Acceptance(self._overall)
        return self._acceptances[request]
