"""Prompt lookup: the longest match wins, the latest occurrence is taken, periods are continued."""

import random

import pytest

from minipaged.config import SamplingParams
from minipaged.core.request import Request
from minipaged.sampling.speculative.ngram import NgramIndex, NgramProposer
from minipaged.sampling.speculative.proposer import DraftWish
from minipaged.sampling.state import SamplingState


def continuation(token_ids, num_tokens, **options):
    index = NgramIndex(**options)
    index.update(token_ids)
    return index.continuation(token_ids, num_tokens)


def slow_continuation(token_ids, num_tokens, longest, shortest):
    """The definition: search backwards, longest n first."""
    for n in range(min(longest, len(token_ids) - 1), shortest - 1, -1):
        for start in range(len(token_ids) - n - 1, -1, -1):
            if token_ids[start : start + n] == token_ids[-n:]:
                text = list(token_ids)
                for i in range(num_tokens):
                    text.append(text[start + n + i])
                return text[len(token_ids) :]
    return []


def test_what_followed_before_is_proposed():
    assert continuation([1, 2, 3, 4, 5, 9, 2, 3], 2) == [4, 5]


def test_the_longest_match_wins_over_a_later_shorter_one():
    assert continuation([1, 2, 3, 70, 9, 2, 3, 80, 1, 2, 3], 1, longest=3, shortest=2) == [70]


def test_of_equal_matches_the_latest_is_taken():
    assert continuation([2, 3, 70, 2, 3, 80, 2, 3], 1) == [80]


def test_nothing_is_proposed_without_a_match():
    assert continuation([1, 2, 3, 4, 5], 3) == []
    assert continuation([1], 3) == []
    assert continuation([7, 1, 7], 3) == []  # one token is too little


@pytest.mark.parametrize("period", [1, 2, 3, 5])
def test_a_period_is_continued(period):
    text = list(range(10, 10 + period)) * 6
    assert continuation(text, 7) == (text * 3)[len(text) :][:7]


def test_it_agrees_with_the_definition_as_the_text_grows():
    rng = random.Random(0)
    for _ in range(30):
        longest, shortest = rng.choice([(4, 2), (3, 1), (2, 2)])
        index, text = NgramIndex(longest, shortest), []
        for _ in range(60):
            text += [rng.randrange(3) for _ in range(rng.choice([1, 1, 4]))]
            index.update(text)
            count = rng.randint(1, 6)
            assert index.continuation(text, count) == slow_continuation(text, count, longest, shortest)


def wish(request, num_tokens):
    state = SamplingState(request.params, request.prompt_token_ids, vocab_size=100, seed=0)
    return DraftWish(request, state, num_tokens)


def test_requests_do_not_see_each_other():
    """Neither does one that is retained see what was forgotten."""
    proposer = NgramProposer()
    a = Request("a", [1, 2, 3, 4, 1, 2], SamplingParams())
    b = Request("b", [5, 6, 7, 1, 2], SamplingParams())
    assert proposer.propose([wish(a, 2), wish(b, 2)]) == [[3, 4], []]
    a.token_ids += [9, 1, 2]
    assert proposer.propose([wish(a, 1)]) == [[9]]
    proposer.retain({b})
    assert proposer.propose([wish(a, 1)]) == [[9]]
    assert proposer.propose([]) == []
