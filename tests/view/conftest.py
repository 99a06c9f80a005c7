"""A scheduler without a model, driven at random and recorded, with its live state noted beside the trace."""

from __future__ import annotations

import random

import pytest

from minipaged.config import SamplingParams
from minipaged.core.factory import make_scheduler
from minipaged.core.request import Request
from minipaged.core.scheduler import SchedulerConfig
from minipaged.view import Recorder, snapshot


class RecordedRun:
    """Random requests with common prefixes, forks, aborts, guesses and too few blocks.

    Attributes:
        trace: what was recorded.
        states: the live :class:`Snapshot` of each step, taken as it was planned.
        plans: the plan of each step.
        end: the live snapshot at the end.
    """

    def __init__(self, seed: int, num_steps: int = 60, max_steps: int | None = None, **options):
        self.rng = random.Random(seed)
        defaults = dict(num_blocks=18, block_size=4, max_model_len=48, max_num_seqs=5, max_num_batched_tokens=24)
        self.scheduler = make_scheduler(SchedulerConfig(**{**defaults, **options}))
        self.count = 0
        for _ in range(3):  # recording does not begin in an empty engine
            self._arrive()
            self._step(None)
        recorder = Recorder(self.scheduler, max_steps)
        self.states, self.plans, self.tokens = [], [], []
        for _ in range(num_steps):
            if self.rng.random() < 0.5:
                self._arrive()
            self._step(recorder)
            if self.rng.random() < 0.1 and self.scheduler.requests:
                self.scheduler.abort(self.rng.choice(list(self.scheduler.requests)))
        self.trace = recorder.stop()
        self.end = snapshot(self.scheduler)

    def _arrive(self):
        length, tokens = self.rng.randint(1, 20), self.rng.choice(([7] * 30, list(range(30))))
        priority = self.rng.randint(0, 2)
        params = SamplingParams(max_tokens=self.rng.randint(2, 14))
        self.scheduler.add(Request(f"r{self.count}", tokens[:length], params, priority))
        self.count += 1

    def _step(self, recorder):
        drafts = {r.request_id: [1, 2] for r in self.scheduler.running if self.rng.random() < 0.2}
        plan = self.scheduler.schedule(drafts)
        if recorder:
            recorder.scheduled(plan)
            self.plans.append(plan)
            self.states.append(snapshot(self.scheduler))
        right = {s.request_id: self.rng.randint(0, s.num_lookahead_tokens) for s in plan.scheduled}
        self.scheduler.update(plan, num_accepted=right)
        for sequence in plan.scheduled:
            if sequence.samples:
                self._take(sequence.request_id, [1, 2][: right[sequence.request_id]])
        if recorder:
            recorder.updated()
        self.scheduler.check()

    def _take(self, request_id, accepted):
        request = self.scheduler.requests[request_id]
        if self.rng.random() < 0.06 and request.num_tokens + 2 < request.max_total_tokens and not accepted:
            left = request.max_total_tokens - request.num_prompt_tokens
            child = self.scheduler.fork(request_id, f"{request_id}#{self.count}", SamplingParams(max_tokens=left))
            self.count += 1
            self.scheduler.append(child.request_id, [9])
        self.scheduler.append(request_id, [*accepted, self.rng.randint(0, 3)])
        if request.num_tokens >= request.max_total_tokens:
            self.scheduler.finish(request_id)


@pytest.fixture
def recorded_run():
    """The class :class:`RecordedRun`."""
    return RecordedRun


@pytest.fixture(scope="session")
def run():
    """A recorded run in which everything happens that can happen."""
    return RecordedRun(3, num_steps=120, num_host_blocks=6, policy="priority")
