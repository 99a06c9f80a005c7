"""top_k, min_p and top_p: which tokens may be drawn, and how much each weighs.

Semantics are vLLM's (temperature, min_p, top_k, top_p, probabilities renormalised in between):
top_k keeps every token that ties with the k-th; top_p keeps the smallest set of likeliest tokens
whose probability reaches ``top_p``, the one that crosses included, equal ones by lower token id.
min_p and top_k both cut from below, so their order does not matter, and the cheaper goes first.

Weights are ``exp((logit - largest) / temperature)`` in float64: its rounding is a billion times finer
than a step between float32 logits, so another machine, or a GPU, draws the same tokens.
"""

from __future__ import annotations

import numpy as np

from minipaged.ops.sampling import few

_FAR = 700  # exp(-700) is a normal number


def weigh(row: np.ndarray, largest: float, temperature: float) -> np.ndarray:
    """``exp((row - largest) / temperature)`` of float32 logits, in float64."""
    weights = np.subtract(row, largest, dtype=np.float64)
    weights /= temperature
    return np.exp(weights, out=weights)


def weigh_masked(row: np.ndarray, largest: float, temperature: float) -> np.ndarray:
    """As :func:`weigh`, sooner where many logits are ``-inf``, whose weight is 0.

    NumPy's exp is several times slower where it finds zeros, so it is given something else in their place.
    """
    left, floor = row > -np.inf, np.float32(largest - _FAR * temperature)
    if np.count_nonzero(row >= floor) < np.count_nonzero(left):  # a logit would be changed
        return weigh(row, largest, temperature)
    weights = weigh(np.maximum(row, floor), largest, temperature)
    weights *= left
    return weights


def candidates(row: np.ndarray, largest: float, params, masked: bool = False) -> tuple[np.ndarray | None, np.ndarray]:
    """The tokens that may be drawn and their weights.

    Args:
        row: processed logits, float32 ``[vocab]``; masked ones are ``-inf``.
        largest: the largest of them, finite.
        params: ``SamplingParams`` with ``temperature > 0``.
        masked: whether some logits may be ``-inf``.

    Returns:
        ``(token_ids, weights)``: ids ascending, int64 ``[n]``, or ``None`` for the whole vocabulary;
        weights float64 ``[n]``, not normalised, the largest is 1.
    """
    ids, mixed = None, False
    if masked:
        left = row > -np.inf
        count = np.count_nonzero(left)
        mixed = count < len(row)
        if few(count, len(row)):
            ids, mixed = np.flatnonzero(left), False
            row = row[ids]
    if 0 < params.top_k < len(row):
        kept = np.flatnonzero(row >= kth_largest(row, params.top_k))
        ids = kept if ids is None else ids[kept]
        row = row[kept]
    weights = (weigh_masked if mixed else weigh)(row, largest, params.temperature)
    if params.min_p > 0:  # of the likeliest, which weighs 1
        ids, weights = _select(ids, weights, weights >= params.min_p)
    if params.top_p < 1:
        ids, weights = _select(ids, weights, nucleus(weights, params.top_p))
    return ids, weights


def _select(ids: np.ndarray | None, weights: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    kept = np.flatnonzero(mask)
    return kept if ids is None else ids[kept], weights[kept]


def nucleus(weights: np.ndarray, top_p: float) -> np.ndarray:
    """Mask of the smallest set of heaviest entries that holds ``top_p`` of the total weight.

    Source: Holtzman et al. 2020, https://arxiv.org/abs/1904.09751.
    """
    total = weights.sum()
    # Entries below their even share of what the nucleus may leave out are never needed to reach
    # top_p (all of them together weigh less than that), so the tail of the vocabulary is not sorted.
    head = np.sort(weights[weights >= (1 - top_p) * total / len(weights)])[::-1]
    crossing = int(np.searchsorted(np.cumsum(head), top_p * total))
    count = min(crossing + 1, len(head))  # rounding may put the goal just beyond the last sum
    smallest = head[count - 1]
    kept = weights >= smallest
    ties = np.flatnonzero(weights == smallest)
    kept[ties[count - np.count_nonzero(head > smallest) :]] = False
    return kept


def kth_largest(values: np.ndarray, k: int):
    """The k-th largest of ``values`` (1 <= k <= length), without sorting them all.

    The k-th largest of many groups' maxima is a floor that at least k values reach, and few more;
    the exact answer is then found among those.
    """
    num_groups = 16 * k
    size = len(values) // num_groups
    if size >= 4:
        maxima = values[: size * num_groups].reshape(size, num_groups).max(axis=0)
        values = values[values >= np.partition(maxima, num_groups - k)[num_groups - k]]
    return np.partition(values, len(values) - k)[len(values) - k]
