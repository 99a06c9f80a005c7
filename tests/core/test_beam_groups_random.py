"""Groups that advance together, at random, among ordinary requests: no step is empty, nothing is lost.

The scheduler's side of beam search: a member that sampled awaits its token until all members have; then
some are dropped, some forked, and each gets a token. Pools are so small that members preempt each other.
"""

from __future__ import annotations

import random

import pytest

from minipaged.config import SamplingParams
from minipaged.core.request import Request, RequestStatus


class Group:
    """A beam search that chooses at random."""

    def __init__(self, engine, rng, name, prompt, params, priority):
        self.engine, self.rng, self.name, self.params = engine, rng, name, params
        root = Request(name, prompt, params, priority)
        engine.scheduler.add(root)
        self.members = [engine._track(root)]
        self.sampled: set[str] = set()
        self.num_forks = 0

    def take(self, request_id):
        assert request_id not in self.sampled, "a member is computed again before its siblings are as far"
        self.sampled.add(request_id)
        if len(self.sampled) == len(self.members):
            self.sampled.clear()
            self.advance()

    def advance(self):
        engine, scheduler = self.engine, self.engine.scheduler
        if self.members[0].num_tokens + 1 == self.members[0].max_total_tokens:
            self.abort()
            return
        parents = [self.rng.choice(self.members) for _ in range(self.params.num_sequences)]
        for member in self.members:
            if member not in parents:
                scheduler.abort(member.request_id)
        self.members = sorted(set(parents), key=lambda request: request.sort_key)
        for parent in self.members:
            parents.remove(parent)
        for parent in parents:
            self.num_forks += 1
            child = scheduler.fork(parent.request_id, f"{self.name}#{self.num_forks}", self.params)
            if child.status is RequestStatus.RUNNING:
                engine.next_position[child] = child.num_computed_tokens
            self.members.append(engine._track(child))
        for member in self.members:
            scheduler.append(member.request_id, [self.rng.randrange(5)])
            engine._grow_kv(member)

    def abort(self):
        for member in self.members:
            self.engine.scheduler.abort(member.request_id)
        self.members = []


def run_trace(mock_engine, rng, policy, caching, beams_fit=True):
    block_size = rng.choice([1, 2, 4, 8])
    width = rng.choice([2, 3, 4])
    prompt_len, max_tokens = rng.randint(1, 20), rng.randint(2, 24)
    fewest = max(  # blocks that admission asks for
        shared + (width if beams_fit else 1) * (-(-(length + max_tokens - 1) // block_size) - shared)
        for length in range(1, prompt_len + 1)
        for shared in [length // block_size]
    )
    engine = mock_engine(
        num_blocks=fewest + rng.choice([0, 0, 1, 5]),
        block_size=block_size,
        max_num_seqs=rng.choice([width, width + 1, 4 * width]),
        max_num_batched_tokens=4 * width + rng.choice([0, 3, 30]),
        enable_prefix_caching=caching,
        policy=policy,
    )
    scheduler, groups, number = engine.scheduler, {}, 0
    while number < 12 or scheduler.has_unfinished:
        if number < 12 and rng.random() < 0.5:
            number += 1
            prompt = [rng.randrange(2) for _ in range(rng.randint(1, prompt_len))]
            priority = rng.randint(0, 2)
            if rng.random() < 0.6:
                params = SamplingParams(
                    n=rng.randint(2, width), use_beam_search=True, max_tokens=rng.randint(2, max_tokens)
                )
                groups[f"g{number}"] = Group(engine, rng, f"g{number}", prompt, params, priority)
            else:
                engine.add(f"r{number}", prompt, rng.randint(1, max_tokens), priority)
        if groups and rng.random() < 0.02:
            groups.pop(rng.choice(list(groups))).abort()
        step(engine, groups)
    assert scheduler.pool.num_free == scheduler.pool.num_blocks
    return scheduler


def step(engine, groups):
    scheduler = engine.scheduler
    output = scheduler.schedule()
    scheduler.check()
    assert output.scheduled or not scheduler.requests, "everybody waits for somebody"
    requests = [scheduler.requests[s.request_id] for s in output.scheduled]
    assert not any(request.awaits_token for request in requests)
    assert scheduler._num_seqs() <= scheduler.config.max_num_seqs
    tokens = engine.execute(output, requests)
    ordinary = {name: token for name, token in tokens.items() if name.startswith("r")}
    scheduler.update(output, ordinary)
    scheduler.check()
    for request in requests:
        if request.request_id in ordinary:
            engine._grow_kv(request)
            if request.num_tokens == request.max_total_tokens:
                engine.check_tokens(request)
                scheduler.finish(request.request_id)
        elif request.request_id in tokens:
            groups[request.request_id.partition("#")[0]].take(request.request_id)
            scheduler.check()


def run_traces(mock_engine, seed, *args, **options):
    rng = random.Random(seed)
    schedulers = [run_trace(mock_engine, rng, *args, **options) for _ in range(30)]
    return sum(s.num_preemptions for s in schedulers), sum(s.num_blocks_copied for s in schedulers)


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_groups_advance_whatever_preempts_them(mock_engine, policy, caching):
    preemptions, copies = run_traces(mock_engine, f"{policy} {caching}", policy, caching)
    assert preemptions > 9 and copies > 60


@pytest.mark.parametrize("caching", [True, False])
def test_even_a_pool_that_holds_only_one_member_at_a_time_is_enough(mock_engine, monkeypatch, caching):
    """Admission would refuse such a width; the order of preemption alone must avoid the deadlock."""
    monkeypatch.setattr("minipaged.core.admission._check_beams", lambda *args: None)
    preemptions, _ = run_traces(mock_engine, "tiny", "fcfs", caching, beams_fit=False)
    assert preemptions > 100
