"""Checks of step 06."""

from __future__ import annotations

import numpy as np

from minipaged.config import SamplingParams
from minipaged.sampling.philox import uniform
from minipaged.sampling.sampler import Sampler
from minipaged.sampling.state import SamplingState

VOCAB_SIZE = 64


def examine_sample(sample) -> None:
    _expect(sample, [0.25, 0.75], 0.15, 1, temperature=0.5, hint="temperature 0.5 makes 0.25, 0.75 to 0.1, 0.9")
    _expect(sample, [0.25, 0.75], 0.15, 0, hint="pieces lie in the order of ids; 0.15 is in the first, 0 to 0.25")
    _expect(sample, [0.2, 0.5, 0.3], 0.1, 0, hint="pieces lie in the order of ids, the first from 0 to 0.2")
    _expect(sample, [0.5, 0.3, 0.2], 0.9, 1, top_k=2, hint="top_k 2 leaves tokens 0 and 1")
    hint = "0.5 alone does not reach top_p 0.6, so the one that crosses it is kept: tokens 0 and 1"
    _expect(sample, [0.5, 0.3, 0.2], 0.7, 1, top_p=0.6, hint=hint)
    hint = "after top_k 2 the rest sums to one again, 0.6 and 0.4; the first then reaches top_p 0.55 alone"
    _expect(sample, [0.45, 0.3, 0.25], 0.9, 0, top_k=2, top_p=0.55, hint=hint)

    rng = np.random.default_rng(0)
    params = SamplingParams(temperature=0.8, top_k=20, top_p=0.9)
    for seed in range(100):
        logits = 2 * rng.standard_normal((1, VOCAB_SIZE), np.float32)
        state = SamplingState(params, [1, 2, 3], vocab_size=VOCAB_SIZE, seed=seed)
        (expected,) = Sampler(VOCAB_SIZE).sample(logits, [state])
        found = sample(logits[0].copy(), 0.8, 20, 0.9, float(uniform([seed], [3])[0]))
        assert found == expected.token_id, f"seed {seed}: the engine draws token {expected.token_id}, sample {found}."


def _expect(sample, probabilities, u, expected, temperature=1.0, top_k=None, top_p=1.0, *, hint) -> None:
    top_k = len(probabilities) if top_k is None else top_k
    found = sample(np.log(np.array(probabilities)), temperature, top_k, top_p, u)
    given = f"probabilities {probabilities}, temperature {temperature}, top_k {top_k}, top_p {top_p}, u {u}"
    assert found == expected, f"{given}: the token is {found}; it must be {expected}: {hint}."
