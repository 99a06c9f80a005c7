"""Rope tables: against the frequencies of transformers, and what depends on ``max_model_len``."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from minipaged.errors import UnsupportedModelError
from minipaged.model.architectures import config_from_hf
from minipaged.model.config import RopeConfig
from minipaged.model.rope import rope_tables

CASES = json.loads((Path(__file__).parent.parent / "fixtures" / "rope.json").read_text())


def read_rope(case: dict) -> RopeConfig:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 10,
        "hidden_size": 2 * case["head_dim"],
        "intermediate_size": 10,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": case["max_position_embeddings"],
        "rope_parameters": case["rope_parameters"],
    }
    return config_from_hf(config).layers[0].rope


@pytest.mark.parametrize("name", CASES)
def test_tables_have_the_frequencies_of_transformers(name):
    case = CASES[name]
    cos, sin = rope_tables(read_rope(case), case["length"] or 64)
    assert cos.dtype == sin.dtype == np.float32
    assert cos.shape == sin.shape == (case["length"] or 64, case["head_dim"] // 2)
    angles = np.arange(64)[:, None] * np.array(case["inv_freq"])
    factor = case["attention_factor"]
    np.testing.assert_allclose(cos[:64], np.cos(angles) * factor, atol=1e-5)
    np.testing.assert_allclose(sin[:64], np.sin(angles) * factor, atol=1e-5)


def test_position_0_is_not_rotated_and_pairs_turn_by_their_frequency():
    cos, sin = rope_tables(RopeConfig(theta=100.0, rotary_dim=4), 3)
    assert cos[0].tolist() == [1, 1] and sin[0].tolist() == [0, 0]
    np.testing.assert_allclose(sin[2], np.sin([2.0, 0.2]), rtol=1e-6)


def test_dynamic_is_unscaled_up_to_the_original_length():
    plain = RopeConfig(theta=10000.0, rotary_dim=8)
    dynamic = RopeConfig(10000.0, 8, "dynamic", {"factor": 4.0, "original_max_position_embeddings": 32})
    np.testing.assert_array_equal(rope_tables(dynamic, 20), rope_tables(plain, 20))
    np.testing.assert_array_equal(rope_tables(dynamic, 32), rope_tables(plain, 32))
    # Beyond it every position turns by other frequencies, the first ones too: the length is known
    # before the first token, so no key in the cache is ever of other frequencies than a query.
    assert (rope_tables(dynamic, 33)[0][1, 1:] > rope_tables(plain, 33)[0][1, 1:]).all()


def test_longrope_is_chosen_by_the_longest_sequence_allowed():
    parameters = {
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "short_factor": (1.0, 1.0),
        "long_factor": (2.0, 4.0),
        "attention_factor": 1.0,
    }
    rope = RopeConfig(10000.0, 4, "longrope", parameters)
    short, long = rope_tables(rope, 16), rope_tables(rope, 17)
    np.testing.assert_allclose(np.arcsin(short[1][1]), [1, 0.01], rtol=1e-5)
    np.testing.assert_allclose(np.arcsin(long[1][1]), [0.5, 0.0025], rtol=1e-5)


def test_unknown_scaling_is_refused_by_name():
    with pytest.raises(UnsupportedModelError, match="'spiral'"):
        rope_tables(RopeConfig(theta=1e4, rotary_dim=8, scaling="spiral"), 8)
