"""The margin of a choice: each kind of decision, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from minipaged.config import SamplingParams
from minipaged.sampling.margins import margin


@pytest.mark.parametrize(
    "weights,options,u,expected",
    [
        ([0.5, 0.3, 0.2], {}, 0.45, 0.05),  # the draw lies next to the boundary at 0.5
        ([0.5, 0.3, 0.2], {}, 0.83, 0.03),
        ([0.2, 0.5, 0.3], {}, 0.22, 0.02),  # boundaries follow token ids, not probabilities
        ([0.5, 0.45, 0.05], {"top_k": 1}, 0.3, np.log(0.5 / 0.45)),  # how nearly the second was the first
        ([0.5, 0.3, 0.2], {"min_p": 0.5}, 0.1, 0.1),  # 0.6 of the likeliest just passed
        ([0.5, 0.35, 0.15], {"min_p": 0.35}, 0.1, 0.05),  # 0.3 just failed
        ([0.5, 0.3, 0.2], {"top_p": 0.6}, 0.1, 0.1),  # one token nearly was enough
        ([0.4, 0.31, 0.29], {"top_p": 0.55}, 0.1, 0.05),  # another token nearly was in its place
        ([1.0], {}, 0.5, np.inf),
        ([1.0], {"temperature": 0}, 0.5, np.inf),
        ([0.5, 0.3, 0.2], {"temperature": 0}, 0.5, np.log(0.5 / 0.3)),
    ],
)
def test_margin(weights, options, u, expected):
    row = np.log(np.array(weights)).astype(np.float32)
    assert margin(row, SamplingParams(**options), u) == pytest.approx(expected, rel=1e-5)


def test_masked_tokens_are_no_alternative():
    row = np.array([-np.inf, 1.0, -np.inf], dtype=np.float32)
    for options in ({"temperature": 0}, {}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.5}):
        assert margin(row, SamplingParams(**options), 0.5) >= 0.5
