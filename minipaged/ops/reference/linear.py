"""Table look-up and matrix product."""

from __future__ import annotations

import numpy as np


def embedding(ids: np.ndarray, table: np.ndarray) -> np.ndarray:
    """See :meth:`Ops.embedding <minipaged.ops.interface.Ops.embedding>`."""
    return table[ids]


def linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """See :meth:`Ops.linear <minipaged.ops.interface.Ops.linear>`."""
    y = x @ weight.T
    if bias is not None:
        y += bias
    return y
