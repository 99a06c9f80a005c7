"""Sequences forked from one request: which they are, and what of their KV is the same."""

from __future__ import annotations

from minipaged.core.request import Request


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
