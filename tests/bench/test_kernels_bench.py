"""``bench kernels``: what it counts, on the emulated device; its times there mean nothing."""

from __future__ import annotations

import pytest

from tests.support.cuda_devices import make_device  # noqa: F401  (skips where the packages are missing)

# isort: split

from minipaged.bench import kernels
from minipaged.errors import ConfigError
from minipaged.ops.cuda import available
from tests.support.engines import make_engine


def test_bytes_and_launches_of_a_decode_step(monkeypatch):
    monkeypatch.setenv(available.VARIABLE, "emulate")
    engine = make_engine("tiny-draft", device="cuda", dtype="float32", max_num_batched_tokens=64, num_blocks=8)
    result = kernels.measure(engine, [1], context=5, prompt_len=2, repetitions=3, progress=lambda text: None)
    config = engine.model.config
    decode = {row["kernel"]: row for row in result["kernels"] if row["step"] == "decode"}
    assert sum(row["launches"] for row in decode.values()) == 8 * config.num_layers + 4
    assert decode["sample"]["bytes"] == 4 * config.vocab_size
    head = decode[f"product_plain {config.vocab_size} x {config.hidden_size}"]
    assert head["bytes"] == 4 * (config.vocab_size * config.hidden_size + config.hidden_size + config.vocab_size)
    assert head["operations"] == 2 * config.vocab_size * config.hidden_size
    assert result["emulated"] and "EMULATED" in kernels.text(result)
    for options, wrong in (({"context": 600}, "max_model_len is 512"), ({"prompt_len": 65}, "batched_tokens is 64")):
        with pytest.raises(ConfigError, match=wrong):
            kernels.measure(engine, [1], **{"context": 5, "prompt_len": 2, **options}, repetitions=1, progress=print)


def test_only_a_cuda_device_is_measured():
    with pytest.raises(ConfigError, match="this engine is on 'reference'"):
        kernels.measure(make_engine("tiny-draft"), [1], 5, 2, 1, print)
