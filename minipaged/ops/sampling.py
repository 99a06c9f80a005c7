"""What a backend that samples by itself is asked about rows of logits, and what it answers.

A step's logits stay where they were computed; what travels is one :class:`Ask` for each token that is to be drawn,
or is only to be told about, and its part of the :class:`Answers`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

MAX_TOP = 64
"""Likeliest tokens that are found for an ask, at most: each takes one more pass over the row."""


def few(count: int, vocab_size: int) -> bool:
    """Whether so many tokens, at least one, are cheaper to handle by themselves than in a row of all.

    It decides in which order weights are summed, so everybody who leaves tokens out must ask here.
    """
    return 0 < count < vocab_size // 4


@dataclass(slots=True)
class Edits:
    """What a request does to its row before the temperature, in the order of the fields.

    Token ids are distinct within ``allowed``, ``biased`` and ``seen``.
    """

    allowed: np.ndarray | None = None  #: int [n]; all other tokens are masked
    masked: list[np.ndarray] = field(default_factory=list)  #: token ids, int [n] each
    biased: np.ndarray | None = None  #: int [n]; ``bias`` is added to their logits
    bias: np.ndarray | None = None  #: float32 [n]
    seen: np.ndarray | None = None  #: int [n]; tokens that penalties apply to
    counts: np.ndarray | None = None  #: float32 [n], how often each was generated
    penalties: tuple[float, float, float] = (0.0, 0.0, 1.0)  #: presence, frequency, repetition
    bits: np.ndarray | None = None  #: uint8 [vocab_size / 8], rounded up: a bit for each token that may follow
    ended: bool = False  #: the tokens with a bit get the logit 0

    @property
    def num_words(self) -> int:
        """Words of 4 bytes that all of it takes, at most."""
        arrays = (self.allowed, *self.masked, self.biased, self.bias, self.seen, self.counts)
        bits = 0 if self.bits is None else -(-len(self.bits) // 4)
        return bits + sum(len(array) for array in arrays if array is not None)


@dataclass(slots=True)
class Draw:
    """How a token is drawn; the random number is that of ``seed`` (0 to 2**64 - 1) and ``position``."""

    temperature: float = 0.0  #: 0 is greedy
    top_k: int = 0  #: 0 keeps all
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    position: int = 0
    edits: Edits | None = None


@dataclass(slots=True)
class Ask:
    """About one row of a step's logits: a token to draw, log-probabilities to tell, or the row itself.

    ``num_top``: how many of the likeliest tokens to tell beside the log-probability and the rank of the token
    ``about`` (-1: of the one that is drawn); -1: nothing of that kind. ``whole``: the row is to be sent.
    """

    row: int
    draw: Draw | None = None
    about: int = -1
    num_top: int = -1
    whole: bool = False


NOT_FINITE, ALL_MASKED, OVERFLOWED = -1, -2, -3
"""In place of a token: the model's logits are not finite; no token is left; an edit made a logit infinite."""


class Answers:
    """By the number of the ask; what was not asked for is undefined.

    Attributes:
        tokens: int32 ``[A, 2]``: the token drawn, or why there is none; and the likeliest of the row as it was.
        logprobs: float64 ``[A]``.
        ranks: int32 ``[A]``, 1 for the likeliest; 0: the row holds NaN or infinity, and nothing is known of it.
        top: ``(token ids, log-probabilities)`` of the likeliest, of equal ones the lower id first.
        rows: float32 ``[vocab_size]`` for each ask of a whole row.
    """

    def __init__(self, num_asks: int):
        self.tokens = np.full((num_asks, 2), NOT_FINITE, np.int32)
        self.logprobs = np.full(num_asks, np.nan)
        self.ranks = np.zeros(num_asks, np.int32)
        self.top: dict[int, tuple[list[int], list[float]]] = {}
        self.rows: dict[int, np.ndarray] = {}
