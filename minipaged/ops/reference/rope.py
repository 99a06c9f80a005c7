"""Rotary position embedding (Su et al., 2021), half-split layout."""

from __future__ import annotations

import numpy as np


def rope(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> None:
    """See :meth:`Ops.rope <minipaged.ops.interface.Ops.rope>`."""
    half = cos.shape[-1]
    cos, sin = cos[:, None, :], sin[:, None, :]  # one row for all heads of a token
    first, second = x[..., :half], x[..., half : 2 * half]
    rotated = second * cos
    rotated += first * sin
    first *= cos
    first -= second * sin
    second[...] = rotated
