"""What every proposer of draft tokens offers, and what it is told of a sequence."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from minipaged.core.request import Request
from minipaged.sampling.speculative.cost import LinearCost
from minipaged.sampling.state import SamplingState


@dataclass(slots=True)
class DraftWish:
    """A sequence that could use draft tokens: all its tokens but the last are computed.

    Attributes:
        request: its tokens; only read.
        sampling: how its next tokens will be sampled; only read.
        num_tokens: draft tokens wanted, at least 1.
    """

    request: Request
    sampling: SamplingState
    num_tokens: int


class Proposer(Protocol):
    """Guesses continuations. A wrong guess costs time, never correctness.

    Attributes:
        cost: seconds of a round over the sequences (or tokens) in it, as measured.
        seconds: spent on guessing in all, without what disturbed it.
        cost_share: what a round is expected to cost of a step of the target, before any was measured.
        round_each_token: whether each further draft token costs another round, or all come at once.
    """

    cost: LinearCost
    seconds: float
    cost_share: float
    round_each_token: bool

    def propose(self, wishes: list[DraftWish]) -> list[list[int]]:
        """For each wish at most ``num_tokens`` token ids, likely to follow; none is a fair answer."""

    def backlog(self, request: Request) -> int:
        """Tokens to be computed before the first draft token of ``request``."""

    def retain(self, requests: Collection[Request]) -> None:
        """Forget every request but these."""

    def close(self) -> None:
        """Give back what the proposer holds."""
