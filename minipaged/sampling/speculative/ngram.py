"""Prompt lookup: what followed the last few tokens when they occurred before?

    … the king of France … said the king of ▮
          └────┬────┘ │             └───┬──┘
          occurred before, and "France" followed: propose it and what comes after it

Costs no model at all, and pays wherever text repeats itself: code, quotations, summaries, lists.
Source: Saxena 2023, "Prompt Lookup Decoding", https://github.com/apoorvumang/prompt-lookup-decoding.
"""

from __future__ import annotations

import time
from collections.abc import Collection

from minipaged.core.request import Request
from minipaged.sampling.speculative.cost import LinearCost
from minipaged.sampling.speculative.proposer import DraftWish

LONGEST, SHORTEST = 3, 2  # tokens that must match; the longest match is tried first


class NgramIndex:
    """Where each n-gram of a growing sequence was last seen. A new token costs O(1)."""

    def __init__(self, longest: int = LONGEST, shortest: int = SHORTEST):
        self._lengths = range(longest, shortest - 1, -1)
        self._followers: list[dict[tuple[int, ...], int]] = [{} for _ in self._lengths]
        self._num_indexed = 0

    def update(self, token_ids: list[int]) -> None:
        """Take in the tokens that came since; ``token_ids`` is the whole sequence."""
        for n, followers in zip(self._lengths, self._followers, strict=True):
            first = max(self._num_indexed, n)  # the first position whose n-gram is new
            tokens = token_ids[first - n :]
            ngrams = zip(*(tokens[i:] for i in range(n)), strict=False)
            followers.update(zip(ngrams, range(first, len(token_ids)), strict=False))  # no loop in Python: it is hot
        self._num_indexed = len(token_ids)

    def continuation(self, token_ids: list[int], num_tokens: int) -> list[int]:
        """``num_tokens`` tokens that followed the longest known match of the sequence's end, or none.

        Where the match reaches into the end itself, what it proposes is copied on, as in LZ77: a
        sequence of period p is continued with period p.
        """
        for n, followers in zip(self._lengths, self._followers, strict=True):
            start = followers.get(tuple(token_ids[-n:]))
            if start is not None:
                draft = token_ids[start : start + num_tokens]
                period = len(token_ids) - start
                while len(draft) < num_tokens:
                    draft.append(draft[-period])
                return draft
        return []


class NgramProposer:
    """Proposes by lookup in the sequence's own prompt and output."""

    round_each_token = False
    cost_share = 0.0

    def __init__(self, longest: int = LONGEST, shortest: int = SHORTEST):
        self.cost = LinearCost()
        self.seconds = 0.0
        self._lengths = longest, shortest
        self._indices: dict[Request, NgramIndex] = {}

    def propose(self, wishes: list[DraftWish]) -> list[list[int]]:
        """See :class:`Proposer`."""
        started = time.perf_counter()
        drafts = [self._propose(wish) for wish in wishes]
        if wishes:
            self.seconds += self.cost.observe(len(wishes), time.perf_counter() - started)
        return drafts

    def _propose(self, wish: DraftWish) -> list[int]:
        index = self._indices.get(wish.request)
        if index is None:
            index = self._indices[wish.request] = NgramIndex(*self._lengths)
        index.update(wish.request.token_ids)
        return index.continuation(wish.request.token_ids, wish.num_tokens)

    def backlog(self, request: Request) -> int:
        """See :class:`Proposer`."""
        return 0

    def retain(self, requests: Collection[Request]) -> None:
        """See :class:`Proposer`."""
        for request in self._indices.keys() - requests:
            del self._indices[request]

    def close(self) -> None:
        """See :class:`Proposer`."""
        self._indices.clear()
