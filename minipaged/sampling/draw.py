"""One draw by inverse CDF, tokens in id order."""

from __future__ import annotations

import numpy as np

_CHUNK = 256  # weights summed together; a running sum of all would cost most of the draw
_START = np.zeros(1, dtype=np.intp)


def draw(weights: np.ndarray, uniform: float) -> int:
    """The index ``i`` with ``cdf[i - 1] <= uniform * total < cdf[i]``.

    The CDF is summed in two levels: over chunks of 256 entries, then inside the one that is hit. A
    GPU that sums in another order differs by 1e-16 of the total, and so in one draw of 1e13 or so.

    Args:
        weights: float64 ``[n]``, none negative, not all zero; an entry of weight zero is never drawn.
        uniform: from [0, 1).
    """
    if len(weights) <= _CHUNK:  # as below, where there is one chunk
        cdf, total = np.cumsum(weights), np.add.reduceat(weights, _START)[0]
        index = int(np.searchsorted(cdf, uniform * total, side="right"))
        return index if index < len(cdf) else int(np.flatnonzero(weights)[-1])
    chunk_cdf = np.cumsum(np.add.reduceat(weights, np.arange(0, len(weights), _CHUNK)))
    total = chunk_cdf[-1]
    target = uniform * total
    # Rounding may lift the target to the total: then it belongs to the last chunk that has weight.
    chunk = min(np.searchsorted(chunk_cdf, target, side="right"), np.searchsorted(chunk_cdf, total))
    inside = weights[chunk * _CHUNK : (chunk + 1) * _CHUNK]
    cdf = np.cumsum(inside)
    if chunk > 0:
        cdf += chunk_cdf[chunk - 1]
    index = int(np.searchsorted(cdf, target, side="right"))
    if index == len(inside):
        index = int(np.flatnonzero(inside)[-1])
    return int(chunk) * _CHUNK + index
