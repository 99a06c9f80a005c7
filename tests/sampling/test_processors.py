"""Masks, biases and penalties, and their memory: append, truncate, fork."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipaged.config import SamplingParams
from minipaged.errors import InvalidParameterError
from minipaged.sampling.bad_words import tokenize_bad_words
from minipaged.sampling.penalties import Penalties
from minipaged.sampling.state import SamplingState

VOCAB = 30


def state_of(prompt=(1, 2), output=(), eos=(0,), tokenizer=None, **options) -> SamplingState:
    state = SamplingState(
        SamplingParams(**options), list(prompt), vocab_size=VOCAB, seed=0, eos_token_ids=eos, tokenizer=tokenizer
    )
    for token_id in output:
        state.append(token_id)
    return state


def processed(state: SamplingState, row=None) -> np.ndarray:
    row = np.zeros(VOCAB, np.float32) if row is None else np.array(row, np.float32)
    for processor in state.processors:
        processor.apply(row, state.output_token_ids)
    return row


def masked(state: SamplingState) -> list[int]:
    return np.flatnonzero(np.isneginf(processed(state))).tolist()


class SpellingTokenizer:
    """Tokens are given for whole texts, spaces included."""

    def __init__(self, **spellings):
        self._spellings = {text.replace("_", " "): ids for text, ids in spellings.items()}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        assert not add_special_tokens, "special tokens are never part of a word"
        return self._spellings[text]


# -- masks and biases -------------------------------------------------------------------------------


def test_nothing_asked_nothing_processed():
    assert state_of(stop_token_ids=[4], logit_bias={}, top_p=0.5, seed=3).processors == []


def test_allowed_tokens():
    assert masked(state_of(allowed_token_ids=[7, 3, 3])) == [i for i in range(VOCAB) if i not in (3, 7)]


def test_min_tokens_masks_eos_and_stop_ids_until_reached():
    options = dict(min_tokens=2, stop_token_ids=[9], eos=(0, 5, VOCAB + 4))
    assert masked(state_of(**options)) == [0, 5, 9]
    assert masked(state_of(output=[8], **options)) == [0, 5, 9]
    assert masked(state_of(output=[8, 8], **options)) == []


def test_min_tokens_masks_eos_even_where_eos_is_ignored():
    assert masked(state_of(min_tokens=1, ignore_eos=True)) == [0]


def test_logit_bias_adds_but_never_unmasks():
    row = processed(state_of(logit_bias={4: 2.5, 5: -100, 6: 100}, allowed_token_ids=[4, 5]))
    assert row[4] == 2.5 and row[5] == -100 and np.isneginf(row[6])


@pytest.mark.parametrize(
    "options", [{"logit_bias": {VOCAB: 1.0}}, {"allowed_token_ids": [VOCAB]}, {"stop_token_ids": [2**31 - 1]}]
)
def test_ids_outside_the_vocabulary_are_refused(options):
    with pytest.raises(InvalidParameterError, match=f"ids 0 to {VOCAB - 1}"):
        state_of(**options)


# -- bad words --------------------------------------------------------------------------------------


def test_bad_word_masks_its_last_token_after_its_beginning():
    words = SpellingTokenizer(cat=[4, 5, 6], _cat=[7])
    assert masked(state_of(bad_words=["cat"], tokenizer=words)) == [7]
    assert masked(state_of(bad_words=["cat"], tokenizer=words, output=[4])) == [7]
    assert masked(state_of(bad_words=["cat"], tokenizer=words, output=[9, 4, 5])) == [6, 7]
    assert masked(state_of(bad_words=["cat"], tokenizer=words, output=[4, 5, 9])) == [7]


def test_bad_word_begun_by_the_prompt_is_not_compared():
    words = SpellingTokenizer(cat=[4, 5], _cat=[7])
    assert masked(state_of(prompt=[4], bad_words=["cat"], tokenizer=words)) == [7]


@pytest.mark.parametrize(
    "bare,spaced,expected",
    [
        ([4, 5], [6, 5], [(4, 5), (6, 5)]),
        ([4, 5], [6], [(4, 5), (6,)]),  # vLLM drops this one, and the word comes out after a space
        ([4, 5], [3, 4, 5], [(4, 5)]),  # the space is a token of its own: already covered
        ([4, 5], [4, 5], [(4, 5)]),  # a tokenizer that adds the space itself
    ],
)
def test_bad_word_spellings(bare, spaced, expected):
    assert tokenize_bad_words(["cat"], SpellingTokenizer(cat=bare, _cat=spaced)) == expected
    assert tokenize_bad_words(["  cat"], SpellingTokenizer(cat=bare, _cat=spaced)) == expected


@pytest.mark.parametrize("word", [" ", "\n\t"])
def test_bad_word_of_white_space_is_refused(word):
    with pytest.raises(InvalidParameterError, match="bad_words"):
        tokenize_bad_words([word], SpellingTokenizer())


# -- penalties --------------------------------------------------------------------------------------


def plain_penalties(row, prompt, output, presence, frequency, repetition):
    row = row.astype(np.float64).copy()
    for token_id in set(prompt) | set(output):
        row[token_id] = row[token_id] / repetition if row[token_id] > 0 else row[token_id] * repetition
    for token_id in set(output):
        row[token_id] -= frequency * output.count(token_id) + presence
    return row


tokens = st.lists(st.integers(0, VOCAB - 1), max_size=12)
amounts = st.sampled_from([-2.0, -0.3, 0.0, 0.7, 2.0])


@given(tokens, tokens, amounts, amounts, st.sampled_from([0.5, 1.0, 1.3, 3.0]), st.integers(0, 2**32 - 1))
def test_penalties_match_counting_afresh(prompt, output, presence, frequency, repetition, seed):
    row = np.random.default_rng(seed).standard_normal(VOCAB).astype(np.float32)
    names = dict(presence_penalty=presence, frequency_penalty=frequency, repetition_penalty=repetition)
    expected = plain_penalties(row, prompt, output, presence, frequency, repetition)
    np.testing.assert_allclose(processed(state_of(prompt, output, **names), row), expected, rtol=1e-5, atol=1e-5)


def test_penalties_remember_tokens_not_the_vocabulary():
    params = SamplingParams(frequency_penalty=1.0)
    penalties = Penalties(params, list(range(1000)))
    for token_id in range(500):
        penalties.append(token_id * 1000)
    assert len(penalties._ids) <= 1024
    row = np.zeros(500_000, np.float32)
    penalties.apply(row, [])
    assert np.flatnonzero(row).tolist() == [i * 1000 for i in range(500)]


EVENTS = st.lists(st.one_of(st.integers(0, VOCAB - 1), st.just("fork"), st.tuples(st.just("keep"), st.integers(0, 20))))


@given(EVENTS)
def test_append_truncate_and_fork_equal_a_fresh_state(events):
    options = dict(presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=1.5, min_tokens=2)
    state = state_of(prompt=[1, 2, 2], **options)
    for event in events:
        if event == "fork":
            twin = state.fork(seed=state.seed + 1)
            state.append(3)  # the past is shared, the future is not
            assert twin.seed == state.seed + 1
            state = twin
        elif isinstance(event, tuple):
            state.truncate(event[1])
        else:
            state.append(event)
    fresh = state_of(prompt=[1, 2, 2], output=state.output_token_ids, **options)
    row = np.linspace(-2, 2, VOCAB)
    assert state.position == fresh.position == 3 + len(state.output_token_ids)
    assert processed(state, row).tolist() == processed(fresh, row).tolist()
