"""The sampler against a plain implementation with full sorts; independence of rows; failures."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minipaged.config import SamplingParams
from minipaged.sampling.filters import candidates, kth_largest, nucleus
from minipaged.sampling.philox import uniform
from minipaged.sampling.sampler import Sampler
from minipaged.sampling.state import SamplingState

EOS = (0, 3)


class LetterTokenizer:
    """Token ``i`` is the letter ``i``; the space is token 26 or, before a capital, part of the letter."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [26 if char == " " else ord(char) - ord("a") for char in text]


def state_of(params: SamplingParams, prompt=(1, 2), output=(), vocab_size=40, seed=0) -> SamplingState:
    state = SamplingState(
        params, list(prompt), vocab_size=vocab_size, eos_token_ids=EOS, seed=seed, tokenizer=LetterTokenizer()
    )
    for token_id in output:
        state.append(token_id)
    return state


def plain_sample(logits, params, prompt, output, seed):
    """One token, by Python floats and full sorts, and the distance of the nearest rounded decision.

    The token is ``None`` if every one is masked.
    """
    x = {token_id: float(value) for token_id, value in enumerate(logits)}
    if params.allowed_token_ids is not None:
        x = {t: v for t, v in x.items() if t in params.allowed_token_ids}
    for word in params.bad_words:
        ids = LetterTokenizer().encode(word)
        if output[len(output) - len(ids) + 1 :] == ids[:-1] and len(output) >= len(ids) - 1:
            x.pop(ids[-1], None)
    if len(output) < params.min_tokens:
        x = {t: v for t, v in x.items() if t not in EOS and t not in params.stop_token_ids}
    if not x:
        return None, math.inf
    for token_id, bias in (params.logit_bias or {}).items():
        if token_id in x:
            x[token_id] += bias
    for token_id in x:
        if token_id in prompt or token_id in output:
            v = x[token_id]
            x[token_id] = v / params.repetition_penalty if v > 0 else v * params.repetition_penalty
        x[token_id] -= params.frequency_penalty * output.count(token_id)
        x[token_id] -= params.presence_penalty * (token_id in output)
    order = sorted(x, key=lambda t: (-x[t], t))
    if params.temperature == 0:
        return order[0], math.inf
    p = {t: math.exp((x[t] - x[order[0]]) / params.temperature) for t in order}
    distances = [abs(p[t] - params.min_p) for t in order[1:]]
    order = [t for t in order if p[t] >= params.min_p]
    if 0 < params.top_k < len(order):
        order = [t for t in order if x[t] >= x[order[params.top_k - 1]]]
    total, reached, kept = sum(p[t] for t in order), 0.0, []
    for t in order:
        if params.top_p == 1 or reached < params.top_p * total:
            kept.append(t)
            distances.append(abs(reached - params.top_p * total))
        reached += p[t]
    target = float(uniform([seed], [len(prompt) + len(output)])[0]) * sum(p[t] for t in kept)
    for t in sorted(kept):
        target -= p[t]
        distances.append(abs(target))
        if target < 0:
            return t, min(distances)
    return max(kept), 0.0


token_ids = st.integers(0, 39)
options = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0, 0.1, 0.7, 1.0, 3.0]),
        "top_k": st.sampled_from([-1, 0, 1, 2, 5, 39, 40, 1000]),
        "top_p": st.sampled_from([1e-9, 0.2, 0.5, 0.9, 0.999]),
        "min_p": st.sampled_from([0.0, 0.001, 0.1, 0.8, 1.0]),
        "presence_penalty": st.sampled_from([-2.0, 0.5, 2.0]),
        "frequency_penalty": st.sampled_from([-0.5, 0.25, 2.0]),
        "repetition_penalty": st.sampled_from([0.5, 2.0, 4.0]),
        "min_tokens": st.integers(0, 6),
        "stop_token_ids": st.lists(token_ids, max_size=3),
        "logit_bias": st.dictionaries(token_ids, st.sampled_from([-100, -1.5, 2.5, 100]), max_size=4),
        "allowed_token_ids": st.lists(token_ids, min_size=1, max_size=10),
        "bad_words": st.lists(st.text("abcd", min_size=1, max_size=3), max_size=3),
    },
)
prompts = st.lists(token_ids, min_size=1, max_size=5)
outputs = st.lists(st.integers(0, 4), max_size=6)
cases = st.tuples(options, prompts, outputs, st.integers(0, 2**64 - 1))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(cases, min_size=1, max_size=6), st.integers(0, 2**32 - 1))
def test_batch_agrees_with_the_plain_sampler_and_with_each_row_alone(batch, logits_seed):
    rng = np.random.default_rng(logits_seed)
    # Quarters tie often, and stay exact in float32 through every bias and penalty offered above.
    logits = (rng.integers(-24, 24, (len(batch), 40)) / 4).astype(np.float32)
    before = logits.copy()
    states = [state_of(SamplingParams(**o), prompt, output, seed=seed) for o, prompt, output, seed in batch]
    together = Sampler(40).sample(logits, states)
    assert (logits == before).all()
    for row, (state, sampled) in enumerate(zip(states, together, strict=True)):
        assert Sampler(40).sample(logits[row : row + 1].copy(), [state])[0] == sampled
        _, prompt, output, seed = batch[row]
        expected, distance = plain_sample(logits[row], state.params, prompt, output, seed)
        if expected is None:
            assert sampled.error and sampled.token_id == -1
        elif distance > 1e-9:
            assert sampled.token_id == expected


@settings(max_examples=100, deadline=None)
@given(options, st.integers(0, 2**32 - 1))
def test_a_disturbance_below_the_margin_never_changes_the_token(given_options, seed):
    params = SamplingParams(**given_options)
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((1, 40)).astype(np.float32) * 2
    state = state_of(params, seed=seed)
    sampled = Sampler(40).sample(logits, [state], with_margins=True)[0]
    if sampled.error:
        return
    # 8 bounds how much faster than logits the margin's terms move: 2/temperature, 2 * repetition_penalty.
    amount = min(sampled.margin, 1e-2) / (8 if params.temperature >= 0.7 or params.greedy else 40)
    disturbed = logits + rng.uniform(-amount, amount, (1, 40)).astype(np.float32)
    assert Sampler(40).sample(disturbed, [state])[0].token_id == sampled.token_id


def test_large_rows_in_company_and_alone_are_equal_bit_for_bit():
    rng = np.random.default_rng(1)
    logits = (rng.standard_normal((9, 49_153)) * 3).astype(np.float32)
    kinds = [{"temperature": 0}, {}, {"top_k": 40, "top_p": 0.95}, {"top_p": 0.9}, {"min_p": 0.02, "logprobs": 5}]
    states = [state_of(SamplingParams(**kinds[i % 5]), vocab_size=49_153, seed=i) for i in range(9)]
    sampler = Sampler(49_153)
    together = sampler.sample(logits, states)
    alone = [sampler.sample(np.array(logits[i : i + 1]), [states[i]])[0] for i in range(9)]
    reverse = sampler.sample(logits[::-1], states[::-1])[::-1]
    assert together == alone == reverse


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_bad_logits_fail_their_own_row_only(bad):
    logits = np.random.default_rng(0).standard_normal((3, 40)).astype(np.float32)
    states = [state_of(SamplingParams(**o), seed=4) for o in ({"temperature": 0}, {"top_p": 0.9}, {"logprobs": 2})]
    clean = Sampler(40).sample(logits, states)
    for row in range(3):
        broken = logits.copy()
        broken[row, 17] = bad
        outcome = Sampler(40).sample(broken, states)
        assert "NaN or infinity" in outcome[row].error and outcome[row].token_id == -1
        assert [t for i, t in enumerate(outcome) if i != row] == [t for i, t in enumerate(clean) if i != row]


def test_huge_finite_logits_are_no_error():
    logits = np.full((2, 40), 3e38, dtype=np.float32)
    logits[:, 5] = np.finfo(np.float32).max
    outcome = Sampler(40).sample(logits, [state_of(SamplingParams(temperature=t)) for t in (0, 1)])
    assert [sampled.token_id for sampled in outcome] == [5, 5]


def test_every_token_masked_is_said_plainly():
    params = SamplingParams(allowed_token_ids=[0, 3, 7], stop_token_ids=[7], min_tokens=1)
    outcome = Sampler(40).sample(np.zeros((1, 40), np.float32), [state_of(params)])[0]
    assert outcome.token_id == -1
    for name in ("every token is masked", "allowed_token_ids", "bad_words", "min_tokens"):
        assert name in outcome.error


def test_a_penalty_that_drives_a_logit_to_infinity_is_said_plainly():
    params = SamplingParams(repetition_penalty=1e-300)
    outcome = Sampler(40).sample(np.ones((1, 40), np.float32), [state_of(params)])[0]
    assert "repetition_penalty" in outcome.error


@pytest.mark.parametrize("temperature", [5e-324, 1e-30, 1e-6])
def test_a_temperature_next_to_zero_is_greedy(temperature):
    logits = np.random.default_rng(0).standard_normal((1, 40)).astype(np.float32)
    sampled = Sampler(40).sample(logits, [state_of(SamplingParams(temperature=temperature))])[0]
    assert sampled.token_id == logits.argmax()


def test_a_seed_repeats_and_positions_differ():
    logits = np.zeros((1, 1000), dtype=np.float32)
    sampler = Sampler(1000)

    def tokens(seed):
        state, drawn = state_of(SamplingParams(), vocab_size=1000, seed=seed), []
        for _ in range(20):
            drawn.append(sampler.sample(logits, [state])[0].token_id)
            state.append(drawn[-1])
        return drawn

    assert tokens(11) == tokens(11)
    assert tokens(11) != tokens(12)
    assert len(set(tokens(11))) > 10


def test_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"shape \(1, 39\)"):
        Sampler(40).sample(np.zeros((1, 39), np.float32), [state_of(SamplingParams())])
    assert Sampler(40).sample(np.zeros((0, 40), np.float32), []) == []


# -- filters --------------------------------------------------------------------------------------


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=300), st.data())
def test_kth_largest(values, data):
    k = data.draw(st.integers(1, len(values)))
    assert kth_largest(np.array(values, dtype=np.float32), k) == sorted(values, reverse=True)[k - 1]


@pytest.mark.parametrize("size", [1000, 49_152, 49_153, 262_144])
def test_kth_largest_in_large_rows(size):
    row = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    descending = np.sort(row)[::-1]
    for k in (1, 2, 40, 500, size // 2, size):
        assert kth_largest(row, k) == descending[k - 1]


@pytest.mark.parametrize(
    "weights,top_p,expected",
    [
        ([4, 2, 1, 1], 0.5, [0]),  # reached exactly: no more
        ([4, 2, 1, 1], 0.51, [0, 1]),  # the one that crosses is kept
        ([4, 2, 1, 1], 0.80, [0, 1, 2]),  # of equal ones the lower id
        ([1, 1, 1, 1], 0.5, [0, 1]),
        ([1, 4, 1, 2], 0.80, [0, 1, 3]),
        ([1, 0, 0], 0.999, [0]),
        ([1, 1, 1, 1], 1e-12, [0]),
        ([1, 2, 0.5, 0.25], 1 - 2**-53, [0, 1, 2, 3]),
    ],
)
def test_nucleus(weights, top_p, expected):
    assert np.flatnonzero(nucleus(np.array(weights, dtype=np.float64), top_p)).tolist() == expected


@given(st.lists(st.integers(0, 8), min_size=1, max_size=200), st.floats(1e-6, 1 - 1e-6))
def test_nucleus_is_the_smallest_set_that_reaches_top_p(values, top_p):
    weights = np.array(values, dtype=np.float64)  # small integers: every sum is exact
    weights[0] += 1
    order = sorted(range(len(weights)), key=lambda i: (-weights[i], i))
    kept, reached = set(), 0.0
    for i in order:
        if reached >= top_p * weights.sum():
            break
        kept.add(i)
        reached += weights[i]
    assert set(np.flatnonzero(nucleus(weights, top_p)).tolist()) == kept


def test_top_k_keeps_what_ties_with_the_kth():
    row = np.array([1, 3, 2, 2, 2, 0], dtype=np.float32)
    ids, weights = candidates(row, 3.0, SamplingParams(top_k=2))
    assert ids.tolist() == [1, 2, 3, 4]
    np.testing.assert_allclose(weights, np.exp([0, -1, -1, -1]))
