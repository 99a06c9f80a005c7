"""The few summary numbers that the reports use."""

from __future__ import annotations

import math


def median(values: list[float]) -> float:
    """The middle value, or the mean of the two middle ones."""
    return percentile(values, 50)


def percentile(values: list[float], percent: float) -> float:
    """Linear interpolation between the closest ranks, as ``numpy.percentile`` does."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low, high = math.floor(position), math.ceil(position)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def summary(values: list[float]) -> dict:
    """``median``, ``min``, ``max``, ``p99`` and all the ``values`` themselves."""
    return {
        "median": median(values),
        "p99": percentile(values, 99),
        "min": min(values),
        "max": max(values),
        "values": list(values),
    }
