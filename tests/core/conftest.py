"""A model made of hashes: it shows at once when a block holds somebody else's KV.

The "KV" of a position is a hash of all tokens up to it, kept in a list with one entry a slot. Every
step carries out the copies, verifies that each position read holds the KV of exactly the reading
sequence's prefix, writes, and draws the next token from the last KV.
"""

from __future__ import annotations

import zlib

import pytest

from minipaged.config import SamplingParams
from minipaged.core.factory import make_scheduler
from minipaged.core.request import Request, RequestStatus
from minipaged.core.scheduler import SchedulerConfig

VOCAB_SIZE = 5


class MockEngine:
    """The engine's loop around a scheduler, with hashes for a model. Options as ``SchedulerConfig``."""

    def __init__(self, on_event=None, **options):
        defaults = dict(num_blocks=16, block_size=4, max_model_len=64, max_num_seqs=4, max_num_batched_tokens=32)
        self.config = SchedulerConfig(**{**defaults, **options})
        self.scheduler = make_scheduler(self.config, on_event)
        self.slots = [None] * (self.config.num_blocks * self.config.block_size)
        self.host_blocks = [None] * self.config.num_host_blocks
        self.kv: dict[Request, list[int]] = {}  # what each position of each request must hold
        self.next_position: dict[Request, int] = {}  # of those running
        self.given: dict[Request, int] = {}  # tokens a request began with
        self.results: dict[str, list[int]] = {}  # output of those that finished

    def add(self, request_id, prompt, max_tokens=4, priority=0, cache_salt=None, **params):
        params = SamplingParams(max_tokens=max_tokens, **params)
        request = Request(request_id, prompt, params, priority, cache_salt)
        self.scheduler.add(request)
        return self._track(request)

    def fork(self, request_id, child_id, max_tokens):
        child = self.scheduler.fork(request_id, child_id, SamplingParams(max_tokens=max_tokens))
        if child.status is RequestStatus.RUNNING:
            self.next_position[child] = child.num_computed_tokens
        return self._track(child)

    def _track(self, request):
        self.given[request] = request.num_tokens
        self.kv[request] = []
        self._grow_kv(request)
        return request

    def _grow_kv(self, request):
        kv = self.kv[request]
        for token in request.token_ids[len(kv) :]:
            kv.append(hash((kv[-1] if kv else _number(request.cache_salt), token)))

    def next_token(self, request, position):
        """Depends on all tokens up to ``position`` and on the request, like a seeded draw."""
        return hash((self.kv[request][position], _number(request.request_id))) % VOCAB_SIZE

    # -- one step, in pieces so that tests may come between them --------------------------------

    def step(self, between=lambda: None):
        """Schedule, execute, update, finish; ``between`` is called after each. Returns the output."""
        output = self.scheduler.schedule()
        requests = [self.scheduler.requests[s.request_id] for s in output.scheduled]
        self.check_output(output, requests)
        self.scheduler.check()
        between()
        new_tokens = self.execute(output, requests)
        between()
        self.scheduler.update(output, new_tokens)
        self.scheduler.check()
        between()
        for request in requests:
            self._grow_kv(request)
            if request.status is RequestStatus.RUNNING and request.num_tokens == request.max_total_tokens:
                self.check_tokens(request)
                self.results[request.request_id] = request.output_token_ids
                self.scheduler.finish(request.request_id)
        self.scheduler.check()
        return output

    def drain(self, limit=10_000):
        """Step until nothing is left; every block must be back."""
        steps = 0
        while self.scheduler.has_unfinished:
            self.step()
            steps += 1
            assert steps < limit, "no end in sight"
        assert self.scheduler.pool.num_free == self.config.num_blocks
        assert not self.scheduler.waiting and not self.scheduler.running
        return steps

    def check_output(self, output, requests):
        """What holds for every step, whatever the policy."""
        config, scheduled = self.config, output.scheduled
        lengths = [len(s.token_ids) for s in scheduled]
        assert sum(lengths) == output.num_tokens <= config.max_num_batched_tokens
        assert len(scheduled) <= len(self.scheduler.running) <= config.max_num_seqs
        assert len({s.request_id for s in scheduled}) == len(scheduled)
        assert [n > 1 for n in lengths] == sorted(n > 1 for n in lengths), "single tokens come first"
        assert not set(output.preempted) & {s.request_id for s in scheduled}
        if self.scheduler.running:
            assert self.scheduler.running[0].request_id in {s.request_id for s in scheduled}, "the best one advances"
        for i, (source, _) in enumerate(output.copies):
            assert source not in [destination for _, destination in output.copies[:i]]

        for request in self.kv:
            if request.status is not RequestStatus.RUNNING:
                self.next_position.pop(request, None)
        for sequence, request in zip(scheduled, requests, strict=True):
            start = sequence.num_computed_tokens
            end = start + len(sequence.token_ids)
            swapped_in = {block_id for _, block_id in output.swap_in} & set(sequence.block_ids)
            if request in self.next_position:
                assert start == self.next_position[request], "positions are computed in order, each once"
            elif not swapped_in:
                assert start % config.block_size == 0, "a prefix hit is whole blocks"
            assert sequence.token_ids == request.token_ids[start:end] != []
            assert sequence.samples == (end == request.num_tokens)
            self.next_position[request] = end

    def execute(self, output, requests):
        """Swaps, copies, reads, writes, draws: ``{request_id: [token]}``."""
        size, slots = self.config.block_size, self.slots
        for block_id, host_id in output.swap_out:
            self.host_blocks[host_id] = slots[block_id * size : (block_id + 1) * size]
        for host_id, block_id in output.swap_in:
            assert self.scheduler.pool.blocks[block_id].block_hash is None, "a published block is written"
            slots[block_id * size : (block_id + 1) * size] = self.host_blocks[host_id]
        for source, destination in output.copies:
            slots[destination * size : (destination + 1) * size] = slots[source * size : (source + 1) * size]
        for sequence, request in zip(output.scheduled, requests, strict=True):
            self._verify(sequence, request, sequence.num_computed_tokens)  # before this step writes anything
        for sequence, request in zip(output.scheduled, requests, strict=True):
            for position in range(sequence.num_computed_tokens, sequence.num_computed_tokens + len(sequence.token_ids)):
                block_id = sequence.block_ids[position // size]
                if request.status is RequestStatus.RUNNING:
                    block = self.scheduler.pool.blocks[block_id]
                    assert block.ref_cnt == 1 and block.block_hash is None, "a shared or published block is written"
                slots[block_id * size + position % size] = self.kv[request][position]
        new_tokens = {}
        for sequence, request in zip(output.scheduled, requests, strict=True):
            end = sequence.num_computed_tokens + len(sequence.token_ids)
            self._verify(sequence, request, end)  # no write of this step hit somebody else's slot
            if sequence.samples:
                new_tokens[sequence.request_id] = [self.next_token(request, end - 1)]
        return new_tokens

    def _verify(self, sequence, request, num_tokens):
        size, kv = self.config.block_size, self.kv[request]
        for index in range((num_tokens + size - 1) // size):
            first, n = sequence.block_ids[index] * size, min(size, num_tokens - index * size)
            found = self.slots[first : first + n]
            expected = kv[index * size : index * size + n]
            assert found == expected, f"{request!r} reads foreign KV in block {first // size}"

    def check_tokens(self, request):
        """The tokens are those the request gets alone."""
        for position in range(self.given[request], request.num_tokens):
            assert request.token_ids[position] == self.next_token(request, position - 1)


def _number(text):
    """A hash that is the same in every process, unlike that of a string."""
    return zlib.crc32((text or "").encode())


@pytest.fixture
def mock_engine():
    """The class :class:`MockEngine`."""
    return MockEngine
