"""One request, as the scheduler sees it: its tokens, how far they are computed, where their KV is."""

from __future__ import annotations

import enum

from minipaged.config import SamplingParams
from minipaged.core.block_table import BlockTable
from minipaged.errors import InvalidParameterError


class RequestStatus(enum.Enum):
    """Where a request is; a preempted request is ``WAITING`` again.

    ``FINISHED``: it has all its tokens. ``ABORTED``: it was dropped before.
    """

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"
    ABORTED = "aborted"


class Request:
    """A prompt and its continuation so far.

        0               num_computed_tokens        num_prompt_tokens        num_tokens
        ├──────── KV is in the blocks ─┼──── still to be computed ─┼─ generated ──┤  ≤ max_total_tokens
        ├ num_cached_tokens ┤ (found in the prefix cache, not computed)

    There is no phase: while prompt is left to compute a step takes a chunk of it; once one token
    is left, the step samples the next; after a preemption ``num_computed_tokens`` is 0 again.

    Args:
        request_id: unique among the requests alive.
        prompt_token_ids: at least one token.
        params: sampling parameters with ``max_tokens`` resolved to a number.
        priority: lower runs first (policy ``priority`` only).
        cache_salt: prefixes are shared only between requests with the same salt.

    Attributes:
        token_ids: prompt and output.
        num_computed_tokens: tokens whose KV is in the block table.
        num_cached_tokens: length of the prefix hit when the request was first admitted.
        num_preemptions: how often its blocks were taken from it.
        block_table: ``None`` unless running.
        host_block_ids, num_host_tokens: blocks in host memory with the KV of its first tokens; of a
            preempted request that was swapped.
        use_prefix_cache: whether prefix hits may be used. Not while ``prompt_logprobs`` need the
            logits of every prompt position; such a request still publishes its blocks.
        awaits_token: its last token was computed, and the next is not known yet (a beam whose
            siblings are not as far); until it is, there is nothing to schedule.
        num_seqs: sequences that will be forked from it, itself included; seats are kept for all.
        block_hashes: hashes of its first full blocks, as far as they were needed.
        num_published_blocks: how many of its full blocks are known to be in the prefix cache, the
            blocks themselves or equal ones.
        published_id: ``content_id`` of the last of them, at first the ``cache_salt``.
        sort_key: place in ``waiting`` and ``running``: (priority, arrival, fork); set by the
            scheduler, unique. Forks of one request differ in the last part only.
    """

    __slots__ = (
        "request_id",
        "params",
        "priority",
        "cache_salt",
        "token_ids",
        "num_prompt_tokens",
        "max_total_tokens",
        "num_computed_tokens",
        "num_cached_tokens",
        "num_preemptions",
        "status",
        "block_table",
        "host_block_ids",
        "num_host_tokens",
        "use_prefix_cache",
        "awaits_token",
        "num_seqs",
        "block_hashes",
        "num_published_blocks",
        "published_id",
        "sort_key",
    )

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        priority: int = 0,
        cache_salt: str | None = None,
    ):
        if params.max_tokens is None:
            raise InvalidParameterError("max_tokens is None; it must be a number once a request is scheduled.")
        self.request_id = request_id
        self.params = params
        self.priority = priority
        self.cache_salt = cache_salt
        self.token_ids = list(prompt_token_ids)
        self.num_prompt_tokens = len(prompt_token_ids)
        self.max_total_tokens = self.num_prompt_tokens + params.max_tokens
        self.num_cached_tokens = 0
        self.num_preemptions = 0
        self.host_block_ids: list[int] = []
        self.num_host_tokens = 0
        self.use_prefix_cache = params.prompt_logprobs is None
        self.awaits_token = False
        self.num_seqs = params.num_sequences
        self.block_hashes: list[bytes] = []
        self.sort_key: tuple[int, int, int] = (0, 0, 0)
        self.reset(RequestStatus.WAITING)

    def reset(self, status: RequestStatus) -> None:
        """Forget the KV (already released): before admission, at preemption and at the end."""
        self.status = status
        self.block_table: BlockTable | None = None
        self.num_computed_tokens = 0
        self.num_published_blocks = 0
        self.published_id: int | str | None = self.cache_salt

    def fork(self, child_id: str, params: SamplingParams) -> Request:
        """A request that continues the same tokens, without KV as yet."""
        child = Request(child_id, self.token_ids, params, self.priority, self.cache_salt)
        child.num_prompt_tokens = self.num_prompt_tokens
        child.max_total_tokens = self.num_prompt_tokens + params.max_tokens
        child.num_cached_tokens = self.num_cached_tokens
        child.awaits_token = self.awaits_token
        child.use_prefix_cache = True  # prompt_logprobs are the parent's to compute
        child.num_seqs = 1
        return child

    @property
    def num_tokens(self) -> int:
        """Tokens known: prompt and output."""
        return len(self.token_ids)

    @property
    def prompt_token_ids(self) -> list[int]:
        return self.token_ids[: self.num_prompt_tokens]

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    def __repr__(self) -> str:
        progress = f"{self.num_computed_tokens}/{self.num_tokens}"
        return f"<Request {self.request_id!r} {self.status.value} computed {progress}>"
