"""Which precision of KV whoever says nothing gets."""

from __future__ import annotations

import pytest

from minipaged import LLM
from minipaged.ops.cpu import features

BESIDE_QUANTISED = "int8" if features.current().has_vnni else "bfloat16"


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, "bfloat16"),
        ({"dtype": "float32"}, "float32"),
        ({"quantization": "int8"}, BESIDE_QUANTISED),
        ({"quantization": "int4"}, BESIDE_QUANTISED),
        ({"quantization": "int8", "dtype": "float32"}, "float32"),
        ({"quantization": "int8", "kv_cache_dtype": "bfloat16"}, "bfloat16"),
    ],
)
def test_the_default_of_the_kv_cache(options, expected):
    with LLM("tiny", device="cpu", num_blocks=32, **options) as llm:
        assert llm._engine.formats.kv_cache == expected
