"""Thousands of random steps: tiny pools, shared prefixes, forks, priorities, aborts at every point."""

from __future__ import annotations

import random

import pytest

from minipaged.core import prefix_cache
from minipaged.core.request import RequestStatus

BLOCK_SIZES = [1, 2, 4, 8, 16, 32, 64, 128, 256]
STEPS = 1120  # for each block size and policy: 9 × 2 × 1120 > 20,000


class Trace:
    """Random requests against one :class:`MockEngine`."""

    def __init__(self, mock_engine, rng, block_size, policy, caching=True, **limits):
        self.rng, self.policy = rng, policy
        num_blocks = rng.randint(2, 12) if block_size > 2 else rng.randint(8, 40)
        max_num_seqs = rng.randint(2, 8)
        self.engine = mock_engine(
            num_blocks=num_blocks,
            block_size=block_size,
            max_model_len=rng.choice([num_blocks * block_size, 3 * block_size + 5]),
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs + rng.choice([0, 1, block_size // 2, 3 * block_size, 300]),
            enable_prefix_caching=caching,
            policy=policy,
            **limits,
        )
        self.scheduler = self.engine.scheduler
        self.documents = [self.tokens(3 * block_size) for _ in range(3)]
        self.num_added = self.num_aborted = 0
        self.steps = 0
        self.deadline = {}

    def tokens(self, n):
        return [self.rng.randrange(5) for _ in range(n)]

    def add(self):
        rng, config = self.rng, self.engine.config
        longest = min(config.max_model_len, config.num_blocks * config.block_size)
        max_tokens = rng.randint(1, min(20, longest - 1))
        shared = rng.choice(self.documents)[: rng.randint(0, longest)]
        prompt = (shared + self.tokens(rng.randint(1, 4)))[: longest - max_tokens]
        if rng.random() < 0.5:  # end just before a block does, so that decoding soon wants another block
            prompt = prompt[: max(1, len(prompt) // config.block_size * config.block_size - rng.randint(0, 2))]
        if not prompt:
            return
        self.num_added += 1
        extra = {"prompt_logprobs": 0} if rng.random() < 0.1 else {}
        salt = rng.choice([None, None, "tenant"])
        request = self.engine.add(f"r{self.num_added}", prompt, max_tokens, rng.randint(0, 2), salt, **extra)
        self.set_deadline(request)

    def fork(self):
        parent = self.rng.choice(self.scheduler.running or self.scheduler.waiting)
        self.num_added += 1
        max_tokens = parent.max_total_tokens - parent.num_prompt_tokens
        self.set_deadline(self.engine.fork(parent.request_id, f"r{self.num_added}", max_tokens))

    def set_deadline(self, request):
        """No starvation (fcfs): each of those alive, in turn, waits for those running and then works."""
        config = self.engine.config
        longest = max(other.max_total_tokens for other in self.scheduler.requests.values())
        turns = len(self.scheduler.requests) * (config.max_num_seqs + 1)
        self.deadline[request.request_id] = self.steps + turns * longest

    def maybe_abort(self):
        if self.scheduler.requests and self.rng.random() < 0.03:
            assert self.scheduler.abort(self.rng.choice(list(self.scheduler.requests)))
            self.num_aborted += 1
            self.scheduler.check()

    def step(self):
        self.maybe_abort()
        decoding = [r for r in self.scheduler.running if r.num_tokens - r.num_computed_tokens == 1]
        enough = self.scheduler.pool.num_free >= sum(
            r.block_table.num_blocks_needed(r.num_computed_tokens, r.num_tokens) for r in self.scheduler.running
        )
        output = self.engine.step(self.maybe_abort)
        self.steps += 1
        if enough and self.policy == "fcfs":
            assert not output.preempted
            assert {r.request_id for r in decoding} <= {s.request_id for s in output.scheduled}, "decode first"
        if self.policy == "fcfs":
            for request_id in self.scheduler.requests:
                assert self.steps <= self.deadline[request_id], f"{request_id} starves"

    def run(self, steps):
        load = self.rng.choice([0.1, 0.3, 0.5])
        for _ in range(steps):
            while self.rng.random() < load:
                self.add()
            seat_free = len(self.scheduler.running) < self.engine.config.max_num_seqs
            if self.scheduler.requests and self.rng.random() < (0.3 if seat_free else 0.03):
                self.fork()
            self.step()
        arrived = self.num_added
        while self.scheduler.has_unfinished:
            self.step()
            assert self.steps < steps + 3000, "no end in sight"
        assert arrived == len(self.engine.results) + self.num_aborted
        self.engine.drain()


def run_traces(mock_engine, seed, block_size, policy, steps, **options):
    """Traces until ``steps`` steps are done; returns how often each interesting thing happened."""
    rng = random.Random(seed)
    seen = {"steps": 0, "preemptions": 0, "copies": 0, "hits": 0, "aborts": 0, "swaps": 0}
    while seen["steps"] < steps:
        trace = Trace(mock_engine, rng, block_size, policy, **options)
        trace.run(100)
        seen["steps"] += trace.steps
        seen["preemptions"] += trace.scheduler.num_preemptions
        seen["copies"] += trace.scheduler.num_blocks_copied
        seen["hits"] += trace.scheduler.num_prompt_tokens_cached
        seen["aborts"] += trace.num_aborted
        seen["swaps"] += trace.scheduler.swap.num_swapped_in
    return seen


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_random_steps_keep_every_law(mock_engine, block_size, policy):
    seen = run_traces(mock_engine, f"{policy} {block_size}", block_size, policy, STEPS)
    assert seen["preemptions"] and seen["hits"] and seen["aborts"], "the traces must reach the hard cases"
    assert seen["copies"] or block_size == 1, "blocks of one token are never half full when forked"


def test_random_steps_without_prefix_caching(mock_engine):
    seen = run_traces(mock_engine, "no cache", 4, "fcfs", 500, caching=False)
    assert seen["preemptions"] and not seen["hits"]


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
@pytest.mark.parametrize("block_size, num_host_blocks", [(1, 30), (2, 3), (4, 12), (16, 5)])
def test_random_steps_with_swapping(mock_engine, block_size, num_host_blocks, policy):
    options = {"num_host_blocks": num_host_blocks, "caching": num_host_blocks != 12}
    seen = run_traces(mock_engine, f"swap {policy} {block_size}", block_size, policy, STEPS, **options)
    assert seen["preemptions"] and seen["swaps"] and seen["aborts"]


def test_colliding_hashes_never_give_a_false_hit(mock_engine, monkeypatch):
    """With hashes of three bits nearly every lookup meets a foreign block; the token check must refuse it."""
    monkeypatch.setattr(prefix_cache, "root_hash", lambda salt: b"")
    sha256 = prefix_cache.hash_block
    monkeypatch.setattr(prefix_cache, "hash_block", lambda parent, tokens: bytes([sha256(parent, tokens)[0] % 8]))
    seen = run_traces(mock_engine, "collisions", 2, "fcfs", 1500)
    assert seen["hits"]


def test_random_static_batches(mock_engine):
    rng = random.Random("static")
    for _ in range(10):
        block_size = rng.choice([1, 2, 4])
        engine = mock_engine(
            num_blocks=40, block_size=block_size, max_model_len=10, max_num_batched_tokens=16, policy="static"
        )

        def maybe_abort(engine=engine):
            if engine.scheduler.requests and rng.random() < 0.1:
                engine.scheduler.abort(rng.choice(list(engine.scheduler.requests)))

        for i in range(30):
            engine.add(f"r{i}", [rng.randrange(5) for _ in range(rng.randint(1, 6))], rng.randint(1, 4))
            if rng.random() < 0.3:
                engine.step(maybe_abort)
        engine.drain()
        assert engine.scheduler.num_preemptions == engine.scheduler.num_prompt_tokens_cached == 0
        assert RequestStatus.RUNNING not in {request.status for request in engine.kv}
