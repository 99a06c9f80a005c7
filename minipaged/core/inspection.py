"""What a scheduler can tell about itself: its counters, and whether it keeps its laws."""

from __future__ import annotations

from typing import TYPE_CHECKING

from minipaged.core.order import by_sort_key
from minipaged.core.request import RequestStatus
from minipaged.errors import IntegrityError

if TYPE_CHECKING:
    from minipaged.core.scheduler import Scheduler


def stats(scheduler: Scheduler) -> dict[str, int]:
    """The fields of ``EngineStats`` that the scheduler knows."""
    pool = scheduler.pool
    tables = [request.block_table.blocks for request in scheduler.running]
    return {
        "num_requests_waiting": len(scheduler.waiting),
        "num_requests_running": len(scheduler.running),
        "num_requests_finished": scheduler.num_requests_finished,
        "num_steps": scheduler.num_steps,
        "num_prompt_tokens_computed": scheduler.num_prompt_tokens_computed,
        "num_prompt_tokens_cached": scheduler.num_prompt_tokens_cached,
        "num_generated_tokens": scheduler.num_generated_tokens,
        "num_preemptions": scheduler.num_preemptions,
        "num_blocks_total": pool.num_blocks,
        "num_blocks_used": pool.num_blocks - pool.num_free,
        "num_blocks_shared": len({block.block_id for table in tables for block in table if block.ref_cnt > 1}),
        "num_block_references": sum(map(len, tables)),
        "num_blocks_cached": pool.num_cached,
        "num_blocks_evicted": pool.num_evicted,
        "num_blocks_copied": scheduler.num_blocks_copied,
        "num_host_blocks_total": scheduler.swap.num_blocks,
        "num_host_blocks_used": scheduler.swap.num_blocks - scheduler.swap.num_free,
        "num_blocks_swapped_out": scheduler.swap.num_swapped_out,
        "num_blocks_swapped_in": scheduler.swap.num_swapped_in,
        "block_size": scheduler.config.block_size,
    }


def check(scheduler: Scheduler) -> None:
    """Verify that nothing is lost or in two places. O(blocks + requests).

    Raises:
        IntegrityError: a bug in minipaged, with what was found.
    """
    waiting, running = scheduler.waiting, scheduler.running
    scheduler.pool.check(request.block_table.blocks for request in running)
    scheduler.swap.check(waiting, running)
    known = sorted(scheduler.requests.values(), key=by_sort_key)
    if known != sorted(waiting + running, key=by_sort_key):
        raise IntegrityError("the requests known are not those waiting or running.")
    for queue, status in ((waiting, RequestStatus.WAITING), (running, RequestStatus.RUNNING)):
        if queue != sorted(queue, key=by_sort_key):
            raise IntegrityError(f"the {status.value} requests are out of order.")
        for request in queue:
            if request.status is not status:
                raise IntegrityError(f"{request!r} is in the queue of {status.value} requests.")
    for request in running:
        if request.block_table.capacity < request.num_computed_tokens:
            raise IntegrityError(f"{request!r} has blocks for {request.block_table.capacity} tokens only.")
