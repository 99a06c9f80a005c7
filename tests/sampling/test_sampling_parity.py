"""Processors and filters against probabilities made by Hugging Face transformers (make_sampling.py)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from minipaged.config import SamplingParams
from minipaged.sampling.filters import candidates
from minipaged.sampling.state import SamplingState

FIXTURE = json.loads((Path(__file__).parents[1] / "fixtures" / "sampling.json").read_text())


class WordList:
    """Stands for a tokenizer: knows each forbidden word as one sequence of tokens."""

    def __init__(self, sequences: list[list[int]]):
        self._sequences = {f"word{i}": sequence for i, sequence in enumerate(sequences)}
        self.words = list(self._sequences)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return self._sequences[text.strip()]


@pytest.mark.parametrize("case", FIXTURE["cases"], ids=lambda case: "-".join(case["options"]) or "plain")
def test_probabilities_match_transformers(case):
    words = WordList(case["bad_words"])
    params = SamplingParams(**case["options"], bad_words=words.words)
    state = SamplingState(
        params,
        case["prompt"],
        vocab_size=FIXTURE["vocab_size"],
        eos_token_ids=FIXTURE["eos"],
        seed=0,
        tokenizer=words,
    )
    for token_id in case["output"]:
        state.append(token_id)
    row = np.array(case["logits_times_64"], dtype=np.float32) / 64
    for processor in state.processors:
        processor.apply(row, state.output_token_ids)
    ids, weights = candidates(row, float(row.max()), params)
    probabilities = np.zeros(len(row))
    probabilities[slice(None) if ids is None else ids] = weights / weights.sum()

    expected = np.zeros(len(row))
    for token_id, probability in case["probabilities"].items():
        expected[int(token_id)] = probability
    assert np.flatnonzero(probabilities > 1e-8).tolist() == np.flatnonzero(expected > 1e-8).tolist()
    np.testing.assert_allclose(probabilities, expected, rtol=3e-6, atol=2e-9)
