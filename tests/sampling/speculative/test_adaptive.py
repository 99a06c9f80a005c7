"""Draft lengths follow what pays, and what speculation can lose is bounded."""

import itertools
import random

import pytest

from minipaged.config import SamplingParams
from minipaged.core.request import Request
from minipaged.sampling.speculative.adaptive import OPTIMISM, Acceptance, Candidate, LengthController
from minipaged.sampling.speculative.cost import LinearCost


def test_a_line_is_learned():
    cost, rng = LinearCost(), random.Random(0)
    for _ in range(200):
        rows = rng.randint(1, 20)
        cost.observe(rows, (5 + 0.5 * rows) * rng.uniform(0.95, 1.05))
    assert cost.fixed == pytest.approx(5, rel=0.1)
    assert cost.per_row == pytest.approx(0.5, rel=0.1)


def test_what_a_line_cannot_know_is_guessed_between_free_and_proportional():
    cost = LinearCost()
    for _ in range(10):
        cost.observe(4, 2.0)
    assert cost(4) == pytest.approx(2)
    assert 0 < cost.per_row < 0.5
    cost.observe(8, 4.0)
    assert cost(8) > 3  # one other observation outweighs the guess


def test_a_stalled_step_changes_little():
    cost = LinearCost()
    for rows in range(1, 11):
        cost.observe(rows, 1.0)
    cost.observe(5, 1000.0)
    assert cost(5) < 1.4


@pytest.mark.parametrize("stalled", [{0}, {1}, {0, 1}])
def test_steps_that_stalled_at_first_are_forgotten(stalled):
    cost = LinearCost()
    for number in range(3):
        cost.observe(4, 500.0 if number in stalled else 1.0)
    assert cost(4) < 1.3 and cost.num_observed == 3


def test_acceptance_learns_and_forgets():
    overall = Acceptance()
    own = Acceptance(overall)
    assert own.rate == OPTIMISM
    for _ in range(50):
        own.observe(3, 0)
    assert own.rate < 0.15
    for _ in range(300):
        own.fade(0.98)
    assert own.rate > 0.8 * OPTIMISM
    for _ in range(50):
        overall.observe(4, 0)
    assert Acceptance(overall).rate < 0.15  # a new sequence is expected to be like the others


class World:
    """Time passes as told: a step costs ``fixed + per_row * rows``, a draft round likewise."""

    def __init__(self, *, step=(10.0, 0.5), draft=(0.0, 0.0), each_token=False, noise=0.0, num_sequences=1, seed=0):
        self.rng = random.Random(seed)
        self.step, self.draft, self.noise = step, draft, noise
        self.cost, self.cost_share, self.round_each_token = LinearCost(), 0.0, each_token
        self.controller = LengthController(self)
        self.requests = [Request(str(i), [1], SamplingParams()) for i in range(num_sequences)]
        self.seconds = self.plain_seconds = 0.0
        self.lengths = []

    def _time(self, line, rows):
        return (line[0] + line[1] * rows) * self.rng.uniform(1 - self.noise, 1 + self.noise)

    def run(self, num_tokens, rates, limit=5, backlog=0):
        """Until each sequence got about ``num_tokens``; a guess of sequence i is right with chance ``rates[i]``."""
        start = self.seconds
        got = 0
        while got < num_tokens * len(self.requests):
            lengths = [0] * len(self.requests)
            considered = not self.controller.resting
            if considered:
                candidates = [Candidate(request, limit, backlog) for request in self.requests]
                lengths = self.controller.choose(candidates, len(self.requests))
            guessing = 0.0
            for depth in range(max(lengths) if self.round_each_token else min(max(lengths), 1)):
                rows = sum(length > depth for length in lengths) + (backlog if depth == 0 else 0)
                seconds = self._time(self.draft, rows)
                self.cost.observe(rows, seconds)
                guessing += seconds
            right = [self._num_right(length, rate) for length, rate in zip(lengths, rates, strict=True)]
            for request, length, good in zip(self.requests, lengths, right, strict=True):
                if length:
                    self.controller.observe_guesses(request, length, good)
            seconds = self._time(self.step, len(lengths) + sum(lengths))
            if not considered:
                self.controller.rest(seconds)
            else:
                counts = len(lengths), sum(lengths), sum(right)
                self.controller.observe_step(*counts, seconds=seconds, guessing=guessing, pure=True)
            self.seconds += seconds + guessing
            got += len(lengths) + sum(right)
            self.lengths.append(lengths)
        plain = num_tokens * self._plain_step()
        return plain / (self.seconds - start)  # the speed-up

    def _plain_step(self):
        return self.step[0] + self.step[1] * len(self.requests)

    def _num_right(self, length, rate):
        right = 0
        while right < length and self.rng.random() < rate:
            right += 1
        return right


def test_good_guesses_are_used_to_the_full():
    world = World(noise=0.1)
    assert world.run(2000, [0.95]) > 2.5
    assert sum(length == [5] for length in world.lengths) > 0.7 * len(world.lengths)


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("rate", [0.0, 0.05, 0.3])
def test_bad_guesses_cost_at_most_a_twentieth(rate, noise):
    """A round of guessing costs half a step here; so does each row."""
    world = World(step=(1.0, 1.0), draft=(1.0, 0.1), each_token=True, noise=noise)
    assert world.run(500, [rate]) > 0.95


@pytest.mark.parametrize("stall", [5.0, 20.0, 100.0])
def test_a_first_step_that_stalls_does_not_make_bad_guesses_seem_free(stall):
    world = World(step=(0.25, 0.035), draft=(0.02, 0.0), noise=0.05, num_sequences=8)
    usual, factors = world._time, itertools.chain([stall], itertools.repeat(1.0))
    world._time = lambda line, rows: usual(line, rows) * (next(factors) if line is world.step else 1.0)
    world.run(384, [0.07] * 8)
    assert sum(map(sum, world.lengths)) < 150  # 40 without a stall


def test_guessing_resumes_when_text_becomes_predictable():
    world = World(step=(10.0, 1.0), noise=0.1)
    assert world.run(1000, [0.0]) > 0.95
    assert world.run(2000, [0.95]) > 2


def test_each_sequence_gets_its_own_length():
    world = World(step=(10.0, 1.0), num_sequences=4)
    world.run(800, [0.95, 0.95, 0.02, 0.02])
    late = world.lengths[len(world.lengths) // 2 :]
    mean = [sum(lengths[i] for lengths in late) / len(late) for i in range(4)]
    assert min(mean[:2]) > 3
    assert max(mean[2:]) < 1


def test_a_full_batch_that_is_bound_by_rows_is_not_speculated_on():
    """What pays for one sequence does not where each row costs as much as a token is worth."""
    alone, many = World(step=(10.0, 1.0)), World(step=(1.0, 1.0), num_sequences=16)
    assert alone.run(500, [0.7]) > 1.3
    assert many.run(500, [0.7] * 16) > 0.95
    assert sum(map(sum, many.lengths)) < 0.2 * 16 * len(many.lengths)


def test_the_purse_does_not_pay_for_a_long_backlog():
    """Computing 1000 tokens for the draft costs 100 steps; the first guess must wait until that is affordable."""
    world = World(step=(1.0, 0.1), draft=(0.1, 0.1), each_token=True)
    world.cost.observe(1, 0.2)
    assert world.run(300, [0.9], backlog=1000) > 0.95


def test_looking_without_finding_becomes_rarer_but_stays_frequent():
    world = World()
    considered = []
    for _ in range(100):
        considered.append(not world.controller.resting)
        if considered[-1]:
            world.controller.find_nothing()
            world.controller.observe_step(1, 0, 0, seconds=1.0, guessing=0.01, pure=True)
        else:
            world.controller.rest(1.0)
    assert sum(considered[50:]) < 5 and any(considered[-17:])
    world.controller.resting = 0
    assert any(world.controller.choose([Candidate(world.requests[0], 5, 0)], 1))  # what is found is tried at once


def test_requests_are_forgotten():
    world = World()
    world.run(50, [0.5])
    world.controller.retain(set())
    assert not world.controller._acceptances
