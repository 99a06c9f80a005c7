"""RMSNorm (Zhang and Sennrich, 2019) and LayerNorm (Ba et al., 2016)."""

from __future__ import annotations

import numpy as np


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """See :meth:`Ops.rms_norm <minipaged.ops.interface.Ops.rms_norm>`."""
    y = x * x
    # add.reduce and not mean: the wrapper of mean costs more than the sum of one token's row.
    mean_square = np.add.reduce(y, axis=-1, keepdims=True)
    mean_square /= x.shape[-1]
    mean_square += eps
    np.sqrt(mean_square, out=mean_square)
    np.divide(x, mean_square, out=y)
    y *= weight
    return y


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, eps: float) -> np.ndarray:
    """See :meth:`Ops.layer_norm <minipaged.ops.interface.Ops.layer_norm>`."""
    centred = x - np.add.reduce(x, axis=-1, keepdims=True) / x.shape[-1]
    y = rms_norm(centred, weight, eps)  # the variance is the mean square of what is centred
    if bias is not None:
        y += bias
    return y
