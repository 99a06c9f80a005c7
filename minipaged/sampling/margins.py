"""How near a choice was to another one: for tests that compare two computations of the same logits.

Written plainly, with full sorts: it serves the tests of the equivalence law, not the hot path.
"""

from __future__ import annotations

import numpy as np


def gap(row: np.ndarray) -> float:
    """Between the two largest of float32 logits ``[vocab]``."""
    largest = np.sort(row)[-2:].astype(np.float64)
    return float(largest[-1] - largest[0]) if len(largest) > 1 else np.inf


def margin(row: np.ndarray, params, uniform: float) -> float:
    """Distance of a choice from the nearest point where it would have been another.

    Greedy: the gap between the two largest logits. Sampled: the smallest of the distance of the
    draw from a boundary of the CDF (as a probability), and of how nearly a token passed or failed
    top_k (logits), min_p (share of the likeliest) or top_p (probability).

    Args:
        row: processed logits, float32 ``[vocab]``, the largest finite.
        params: ``SamplingParams``.
        uniform: the random number of the draw, from [0, 1).
    """
    order = np.argsort(-row, kind="stable")
    logits = row[order].astype(np.float64)
    if params.greedy:
        return float(logits[0] - logits[1]) if len(logits) > 1 else np.inf
    distances = []
    kept = len(logits)
    if 0 < params.top_k < kept:
        kth = logits[params.top_k - 1]
        kept = np.count_nonzero(logits >= kth)
        if kept < len(logits):
            distances.append(kth - logits[kept])
    weights = np.exp((logits - logits[0]) / params.temperature)
    if params.min_p > 0:
        distances.append(np.abs(weights[1:kept] - params.min_p).min(initial=np.inf))
        kept = min(kept, np.count_nonzero(weights >= params.min_p))
    if params.top_p < 1:
        cdf = np.cumsum(weights[:kept]) / weights[:kept].sum()
        distances.append(np.abs(cdf[:-1] - params.top_p).min(initial=np.inf))
        crossing = int(np.searchsorted(cdf, params.top_p)) + 1
        if crossing < kept:
            distances.append(weights[crossing - 1] - weights[crossing])
            kept = crossing
    by_id = np.argsort(order[:kept])
    cdf = np.cumsum(weights[:kept][by_id]) / weights[:kept].sum()
    distances.append(np.abs(cdf[:-1] - uniform).min(initial=np.inf))
    return float(min(distances))
