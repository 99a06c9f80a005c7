"""Log-probabilities and ranks, from the model's own logits (before any sampling parameter)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from minipaged.errors import NumericalError
from minipaged.sampling.filters import kth_largest


@dataclass(slots=True)
class TokenLogprobs:
    """One token at one position: natural-log probability, rank (1 = likeliest), and the likeliest.

    ``top`` is ``(token_ids, logprobs)``, likeliest first. Of equal logits the lower id comes first,
    in ``top`` and in ``rank``.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[list[int], list[float]]


def token_logprobs(row: np.ndarray, token_id: int, k: int) -> TokenLogprobs:
    """Log-softmax of finite float32 logits ``[vocab]`` at ``token_id`` and at the ``k`` likeliest."""
    total = log_total(row)
    chosen = row[token_id]
    rank = int(np.count_nonzero(row > chosen) + np.count_nonzero(row[: token_id + 1] == chosen))
    ids = likeliest(row, min(k, len(row)))
    top = ids.tolist(), (row[ids].astype(np.float64) - total).tolist()
    return TokenLogprobs(token_id, float(chosen) - total, rank, top)


def prompt_logprobs(logits: np.ndarray, token_ids: list[int], k: int) -> list[TokenLogprobs]:
    """Log-probabilities of prompt tokens.

    Args:
        logits: float32 ``[P, vocab]``; row ``i`` is the model's prediction of ``token_ids[i]``.
        token_ids: the tokens that did follow, ``[P]``.
        k: how many of the likeliest to report beside each.

    Raises:
        NumericalError: a logit is NaN or infinite.
    """
    if not np.isfinite(logits).all():
        row = int(np.flatnonzero(~np.isfinite(logits).all(axis=1))[0])
        raise NumericalError(f"the model's logits for prompt token {token_ids[row]} hold NaN or infinity.")
    return [token_logprobs(row, int(token_id), k) for row, token_id in zip(logits, token_ids, strict=True)]


def log_total(row: np.ndarray) -> float:
    """Logarithm of the sum of exponentials of finite float32 logits ``[vocab]``."""
    largest = row.max()
    return float(largest) + math.log(np.exp(row - largest).sum(dtype=np.float64))


def likeliest(row: np.ndarray, k: int) -> np.ndarray:
    """The ids of the ``k`` largest, largest first; of equal ones the lower id first."""
    if k == 0:
        return np.empty(0, dtype=np.int64)
    ids = np.flatnonzero(row >= kth_largest(row, k))
    return ids[np.argsort(-row[ids], kind="stable")[:k]]
