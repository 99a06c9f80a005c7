"""Rotary position embedding: frequencies of every supported scaling, as tables of cosines and sines.

A pair of values of a head is turned by the angle ``position * frequency``; pair ``i`` has the
frequency ``theta ** (-2 i / rotary_dim)`` (Su et al., "RoFormer", 2021). Scalings change the
frequencies, so that a model can read further than it was trained.

Two of them, ``dynamic`` and ``longrope``, depend on how long a sequence is, and Hugging Face
changes their frequencies while a sequence grows: keys already in the cache then belong to other
frequencies than new ones. Here the length is ``max_positions`` (the engine's ``max_model_len``),
fixed before the first token. So the KV of a token depends on nothing but the tokens before it,
which sharing, caching and recomputing it need; and lowering ``max_model_len`` to the original
length selects the unscaled (``dynamic``) or short (``longrope``) frequencies.
"""

from __future__ import annotations

import math

import numpy as np

from minipaged.errors import UnsupportedModelError
from minipaged.model.config import RopeConfig


def rope_tables(rope: RopeConfig, max_positions: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines, each float32 ``[max_positions, rotary_dim / 2]``, for positions from 0.

    The factor by which ``yarn`` and ``longrope`` stretch queries and keys is multiplied in.
    """
    if rope.scaling not in _SCALINGS:
        raise UnsupportedModelError(f"rope scaling {rope.scaling!r} is not implemented; known: {', '.join(_SCALINGS)}.")
    frequencies, stretch = _SCALINGS[rope.scaling](rope, max_positions)
    # Angles are float32 products, as where these models were trained: at position 100,000 the
    # rounding of a float32 angle is larger than anything a better cosine could win back.
    angles = np.arange(max_positions, dtype=np.float32)[:, None] * frequencies.astype(np.float32)
    cos, sin = np.cos(angles), np.sin(angles)
    if stretch != 1.0:
        cos *= np.float32(stretch)
        sin *= np.float32(stretch)
    return cos, sin


def _frequencies(theta: float, rotary_dim: int) -> np.ndarray:
    return theta ** (-np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim)


def _none(rope: RopeConfig, max_positions: int) -> tuple[np.ndarray, float]:
    return _frequencies(rope.theta, rope.rotary_dim), 1.0


def _linear(rope: RopeConfig, max_positions: int) -> tuple[np.ndarray, float]:
    """Position interpolation (Chen et al., 2023): every frequency divided by ``factor``."""
    return _frequencies(rope.theta, rope.rotary_dim) / rope.parameters["factor"], 1.0


def _dynamic(rope: RopeConfig, max_positions: int) -> tuple[np.ndarray, float]:
    """NTK-aware interpolation (bloc97 and emozilla, 2023): a larger base the longer the sequence."""
    factor, dim = rope.parameters["factor"], rope.rotary_dim
    growth = max(max_positions / rope.parameters["original_max_position_embeddings"], 1.0)
    theta = rope.theta * (factor * growth - (factor - 1)) ** (dim / (dim - 2))
    return _frequencies(theta, dim), 1.0


def _llama3(rope: RopeConfig, max_positions: int) -> tuple[np.ndarray, float]:
    """Llama 3.1: long wavelengths divided by ``factor``, short ones kept, a ramp between the two."""
    p = rope.parameters
    frequencies = _frequencies(rope.theta, rope.rotary_dim)
    turns = p["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    keep = np.clip((turns - p["low_freq_factor"]) / (p["high_freq_factor"] - p["low_freq_factor"]), 0.0, 1.0)
    return keep * frequencies + (1 - keep) * frequencies / p["factor"], 1.0


def _yarn(rope: RopeConfig, max_positions: int) -> tuple[np.ndarray, float]:
    """YaRN (Peng et al., 2023): as ``llama3`` with a ramp over the pair's index, and sharper attention."""
    p, dim = rope.parameters, rope.rotary_dim
    factor = p["factor"]

    def pair_with(turns: float) -> float:  # the pair that turns this often over the original length
        length = p["original_max_position_embeddings"]
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_with(p.get("beta_fast") or 32), pair_with(p.get("beta_slow") or 1)
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001
    interpolate = np.clip((np.arange(dim // 2) - low) / width, 0.0, 1.0)
    frequencies = _frequencies(rope.theta, dim)
    return frequencies * (1 - interpolate) + frequencies / factor * interpolate, _yarn_stretch(p)


def _yarn_stretch(p: dict) -> float:
    if p.get("attention_factor") is not None:
        return p["attention_factor"]

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(p["factor"]) + 1.0 if p["factor"] > 1 else 1.0

    if p.get("mscale") and p.get("mscale_all_dim"):
        return mscale(p["mscale"]) / mscale(p["mscale_all_dim"])
    return mscale(1.0)


def _longrope(rope: RopeConfig, max_positions: int) -> tuple[np.ndarray, float]:
    """LongRoPE (Ding et al., 2024): a searched divisor for each pair, one set for short, one for long."""
    p = rope.parameters
    original = p["original_max_position_embeddings"]
    divisors = p["long_factor"] if max_positions > original else p["short_factor"]
    stretch = p.get("attention_factor")
    if stretch is None:
        stretch = math.sqrt(1 + math.log(p["factor"]) / math.log(original)) if p["factor"] > 1 else 1.0
    return _frequencies(rope.theta, rope.rotary_dim) / np.asarray(divisors, dtype=np.float64), stretch


_SCALINGS = {
    "none": _none,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
