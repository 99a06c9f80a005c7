"""What is kept of a draft is what plain sampling gives, token by token and in distribution."""

import numpy as np
import pytest

from minipaged.config import SamplingParams
from minipaged.sampling.sampler import Sampler
from minipaged.sampling.speculative.verification import Guess, verify
from minipaged.sampling.state import SamplingState
from tests.support.chi_square import goodness_of_fit

VOCAB = 6


def state(params, seed=0, prompt=(0,)):
    return SamplingState(params, list(prompt), vocab_size=VOCAB, seed=seed)


class Chain:
    """A model whose logits depend on the last token alone."""

    def __init__(self, seed, spread=1.5):
        self.table = np.random.default_rng(seed).normal(0, spread, (VOCAB, VOCAB)).astype(np.float32)
        self.sampler = Sampler(VOCAB)

    def plain(self, state, num_tokens, last=0):
        """Sample without speculation."""
        for _ in range(num_tokens):
            (token,) = self.sampler.sample(self.table[[last]], [state])
            state.append(last := token.token_id)
        return state.output_token_ids

    def step(self, states, lasts, drafts):
        """One step of all sequences with their drafts; returns the tokens that each gets."""
        rows = np.concatenate([self.table[[last, *draft]] for last, draft in zip(lasts, drafts, strict=True)])
        starts = np.cumsum([0, *(len(draft) + 1 for draft in drafts)])[:-1]
        first = self.sampler.sample(rows[starts], states)
        guesses = [
            Guess(row, draft, state, [token])
            for row, draft, state, token in zip(starts.tolist(), drafts, states, first, strict=True)
        ]
        verify(lambda which, states: self.sampler.sample(rows[which], states), guesses)
        return [[token.token_id for token in guess.tokens] for guess in guesses]


def test_right_drafts_are_kept_and_one_more_token_follows():
    chain, params = Chain(0), SamplingParams(temperature=0)
    wanted = chain.plain(state(params), 4)
    assert chain.step([state(params)], [0], [wanted[:3]]) == [wanted]


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_the_first_wrong_token_is_replaced_and_ends_the_step(wrong):
    chain, params = Chain(0), SamplingParams(temperature=0)
    wanted = chain.plain(state(params), 4)
    draft = wanted[:3]
    draft[wrong] = (draft[wrong] + 1) % VOCAB
    assert chain.step([state(params)], [0], [draft]) == [wanted[: wrong + 1]]


def test_states_are_left_as_they_were():
    chain, params = Chain(0), SamplingParams(temperature=0, frequency_penalty=1.0, repetition_penalty=1.3)
    mine = state(params)
    mine.append(3)
    chain.step([mine], [3], [[1, 1, 1]])
    assert mine.output_token_ids == [3]
    fresh = state(params)
    fresh.append(3)
    logits = chain.table[[2]]
    assert chain.sampler.sample(logits, [mine])[0].token_id == chain.sampler.sample(logits, [fresh])[0].token_id


def test_damaged_logits_behind_a_right_guess_end_the_step():
    """Only the next step, which computes them again, may blame the model."""
    chain, params = Chain(0), SamplingParams(temperature=0)
    wanted = chain.plain(state(params), 3)
    mine, sampler = state(params), Sampler(VOCAB)
    rows = chain.table[[0, *wanted[:2]]].copy()
    rows[1] = np.nan
    guess = Guess(0, wanted[:2], mine, sampler.sample(rows[:1], [mine]))
    verify(lambda which, states: sampler.sample(rows[which], states), [guess])
    assert [token.token_id for token in guess.tokens] == wanted[:1]
    assert mine.output_token_ids == []


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"temperature": 0.8},
        {"temperature": 1.2, "top_p": 0.8, "top_k": 4, "min_p": 0.05},
        {"temperature": 1.0, "repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.2},
        {"temperature": 1.0, "logprobs": 2, "min_tokens": 5, "stop_token_ids": [2], "logit_bias": {1: 1.5}},
    ],
)
def test_any_draft_gives_the_tokens_of_plain_sampling(options):
    chain, rng = Chain(1), np.random.default_rng(0)
    params = SamplingParams(max_tokens=40, **options)
    num_right = 0
    for seed in range(20):
        wanted = chain.plain(state(params, seed), 40)
        mine, got = state(params, seed), []
        while len(got) < 30:
            draft = wanted[len(got) : len(got) + rng.integers(0, 5)]
            draft = [t if rng.random() < 0.7 else int(rng.integers(VOCAB)) for t in draft]
            (tokens,) = chain.step([mine], [got[-1] if got else 0], [draft])
            num_right += len(tokens) - 1
            for token in tokens:
                mine.append(token)
            got += tokens
        assert got == wanted[: len(got)]
    assert num_right > 100


@pytest.mark.parametrize("temperature", [0.6, 1.4])
def test_the_distribution_is_the_models(temperature):
    """20,000 sequences of two tokens, drafted by another model, against the exact joint distribution."""
    target, draft_model = Chain(2), Chain(3)
    draft_model.table = target.table + 0.5 * draft_model.table  # alike, not equal
    params = SamplingParams(temperature=temperature, top_p=0.85)
    states = [state(params, seed) for seed in range(20_000)]
    lasts = [0] * len(states)
    drafts = [tokens[:1] for tokens in draft_model.step(states, lasts, [[]] * len(states))]
    counts = np.zeros((VOCAB, VOCAB))
    right, wrong = [], []
    for mine, tokens in zip(states, target.step(states, lasts, drafts), strict=True):
        if len(tokens) == 2:
            right.append(tokens)
        else:
            mine.append(tokens[0])
            wrong.append((mine, tokens))
    followers = target.step([mine for mine, _ in wrong], [tokens[0] for _, tokens in wrong], [[]] * len(wrong))
    right += [[*tokens, *follower] for (_, tokens), follower in zip(wrong, followers, strict=True)]
    for first, second in right:
        counts[first, second] += 1

    p = transition_probabilities(target.table, temperature, params.top_p)
    assert 0.05 < len(wrong) / 20_000 < 0.7  # both ways were taken
    assert goodness_of_fit(counts.ravel(), (p[0][:, None] * p).ravel()) > 0.001


def transition_probabilities(table, temperature, top_p):
    """Softmax of each row over its nucleus."""
    weights = np.exp(table.astype(np.float64) / temperature)
    p = weights / weights.sum(axis=1, keepdims=True)
    for row in p:
        order = np.argsort(-row)
        row[order[np.searchsorted(np.cumsum(row[order]), top_p) + 1 :]] = 0
    return p / p.sum(axis=1, keepdims=True)
