"""A small model guesses what the large one will say.

The draft model reads the same tokens into a KV pool of its own, kept by the same block manager, and
writes on by itself for a few tokens; all sequences together, one forward pass for each token ahead:

    target's tokens      ────────────────────────────┐ num_tokens
    draft's KV           ─────────────────────┐      │
                          (backlog: catch up) └──────┤
    draft tokens                                     └─▶ d0 ─▶ d1 ─▶ d2

It samples with the request's own parameters and the request's own random numbers: the number that
decides position p for the target decides it for the draft too. Where the two distributions are alike
the same number mostly picks the same token, at any temperature. See ``verification.py`` for why
that keeps the distribution, and what it costs in accepted tokens.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Protocol

from minipaged.core.block_pool import BlockPool
from minipaged.core.block_table import BlockTable
from minipaged.core.prefix_cache import PrefixCache
from minipaged.core.request import Request
from minipaged.core.scheduler_output import ScheduledSequence, SchedulerOutput
from minipaged.sampling.speculative.cost import LinearCost
from minipaged.sampling.speculative.proposer import DraftWish
from minipaged.sampling.step_logits import DrawOrder, PromptOrder, StepLogits


class DraftRunner(Protocol):
    """What computes the draft model: ``minipaged.runner.Runner`` over its own KV cache."""

    def execute(self, plan: SchedulerOutput, prompts: dict[str, PromptOrder], draws: list[DrawOrder]) -> StepLogits:
        """Carry out a plan; ``draws``: what is wanted of each sequence that samples."""

    def close(self) -> None:
        """End its threads."""


class _Draft:
    """The draft model's view of one sequence: tokens, how far its KV is there, and its guesses."""

    def __init__(self, wish: DraftWish, pool: BlockPool, prefix_cache: PrefixCache, block_size: int):
        request = wish.request
        params = wish.sampling.params.clone(logprobs=None, prompt_logprobs=None)  # nobody reads a guess's
        self.mirror = Request(request.request_id, request.token_ids, params, cache_salt=request.cache_salt)
        self.mirror.block_table = BlockTable(block_size, pool)
        hits = prefix_cache.match(self.mirror)
        self.mirror.block_table.share_prefix(hits)
        self.mirror.num_computed_tokens = len(hits) * block_size
        self.sampling = wish.sampling.fork(wish.sampling.seed, params)
        self.guesses: list[int] = []
        self.num_wanted = 0

    def follow(self, wish: DraftWish) -> None:
        """Take over what the target decided; keep the KV of guesses that were right."""
        mirror, known = self.mirror, wish.request.token_ids
        agreed = mirror.num_tokens - len(self.guesses)
        while agreed < mirror.num_tokens and agreed < len(known) and mirror.token_ids[agreed] == known[agreed]:
            agreed += 1
        mirror.token_ids[agreed:] = known[agreed:]
        mirror.num_computed_tokens = min(mirror.num_computed_tokens, agreed)
        mirror.block_table.truncate(mirror.num_computed_tokens)
        self.sampling.truncate(agreed - self.sampling.num_prompt_tokens)
        for token_id in known[agreed:]:
            self.sampling.append(token_id)
        self.guesses, self.num_wanted = [], wish.num_tokens

    def guess(self, token_id: int) -> None:
        self.guesses.append(token_id)
        self.mirror.token_ids.append(token_id)
        self.sampling.append(token_id)


class DraftModelProposer:
    """Drafts for many sequences at once with a model of the target's vocabulary.

    Args:
        runner: the draft model with its KV cache of ``num_blocks`` blocks.
        num_blocks, block_size: of the draft's pool. A sequence that finds no block gets no draft.
        max_model_len: positions that the draft model has; longer sequences get no draft.
        max_num_tokens: tokens of a forward pass, at most; a longer backlog takes several steps.
        cost_share: what a pass is expected to cost of the target's.
    """

    round_each_token = True

    def __init__(
        self,
        runner: DraftRunner,
        *,
        num_blocks: int,
        block_size: int,
        max_model_len: int,
        max_num_tokens: int,
        cost_share: float = 1.0,
    ):
        self.cost = LinearCost()
        self.seconds = 0.0
        self.cost_share = cost_share
        self.runner = runner
        self.pool = BlockPool(num_blocks)
        self._prefix_cache = PrefixCache(self.pool, block_size)
        self._block_size = block_size
        self._max_model_len = max_model_len
        self._max_num_tokens = max_num_tokens
        self._drafts: dict[Request, _Draft] = {}

    def propose(self, wishes: list[DraftWish]) -> list[list[int]]:
        """See :class:`Proposer`."""
        drafts = [self._draft(wish) for wish in wishes]
        active = drafts
        while active:
            started = time.perf_counter()
            plan, sampling = self._plan(active)
            if plan.scheduled:
                self._guess(plan, sampling)
                self.seconds += self.cost.observe(plan.num_tokens, time.perf_counter() - started)
            active = [draft for draft in sampling if 0 < len(draft.guesses) < draft.num_wanted]
        return [draft.guesses.copy() for draft in drafts]

    def _draft(self, wish: DraftWish) -> _Draft:
        draft = self._drafts.get(wish.request)
        if draft is None:
            draft = self._drafts[wish.request] = _Draft(wish, self.pool, self._prefix_cache, self._block_size)
        draft.follow(wish)
        self._prefix_cache.publish(draft.mirror)
        return draft

    def _plan(self, drafts: list[_Draft]) -> tuple[SchedulerOutput, list[_Draft]]:
        """The next round, and those whose next token it samples."""
        plan, sampling = SchedulerOutput(), []
        for draft in drafts:
            mirror = draft.mirror
            start = mirror.num_computed_tokens
            end = min(mirror.num_tokens, start + self._max_num_tokens - plan.num_tokens)
            if end == start or end > self._max_model_len:
                continue
            if mirror.block_table.num_blocks_needed(start, end) > self.pool.num_free:
                continue
            mirror.block_table.append_slots(start, end)
            samples = end == mirror.num_tokens
            tokens, block_ids = mirror.token_ids[start:end], mirror.block_table.block_ids
            plan.scheduled.append(ScheduledSequence(mirror.request_id, tokens, start, block_ids, samples))
            plan.num_tokens += end - start
            mirror.num_computed_tokens = end
            if samples:
                sampling.append(draft)
        return plan, sampling

    def _guess(self, plan: SchedulerOutput, sampling: list[_Draft]) -> None:
        states = [draft.sampling for draft in sampling]
        logits = self.runner.execute(plan, {}, [DrawOrder([state]) for state in states])
        sampled = logits.draw(logits.sample_rows, states)
        for draft, token in zip(sampling, sampled, strict=True):
            if token.error is None:  # else it is the draft's damage alone: fewer guesses
                draft.guess(token.token_id)
            else:
                draft.num_wanted = 0

    def backlog(self, request: Request) -> int:
        """See :class:`Proposer`."""
        draft = self._drafts.get(request)
        return request.num_tokens - (draft.mirror.num_computed_tokens if draft is not None else 0)

    def retain(self, requests: Collection[Request]) -> None:
        """See :class:`Proposer`."""
        for request in self._drafts.keys() - requests:
            self._drafts.pop(request).mirror.block_table.release()

    def check(self) -> None:
        """Verify the conservation law of the draft's pool; raises ``IntegrityError``."""
        self.pool.check(draft.mirror.block_table.blocks for draft in self._drafts.values())

    def close(self) -> None:
        """See :class:`Proposer`."""
        self.retain(())
        self.runner.close()
