"""Log-probabilities and ranks come from the raw logits, by natural logarithm."""

from __future__ import annotations

import numpy as np
import pytest

from minipaged.config import SamplingParams
from minipaged.errors import NumericalError
from minipaged.sampling.logprobs import prompt_logprobs, token_logprobs
from minipaged.sampling.sampler import Sampler
from minipaged.sampling.state import SamplingState


def log_softmax(row):
    row = row.astype(np.float64)
    return row - row.max() - np.log(np.exp(row - row.max()).sum())


@pytest.mark.parametrize("size,k", [(50, 0), (50, 1), (50, 7), (50, 50), (50, 1000), (49_152, 20)])
@pytest.mark.parametrize("shift", [0.0, 500.0, -500.0])
def test_values_ranks_and_order(size, k, shift):
    row = (np.random.default_rng(k).standard_normal(size) * 4 + shift).astype(np.float32)
    expected, order = log_softmax(row), np.argsort(-row, kind="stable")
    for token_id in (int(order[0]), int(order[-1]), size // 2):
        got = token_logprobs(row, token_id, k)
        assert got.logprob == pytest.approx(expected[token_id], abs=1e-6)
        assert got.rank == order.tolist().index(token_id) + 1
        assert got.top[0] == order[:k].tolist()
        np.testing.assert_allclose(got.top[1], expected[order[:k]], atol=1e-6)
        assert type(got.rank) is int and all(type(v) is float for v in got.top[1])


def test_equal_logits_rank_by_token_id():
    row = np.array([1, 2, 2, 2, 0], dtype=np.float32)
    assert [token_logprobs(row, i, 0).rank for i in range(5)] == [4, 1, 2, 3, 5]
    assert token_logprobs(row, 0, 2).top[0] == [1, 2]


def test_sampling_parameters_do_not_touch_logprobs():
    row = np.random.default_rng(0).standard_normal((1, 40)).astype(np.float32)
    params = SamplingParams(
        temperature=0.5, top_k=3, logit_bias={5: 50.0}, repetition_penalty=2.0, allowed_token_ids=[5, 6], logprobs=4
    )
    sampled = Sampler(40).sample(row, [SamplingState(params, [5, 6], vocab_size=40, seed=0)])[0]
    assert sampled.token_id == 5
    assert sampled.logprob == pytest.approx(log_softmax(row[0])[5], abs=1e-6)
    assert sampled.top[0] == np.argsort(-row[0])[:4].tolist()


def test_logprobs_are_made_on_request_only():
    row = np.zeros((2, 40), dtype=np.float32)
    states = [SamplingState(SamplingParams(logprobs=k), [1], vocab_size=40, seed=0) for k in (None, 0)]
    without, chosen_only = Sampler(40).sample(row, states)
    assert (without.logprob, without.rank, without.top) == (None, None, None)
    assert chosen_only.logprob == pytest.approx(-np.log(40)) and chosen_only.top == ([], [])


def test_prompt_logprobs():
    logits = np.random.default_rng(0).standard_normal((3, 40)).astype(np.float32)
    got = prompt_logprobs(logits, [7, 0, 39], 2)
    assert [p.token_id for p in got] == [7, 0, 39]
    assert got == [token_logprobs(row, token_id, 2) for row, token_id in zip(logits, [7, 0, 39], strict=True)]


def test_prompt_logprobs_refuse_bad_logits():
    logits = np.zeros((3, 40), dtype=np.float32)
    logits[1, 4] = np.nan
    with pytest.raises(NumericalError, match="prompt token 21"):
        prompt_logprobs(logits, [20, 21, 22], 1)
