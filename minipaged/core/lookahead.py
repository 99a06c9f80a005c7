"""Draft tokens in a step: computed ahead of being known, and rolled back where they were wrong.

    known              t │ d0   d1   d2        num_lookahead_tokens = 3
    KV is written      ▓ │ ▓    ▓    ▓
    verified: d0 right, d1 wrong, so x1 is the next known token
    known              t   d0   x1
    KV that is kept    ▓   ▓                   slots behind it, and blocks only they needed, are free again

Draft tokens take what a step leaves over: tokens of its budget and free blocks. For their sake nobody
waits, and nobody is preempted.
"""

from __future__ import annotations

from collections.abc import Mapping

from minipaged.core.block_pool import BlockPool
from minipaged.core.request import Request
from minipaged.core.scheduler_output import SchedulerOutput


def add_draft_tokens(
    output: SchedulerOutput,
    requests: Mapping[str, Request],
    drafts: Mapping[str, list[int]],
    budget: int,
    pool: BlockPool,
) -> None:
    """Let sequences that compute their last known token compute draft tokens behind it.

    Args:
        output: a step, otherwise complete; extended.
        requests: all requests by id.
        drafts: draft token ids by request id.
        budget: tokens that the step may have in all.
    """
    for sequence in output.scheduled:
        draft = drafts.get(sequence.request_id)
        if not draft or not sequence.samples:
            continue
        request = requests[sequence.request_id]
        room = min(budget - output.num_tokens, request.max_total_tokens - 1 - request.num_tokens)
        draft = draft[: max(room, 0)]
        start, end = request.num_tokens, request.num_tokens + len(draft)
        table = request.block_table
        if not draft or table.num_blocks_needed(start, end) > pool.num_free:
            continue
        output.copies += table.append_slots(start, end)
        output.num_tokens += len(draft)
        sequence.token_ids += draft
        sequence.block_ids = table.block_ids
        sequence.num_lookahead_tokens = len(draft)
