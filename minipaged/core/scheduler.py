"""Which tokens are computed in the next step, and where their KV goes.

There is no prefill or decode phase. Every request has ``num_computed_tokens``, which catches up
with its tokens; a step computes some of the difference:

    one step's budget of max_num_batched_tokens
    ┌────────────────────────┬───────────────────────────┬───────────────────────┐
    │ one token of each      │ prompt chunks of requests │ first chunks of newly │
    │ decoding request       │ already running           │ admitted requests     │
    └────────────────────────┴───────────────────────────┴───────────────────────┘

``waiting`` and ``running`` are both sorted by ``sort_key``: (priority, arrival, fork), the priority
being 0 for all under ``fcfs``, and forks standing right behind what they were forked from. The best
running request always advances, the worst is the one preempted, and a preempted request finds its
old place in ``waiting`` by its key. Requests are admitted in strict order, with blocks for all
tokens they have; so nobody overtakes, and the wait of each is bounded by the work of those before
it and of those already running.

Beams advance together: one that awaits its token (``awaits_token``) keeps its blocks and is not
scheduled. That can block nobody forever, because beams of one request stand together in the order:
whoever runs behind a beam that others await makes place for it, and if only such beams run, the
worst of them does.

The idea of one queue without phases is vLLM's V1 scheduler; that capacity counts copies is
openvino.genai's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from minipaged.config import SamplingParams
from minipaged.core import inspection
from minipaged.core.admission import check_admissible
from minipaged.core.block_pool import Block, BlockPool
from minipaged.core.block_table import BlockTable
from minipaged.core.lookahead import add_draft_tokens
from minipaged.core.order import delete, insert, siblings, yields
from minipaged.core.prefix_cache import PrefixCache
from minipaged.core.request import Request, RequestStatus
from minipaged.core.scheduler_output import ScheduledSequence, SchedulerConfig, SchedulerOutput
from minipaged.core.swap import SwapSpace
from minipaged.errors import RequestError, UnknownRequestError


class Scheduler:
    """Requests, their order, and the blocks that they share.

    One step is ``output = schedule()``, running the model on ``output``, ``update(output, tokens)``.
    ``add``, ``abort`` and ``finish`` may come at any moment between these calls.

    Args:
        config: the limits.
        on_event: passed on to :class:`BlockPool`.
    """

    def __init__(self, config: SchedulerConfig, on_event: Callable[[str, int], None] | None = None):
        self.config = config
        self.pool = BlockPool(config.num_blocks, config.enable_prefix_caching, on_event)
        self.prefix_cache = PrefixCache(self.pool, config.block_size)
        self.swap = SwapSpace(config.num_host_blocks, config.block_size)
        self.requests: dict[str, Request] = {}
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.num_added = 0  # requests and forks, ever
        self.num_steps = 0
        self.num_requests_finished = 0
        self.num_prompt_tokens_computed = 0
        self.num_prompt_tokens_cached = 0
        self.num_generated_tokens = 0
        self.num_preemptions = 0
        self.num_blocks_copied = 0

    @property
    def has_unfinished(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self.requests)

    # -- requests come and go -----------------------------------------------------------------

    def check_admissible(self, num_prompt_tokens: int, params: SamplingParams) -> None:
        """Refuse a request that could never finish (see :func:`~minipaged.core.admission.check_admissible`)."""
        check_admissible(self.config, num_prompt_tokens, params)

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.config.block_size)

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            RequestError: it could never finish (see :meth:`check_admissible`), or its id is taken.
        """
        self.check_admissible(request.num_prompt_tokens, request.params)
        priority = request.priority if self.config.policy == "priority" else 0
        self._register(request, (priority, self.num_added + 1))
        insert(self.waiting, request)

    def _register(self, request: Request, place: tuple[int, int]) -> None:
        if request.request_id in self.requests:
            raise RequestError(f"request id {request.request_id!r} is in use; choose another.")
        self.num_added += 1
        request.sort_key = (*place, self.num_added)
        self.requests[request.request_id] = request

    def fork(self, request_id: str, child_id: str, params: SamplingParams) -> Request:
        """Continue a request a second time, under ``child_id``; call it between steps.

        The child shares all KV of a running parent, and what either writes next is copied first.
        Where no sequence may be added it waits, and finds or computes its KV like any request. Its
        place in the order is behind its parent and before whoever came after the parent.

        Raises:
            UnknownRequestError: there is no such request.
            RequestError: ``child_id`` is taken, or ``params`` leave the child nothing to generate.
        """
        parent = self._get(request_id)
        child = parent.fork(child_id, params)
        self.check_admissible(child.num_prompt_tokens, params)
        if parent.num_tokens >= child.max_total_tokens:
            raise RequestError(
                f"request {request_id!r} has {parent.num_tokens} tokens already; a fork with max_tokens "
                f"{params.max_tokens} ends at {child.max_total_tokens}. Raise max_tokens."
            )
        self._register(child, parent.sort_key[:2])
        parent.num_seqs = max(parent.num_seqs - 1, 1)
        if parent.status is RequestStatus.RUNNING and self._may_share():
            child.block_table = parent.block_table.fork()
            child.num_computed_tokens = parent.num_computed_tokens
            child.num_published_blocks = parent.num_published_blocks
            child.published_id = parent.published_id
            child.status = RequestStatus.RUNNING
            insert(self.running, child)
        else:
            insert(self.waiting, child)
        return child

    def _may_share(self) -> bool:
        return self._num_seqs() < self.config.max_num_seqs

    def _num_seqs(self) -> int:
        """Running sequences, and those that will be forked from them."""
        return sum(request.num_seqs for request in self.running)

    def append(self, request_id: str, token_ids: list[int]) -> None:
        """Give a request the tokens that come next; the last of its step, if :meth:`update` did not.

        Raises:
            UnknownRequestError: there is no such request.
        """
        request = self._get(request_id)
        request.token_ids += token_ids
        request.awaits_token = False
        self.num_generated_tokens += len(token_ids)

    def abort(self, request_id: str) -> bool:
        """Drop a request and free its blocks, at any time; whether there was one.

        Between ``schedule()`` and ``update()`` the step still computes the request's tokens, into
        blocks that nobody else gets before the next ``schedule()``; ``update()`` ignores them, so
        they are never published.
        """
        if request_id not in self.requests:
            return False
        self._remove(self.requests[request_id], RequestStatus.ABORTED)
        return True

    def finish(self, request_id: str) -> None:
        """End a request that has all its tokens, and free its blocks.

        Raises:
            UnknownRequestError: there is no such request.
        """
        request = self._get(request_id)
        if request.status is RequestStatus.RUNNING:
            self.prefix_cache.publish(request)  # draft tokens that were right are known only now
        self._remove(request, RequestStatus.FINISHED)
        self.num_requests_finished += 1

    def _get(self, request_id: str) -> Request:
        try:
            return self.requests[request_id]
        except KeyError:
            raise UnknownRequestError(f"no request {request_id!r} is waiting or running.") from None

    def _remove(self, request: Request, status: RequestStatus) -> None:
        delete(self.waiting if request.status is RequestStatus.WAITING else self.running, request)
        if request.block_table is not None:
            request.block_table.release()
        self.swap.drop(request)
        request.reset(status)
        del self.requests[request.request_id]

    # -- one step -----------------------------------------------------------------------------

    def schedule(self, drafts: Mapping[str, list[int]] = MappingProxyType({})) -> SchedulerOutput:
        """Decide the next step: first those running, then those waiting with what budget is left.

        ``drafts``: guesses by request id; those that fit into the rest of the step are computed too.
        """
        output = SchedulerOutput()
        if self.waiting:
            self._preempt_for_urgent(output)
        self._continue_running(output)
        if self.waiting:
            self._admit_waiting(output)
        while not output.scheduled and (idle := self._worst_idle()):
            # Beams that await a sibling hold the blocks that it wants.
            self._preempt(idle, output)
            self._continue_running(output)
            self._admit_waiting(output)
        if drafts:
            add_draft_tokens(output, self.requests, drafts, self.config.max_num_batched_tokens, self.pool)
        if output.num_tokens > len(output.scheduled):
            output.scheduled.sort(key=_has_many_tokens)
        self.num_steps += 1
        self.num_blocks_copied += len(output.copies)
        return output

    def update(
        self,
        output: SchedulerOutput,
        new_tokens: Mapping[str, list[int]] = MappingProxyType({}),
        num_accepted: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        """Take in a step that was computed: advance, publish full blocks, append new tokens.

        Args:
            output: what :meth:`schedule` returned last.
            new_tokens: tokens by request id, for sequences that sample. One that samples and gets
                none awaits its token until :meth:`append` brings it.
            num_accepted: draft tokens that were right by request id, the first ones of those computed. Their
                KV is kept; :meth:`append` makes them known.
        """
        for sequence in output.scheduled:
            request = self.requests.get(sequence.request_id)
            if request is None or request.status is not RequestStatus.RUNNING:
                continue  # aborted since; a new request of the same id is still waiting
            start = sequence.num_computed_tokens
            end = start + len(sequence.token_ids)
            if sequence.num_lookahead_tokens:
                end -= sequence.num_lookahead_tokens - num_accepted.get(request.request_id, 0)
            request.num_computed_tokens = end
            if end < start + len(sequence.token_ids):
                self._roll_back(request)
            if start < request.num_prompt_tokens:
                self.num_prompt_tokens_computed += min(end, request.num_prompt_tokens) - start
            if end // self.config.block_size > request.num_published_blocks:
                self.prefix_cache.publish(request)
            request.use_prefix_cache = request.use_prefix_cache or sequence.samples  # all prompt logits were seen
            request.awaits_token = sequence.samples
            if new_tokens and (tokens := new_tokens.get(request.request_id)):
                self.append(request.request_id, tokens)

    def _roll_back(self, request: Request) -> None:
        """Give back what was allocated for draft tokens that were wrong."""
        request.block_table.truncate(request.num_computed_tokens)

    def _preempt_for_urgent(self, output: SchedulerOutput) -> None:
        """Policy ``priority``: strictly less urgent requests make place for the most urgent waiting.

        So does whoever runs behind a beam that waits while its siblings await it: they hold blocks,
        and would wait for it forever.
        """
        urgent = self._next_waiting()
        if urgent is None:
            return
        awaited = any(sibling.awaits_token for sibling in siblings(urgent, self.running))
        while self.running and yields(self.running[-1], urgent, awaited):
            if self._has_seats(urgent) and self._fits(urgent, self.prefix_cache.shared_prefix(urgent, self.running)):
                break
            self._preempt(self.running[-1], output)

    def _continue_running(self, output: SchedulerOutput) -> None:
        """One token for each decoding request, chunks of prompt for the others, best first."""
        uncomputed = [len(request.token_ids) - request.num_computed_tokens for request in self.running]
        chunk_budget = self.config.max_num_batched_tokens - uncomputed.count(1)
        for request, num_tokens in zip(self.running, uncomputed, strict=False):  # preempting shortens the list's end
            if num_tokens > 1:
                num_tokens = min(num_tokens, chunk_budget)
                chunk_budget -= num_tokens
            if num_tokens and self._make_writable(request, num_tokens, output):
                self._schedule(request, num_tokens, output)

    def _admit_waiting(self, output: SchedulerOutput) -> None:
        """Admit requests in order while sequences, tokens and blocks last."""
        while True:
            budget = self.config.max_num_batched_tokens - output.num_tokens
            request = self._next_waiting()
            if request is None or budget == 0 or request.request_id in output.preempted or not self._has_seats(request):
                break
            hits = self.prefix_cache.shared_prefix(request, self.running)
            known = max(len(hits), request.num_host_tokens // self.config.block_size)
            if self.prefix_cache.is_being_computed(request, known, self.running) or not self._fits(request, hits):
                break
            self._start(request, hits)
            self.swap.restore(request, output)
            num_tokens = min(budget, request.num_tokens - request.num_computed_tokens)
            self._make_writable(request, num_tokens, output)
            self._schedule(request, num_tokens, output)

    def _next_waiting(self) -> Request | None:
        """The first that has something to compute (a preempted one may await its token)."""
        return next((request for request in self.waiting if not request.awaits_token), None)

    def _schedule(self, request: Request, num_tokens: int, output: SchedulerOutput) -> None:
        start = request.num_computed_tokens
        end = start + num_tokens
        output.num_tokens += num_tokens
        output.scheduled.append(
            ScheduledSequence(
                request.request_id,
                request.token_ids[start:end],
                start,
                request.block_table.block_ids,
                end == len(request.token_ids),
            )
        )

    # -- admission and preemption ---------------------------------------------------------------
    #
    #   blocks of a request when it is admitted:
    #
    #   ├── hits: shared, KV is there ──┼── new: for every other token it has ──┤   + 1 spare for each
    #                                                                               running sequence

    def _has_seats(self, request: Request) -> bool:
        """Whether a request's sequences, forks to come included, may run beside the others."""
        return self._num_seqs() + request.num_seqs <= self.config.max_num_seqs

    def _fits(self, request: Request, hits: list[Block]) -> bool:
        """Whether all tokens known fit, and each running sequence could still take a block.

        Without the spare blocks, a request admitted into a full pool would be preempted at once.
        """
        new = self._num_blocks(request.num_tokens) - len(hits)
        idle_hits = sum(block.ref_cnt == 0 for block in hits)  # counted as free, but about to be shared
        return new + idle_hits + len(self.running) <= self.pool.num_free

    def _start(self, request: Request, hits: list[Block]) -> None:
        delete(self.waiting, request)
        table = BlockTable(self.config.block_size, self.pool)
        table.share_prefix(hits)
        request.block_table = table
        request.num_computed_tokens = len(hits) * self.config.block_size
        if request.num_preemptions == 0 and self.config.enable_prefix_caching:
            request.num_cached_tokens = request.num_computed_tokens
            self.num_prompt_tokens_cached += min(request.num_cached_tokens, request.num_prompt_tokens)
        self._reserve(request)
        request.status = RequestStatus.RUNNING
        insert(self.running, request)

    def _reserve(self, request: Request) -> None:
        request.block_table.append_slots(request.num_computed_tokens, request.num_tokens)

    def _make_writable(self, request: Request, num_tokens: int, output: SchedulerOutput) -> bool:
        """Give tokens their slots, preempting from the worst where blocks lack; the worst itself just waits a step."""
        start, table = request.num_computed_tokens, request.block_table
        end = start + num_tokens
        if table.is_writable(start, end):
            return True
        while table.num_blocks_needed(start, end) > self.pool.num_free:
            if self.running[-1] is request:
                return False
            self._preempt(self.running[-1], output)
        output.copies += table.append_slots(start, end)
        return True

    def _worst_idle(self) -> Request | None:
        """The worst running request that awaits its token, if anybody does not."""
        if all(request.awaits_token for request in self.requests.values()):
            return None
        return next((request for request in reversed(self.running) if request.awaits_token), None)

    def _preempt(self, request: Request, output: SchedulerOutput) -> None:
        """Take the blocks of a running request; it will compute its tokens again, or was swapped."""
        delete(self.running, request)
        self.swap.store(request, output)
        request.block_table.release()
        request.reset(RequestStatus.WAITING)
        request.num_preemptions += 1
        self.num_preemptions += 1
        insert(self.waiting, request)
        output.preempted.append(request.request_id)

    # -- inspection ---------------------------------------------------------------------------

    def stats(self) -> dict[str, int]:
        """The fields of ``EngineStats`` that the scheduler knows."""
        return inspection.stats(self)

    def check(self) -> None:
        """Verify that nothing is lost or in two places. O(blocks + requests).

        Raises:
            IntegrityError: a bug in minipaged, with what was found.
        """
        inspection.check(self)


def _has_many_tokens(sequence: ScheduledSequence) -> bool:
    return len(sequence.token_ids) > 1
