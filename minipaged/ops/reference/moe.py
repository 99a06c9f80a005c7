"""Mixture of experts as in Mixtral (Jiang et al., 2024) and Qwen3-MoE."""

from __future__ import annotations

import numpy as np

from minipaged.ops.reference.activations import gated_activation


def route(
    x: np.ndarray, router: np.ndarray, experts_per_token: int, normalize: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The experts of each token, ``[n, k]``, and their weights, ``[n, k]``."""
    scores = x @ router.T
    probabilities = np.exp(scores - scores.max(axis=-1, keepdims=True))
    probabilities /= probabilities.sum(axis=-1, keepdims=True)
    chosen = np.argsort(-probabilities, axis=-1, kind="stable")[:, :experts_per_token]
    weights = np.take_along_axis(probabilities, chosen, axis=-1)
    if normalize:
        weights /= weights.sum(axis=-1, keepdims=True)
    return chosen, weights


def moe(
    x: np.ndarray,
    router: np.ndarray,
    gate_up: np.ndarray,
    down: np.ndarray,
    experts_per_token: int,
    normalize: bool,
    activation: str,
) -> np.ndarray:
    """See :meth:`Ops.moe <minipaged.ops.interface.Ops.moe>`."""
    chosen, weights = route(x, router, experts_per_token, normalize)
    y = np.zeros_like(x)
    for expert in np.unique(chosen):
        rows, choice = np.nonzero(chosen == expert)
        hidden = gated_activation(activation, x[rows] @ gate_up[expert].T)
        y[rows] += (hidden @ down[expert].T) * weights[rows, choice, None]
    return y
