"""The draw by inverse CDF: exact at boundaries, right in distribution."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipaged.config import SamplingParams
from minipaged.sampling.draw import draw
from minipaged.sampling.philox import uniform
from minipaged.sampling.sampler import Sampler
from minipaged.sampling.state import SamplingState

ALMOST_ONE = 1 - 2**-53


def chi_square_limit(degrees: int) -> float:
    """About the 0.01% point of the chi-square distribution (Wilson and Hilferty 1931)."""
    spread = 2 / (9 * degrees)
    return degrees * (1 - spread + 3.72 * spread**0.5) ** 3


@pytest.mark.parametrize(
    "weights,u,expected",
    [
        ([1.0, 1.0, 2.0], 0.0, 0),
        ([1.0, 1.0, 2.0], 0.25, 1),  # a boundary belongs to the token above it
        ([1.0, 1.0, 2.0], 0.5, 2),
        ([1.0, 1.0, 2.0], ALMOST_ONE, 2),
        ([0.0, 0.0, 1.0, 0.0], 0.0, 2),
        ([0.0, 0.0, 1.0, 0.0], ALMOST_ONE, 2),
        ([5e-324, 0.0], ALMOST_ONE, 0),  # the target rounds up to the total
        ([3.0], 0.7, 0),
        ([1.0] * 512, 0.5, 256),  # also where chunks of the sum meet
        ([1.0] * 256 + [0.0] * 300 + [1.0] * 256, 0.5, 556),
    ],
)
def test_boundaries(weights, u, expected):
    assert draw(np.array(weights), u) == expected


@given(
    st.lists(st.tuples(st.integers(1, 700), st.sampled_from([0.0, 1.0, 2.0, 0.5])), min_size=1, max_size=5),
    st.floats(0, ALMOST_ONE),
)
def test_agrees_with_one_running_sum(runs, u):
    """Weights are small dyadic numbers, so that every order of summation is exact."""
    weights = np.concatenate([np.full(length, value) for length, value in runs])
    if not weights.any():
        weights[len(weights) // 2] = 1.0
    cdf = np.cumsum(weights)
    target = u * cdf[-1]
    if target < cdf[-1]:
        assert draw(weights, u) == np.searchsorted(cdf, target, side="right")
    assert weights[draw(weights, u)] > 0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=600), st.floats(0, ALMOST_ONE))
def test_never_draws_weight_zero(values, u):
    weights = np.array(values)
    weights[0] = 1.0
    assert weights[draw(weights, u)] > 0


def test_frequencies_over_many_chunks_match_the_weights():
    weights = np.arange(1, 1001, dtype=np.float64) ** 2
    numbers = uniform(np.full(20_000, 3), np.arange(20_000))
    counts = np.bincount([draw(weights, u) for u in numbers], minlength=1000)
    cut = slice(300, None)  # cells large enough for the chi-square approximation
    expected = weights[cut] / weights.sum() * len(numbers)
    assert ((counts[cut] - expected) ** 2 / expected).sum() < chi_square_limit(700)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0, "top_k": 7},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"top_k": 10, "top_p": 0.9, "min_p": 0.05, "temperature": 1.3},
    ],
)
def test_sampled_frequencies_match_the_exact_distribution(options):
    logits = np.random.default_rng(5).standard_normal(24).astype(np.float32) * 1.5
    params = SamplingParams(**options)
    n = 5000
    sampler = Sampler(24)
    states = [SamplingState(params, [0] * 5, vocab_size=24, seed=seed) for seed in range(n)]
    tokens = [sampled.token_id for sampled in sampler.sample(np.tile(logits, (n, 1)), states)]
    expected = exact_distribution(logits.astype(np.float64), params) * n
    counts = np.bincount(tokens, minlength=24)
    assert not counts[expected == 0].any()
    kept = expected > 5
    statistic = ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    assert statistic < chi_square_limit(int(kept.sum()) - 1)


def exact_distribution(logits, params):
    p = np.exp(logits / params.temperature)
    p[p < params.min_p * p.max()] = 0
    order = np.argsort(-p)
    if params.top_k:
        p[order[params.top_k :]] = 0
    p /= p.sum()
    reached = 0.0
    for token in order:
        if reached >= params.top_p:
            p[token] = 0
        reached += p[token]
    return p / p.sum()
