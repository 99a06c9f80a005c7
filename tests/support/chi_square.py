"""Pearson's chi-square, without SciPy."""

from __future__ import annotations

import math

import numpy as np


def p_value(statistic: float, degrees: int) -> float:
    """Chance of a larger statistic (Wilson and Hilferty 1931: its cube root is nearly normal)."""
    spread = 2 / (9 * degrees)
    z = ((statistic / degrees) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)
    return 0.5 * math.erfc(z / math.sqrt(2))


def pooled(counts: np.ndarray, sizes: np.ndarray, least: float = 10) -> np.ndarray:
    """Columns of ``counts`` ``[n, bins]``, those where ``sizes`` is below ``least`` added up into one."""
    rare = sizes < least
    return np.column_stack([counts[:, ~rare], counts[:, rare].sum(axis=1)])


def goodness_of_fit(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """p-value of counts ``[bins]`` if drawn with these probabilities."""
    expected = probabilities * counts.sum()
    observed, expected = pooled(np.stack([counts, expected]), expected)
    kept = expected > 0
    assert observed[~kept].sum() == 0, "drawn what has no probability"
    return p_value(float(((observed - expected)[kept] ** 2 / expected[kept]).sum()), int(kept.sum()) - 1)


def same_source(first: np.ndarray, second: np.ndarray) -> float:
    """p-value of two lists of counts ``[bins]`` if drawn with the same, unknown, probabilities."""
    table = np.stack([first, second])
    table = pooled(table, table.sum(axis=0), least=20)
    table = table[:, table.sum(axis=0) > 0]
    expected = table.sum(axis=1, keepdims=True) * table.sum(axis=0) / table.sum()
    return p_value(float(((table - expected) ** 2 / expected).sum()), table.shape[1] - 1)
