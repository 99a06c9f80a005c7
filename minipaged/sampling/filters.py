"""top_k, min_p and top_p: which tokens may be drawn, and how much each weighs.

Semantics are vLLM's (temperature, min_p, top_k, top_p, probabilities renormalised in between):
top_k keeps every token that ties with the k-th; top_p keeps the smallest set of likeliest tokens
whose probability reaches ``top_p``, the one that crosses included, equal ones by lower token id.
min_p and top_k both cut from below, so their order does not matter, and the cheaper goes first.

Weights are ``exp((logit - largest) / temperature)`` in float64: rounding then never decides between
tokens whose float32 logits differ, and another machine, or a GPU, draws the same tokens.
"""

from __future__ import annotations

import numpy as np

_HEAD = 512  # likeliest tokens that top_p looks at before it sorts all


def candidates(row: np.ndarray, largest: float, params) -> tuple[np.ndarray | None, np.ndarray]:
    """The tokens that may be drawn and their weights.

    Args:
        row: processed logits, float32 ``[vocab]``; masked ones are ``-inf``.
        largest: the largest of them, finite.
        params: ``SamplingParams`` with ``temperature > 0``.

    Returns:
        ``(token_ids, weights)``: ids ascending, int64 ``[n]``, or ``None`` for the whole vocabulary;
        weights float64 ``[n]``, not normalised, the largest is 1.
    """
    ids = None
    if 0 < params.top_k < len(row):
        ids = np.flatnonzero(row >= kth_largest(row, params.top_k))
        row = row[ids]
    weights = np.subtract(row, largest, dtype=np.float64)
    weights /= params.temperature
    np.exp(weights, out=weights)
    for wanted, keep in ((params.min_p > 0, _min_p), (params.top_p < 1, _top_p)):
        if wanted:
            kept = np.flatnonzero(keep(weights, params))
            ids = kept if ids is None else ids[kept]
            weights = weights[kept]
    return ids, weights


def _min_p(weights: np.ndarray, params) -> np.ndarray:
    return weights >= params.min_p  # the likeliest weighs 1


def _top_p(weights: np.ndarray, params) -> np.ndarray:
    """Which entries form the nucleus (Holtzman et al. 2020, https://arxiv.org/abs/1904.09751)."""
    goal = params.top_p * weights.sum()
    # The nucleus is mostly small: sort a head of the likeliest, and all only if that does not reach.
    for threshold in (kth_largest(weights, min(_HEAD, len(weights))), 0.0):
        head = np.sort(weights[weights >= threshold])[::-1]
        cumulative = np.cumsum(head)
        if cumulative[-1] >= goal:
            break
    count = min(int(np.searchsorted(cumulative, goal)) + 1, len(head))
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
