"""Which continuations a beam has, and which beams go on; equality with transformers is tests/equivalence's."""

from dataclasses import dataclass

import numpy as np
import pytest

from minipaged.config import SamplingParams
from minipaged.sampling.beam import BeamSelection, Candidate, Continuation, continuations
from minipaged.sampling.state import SamplingState

VOCAB = 8
LOGITS = np.array([0, 3, 1, 3, 2, -5, 0.5, 1], np.float32)


def state(**options):
    params = SamplingParams(use_beam_search=True, n=2, **options)
    return SamplingState(params, [1, 2], vocab_size=VOCAB, seed=0)


def test_continuations_come_likeliest_first_and_equal_ones_by_id():
    found = continuations(LOGITS, state(), 4)
    assert [token.token_id for token in found] == [1, 3, 4, 2]
    expected = LOGITS - np.log(np.exp(LOGITS.astype(np.float64)).sum())
    assert [token.log_weight for token in found] == pytest.approx(expected[[1, 3, 4, 2]], abs=1e-6)
    assert [token.logprob for token in found] == pytest.approx(expected[[1, 3, 4, 2]], abs=1e-6)
    assert all(token.rank is None for token in found)


def test_masks_and_penalties_edit_the_weight_and_not_the_logprob():
    found = continuations(LOGITS, state(allowed_token_ids=[1, 5], repetition_penalty=2.0), 4)
    assert [token.token_id for token in found] == [1, 5]
    assert found[0].log_weight == pytest.approx(2 * found[0].logprob)  # token 1 is in the prompt
    assert found[1].log_weight == pytest.approx(found[1].logprob, abs=1e-6)


def test_facts_that_were_asked_for():
    found = continuations(LOGITS, state(logprobs=2), 3)
    assert [token.rank for token in found] == [1, 2, 3]
    assert found[2].top[0] == [1, 3]


def test_rows_without_a_continuation_have_an_error():
    assert "NaN" in continuations(np.full(VOCAB, np.nan, np.float32), state(), 2)[0].error
    masked = state(allowed_token_ids=[1], min_tokens=1, stop_token_ids=[1])
    assert "masked" in continuations(LOGITS, masked, 2)[0].error


@dataclass(frozen=True)
class Text:
    """A beam as the letters of its tokens; "x" ends it."""

    text: str

    @property
    def finished(self):
        return self.text.endswith("x")


def select(selection, scores):
    candidates = [Candidate(None, Continuation(0), score) for score in scores.values()]
    texts = {id(candidate): Text(text) for candidate, text in zip(candidates, scores, strict=True)}
    return [text.text for _, text in selection.select(candidates, lambda candidate: texts[id(candidate)])]


def selection(**options):
    return BeamSelection(SamplingParams(use_beam_search=True, n=2, max_tokens=10, **options), num_end_tokens=1)


def test_what_ends_below_the_width_is_no_hypothesis():
    search = selection()
    assert select(search, {"a": -1, "b": -2, "x": -3, "c": -4}) == ["a", "b"]
    assert search.hypotheses == [] and not search.done


def test_enough_candidates_are_looked_at_to_keep_the_width():
    search = selection(early_stopping="never")
    assert select(search, {"ax": -1, "bx": -2, "c": -3, "d": -4, "e": -5}) == ["c", "d"]
    assert [text.text for _, text in search.hypotheses] == ["ax", "bx"]


@pytest.mark.parametrize(
    "options, done",
    [
        ({"early_stopping": True}, True),
        ({"early_stopping": False}, True),  # -3 is less than -2 at the same length
        ({"early_stopping": "never"}, False),  # -3 / 10 would be more
        ({"early_stopping": "never", "length_penalty": 0.0}, True),  # length cannot help
    ],
)
def test_when_a_search_ends(options, done):
    search = selection(**options)
    going_on = select(search, {"ax": -1, "bx": -2, "c": -3, "d": -4})
    assert search.done is done
    assert going_on == ([] if done else ["c", "d"])


def test_hypotheses_are_compared_by_their_normalised_scores():
    search = selection(early_stopping="never")
    select(search, {"x": -2, "a": -2.5, "b": -3})
    select(search, {"ax": -3, "bx": -9, "c": -9.5, "d": -9.9})
    assert [(score, text.text) for score, text in search.hypotheses] == [(-1.5, "ax"), (-2, "x")]


def test_a_search_whose_beams_all_end_is_done():
    search = selection()
    assert select(search, {"ax": -1, "bx": -2}) == []
    assert search.done and len(search.hypotheses) == 2
