"""The order of requests, and which of them stand together because they were forked from one."""

from __future__ import annotations

import bisect

from minipaged.core.request import Request


def by_sort_key(request: Request) -> tuple[int, int, int]:
    """Key of the order: (priority, arrival, fork); the priority is 0 for all under ``fcfs``."""
    return request.sort_key


def insert(queue: list[Request], request: Request) -> None:
    """Put a request into its place."""
    bisect.insort(queue, request, key=by_sort_key)


def delete(queue: list[Request], request: Request) -> None:
    """Take a request out of a queue that has it."""
    del queue[bisect.bisect_left(queue, request.sort_key, key=by_sort_key)]


def yields(running: Request, urgent: Request, awaited: bool) -> bool:
    """Whether a running request makes place for one that waits: if its priority is lower, or, where
    running siblings await the other, if it stands behind them all."""
    if awaited:
        return running.sort_key[:2] > urgent.sort_key[:2]
    return running.sort_key[0] > urgent.sort_key[0]


def siblings(request: Request, others: list[Request]) -> list[Request]:
    """Those of ``others`` that were forked from the same request as ``request``."""
    group = request.sort_key[:2]
    return [other for other in others if other.sort_key[:2] == group and other is not request]


def num_common_blocks(request: Request, sibling: Request, block_size: int) -> int:
    """Full blocks at the beginning whose tokens are equal and computed by ``sibling``.

    The last token of ``request`` is left out: its logits are needed.
    """
    count = min(sibling.num_computed_tokens, request.num_tokens - 1) // block_size
    while count and request.token_ids[: count * block_size] != sibling.token_ids[: count * block_size]:
        count -= 1
    return count
