"""Pointwise functions of the feed-forward part and of soft-capped scores."""

from __future__ import annotations

import math

import numpy as np

# erf as x * P(x²) / Q(x²) on |x| <= 3.8325, beyond which float32 rounds it to ±1; the coefficients
# are Eigen's (also used by XLA), highest power first.
_ERF_LIMIT = 3.832506856900711
_ERF_P = (2.2905065861350646e-4, 3.4082910107109506e-3, 5.0955695062380861e-2, 0.18520832239976145, 1.128379143519084)
_ERF_Q = (
    -1.1791602954361697e-7,
    2.3547966471313185e-5,
    1.0179625278914885e-3,
    1.4070470171167667e-2,
    0.11098505178285362,
    0.49746925110067538,
    1.0,
)


def _polynomial(x: np.ndarray, coefficients: tuple[float, ...]) -> np.ndarray:
    y = np.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        y *= x
        y += np.float32(c)
    return y


def erf(x: np.ndarray) -> np.ndarray:
    """The error function of float32 values, within 4e-7 (NumPy has none)."""
    inner = np.clip(x, -_ERF_LIMIT, _ERF_LIMIT)
    square = inner * inner
    y = inner * _polynomial(square, _ERF_P) / _polynomial(square, _ERF_Q)
    return np.where(inner == x, y, np.sign(x))


def silu(x: np.ndarray) -> np.ndarray:
    """``x * sigmoid(x)``, as x / (1 + exp(-x)): exp overflows to infinity below -88, which gives the right 0."""
    y = np.negative(x)
    with np.errstate(over="ignore"):
        np.exp(y, out=y)
    y += 1
    return np.divide(x, y, out=y)


def gelu(x: np.ndarray) -> np.ndarray:
    """``x * Phi(x)`` with the normal distribution function (Hendrycks and Gimpel, 2016)."""
    return 0.5 * x * (1 + erf(x * np.float32(math.sqrt(0.5))))


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    """The tanh approximation of gelu, which GPT-2 and Gemma were trained with."""
    y = x * x
    y *= np.float32(0.044715)
    y += 1
    y *= x
    y *= np.float32(math.sqrt(2 / math.pi))
    np.tanh(y, out=y)
    y += 1
    y *= x
    y *= 0.5
    return y


ACTIVATIONS = {"silu": silu, "gelu": gelu, "gelu_tanh": gelu_tanh}


def activation(name: str, x: np.ndarray) -> np.ndarray:
    """See :meth:`Ops.activation <minipaged.ops.interface.Ops.activation>`."""
    return ACTIVATIONS[name](x)


def gated_activation(name: str, gate_up: np.ndarray) -> np.ndarray:
    """See :meth:`Ops.gated_activation <minipaged.ops.interface.Ops.gated_activation>`."""
    half = gate_up.shape[-1] // 2
    y = ACTIVATIONS[name](gate_up[:, :half])
    y *= gate_up[:, half:]
    return y


def soft_cap(x: np.ndarray, cap: float) -> np.ndarray:
    """See :meth:`Ops.soft_cap <minipaged.ops.interface.Ops.soft_cap>`."""
    y = x / cap
    np.tanh(y, out=y)
    y *= cap
    return y
