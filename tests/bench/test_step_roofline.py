"""A step taken apart: the parts add up, floors are what bytes and rates say, and what has none is refused."""

from __future__ import annotations

import json

import pytest

from minipaged.bench import roofline, step_roofline
from minipaged.cli.main import main
from minipaged.config import EngineConfig
from minipaged.engine import Engine
from minipaged.errors import ConfigError


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(roofline, "COLD_BYTES", 1 << 20)
    monkeypatch.setattr(roofline, "_PEAK_ITERATIONS", 1000)


@pytest.fixture(scope="module")
def engine():
    engine = Engine(EngineConfig(model="tiny", device="cpu", max_model_len=256, num_threads=2))
    yield engine
    engine.close()


def test_the_parts_are_the_step(engine):
    result = step_roofline.measure(engine, [1, 4], context=64, num_steps=4)
    for step in result["steps"]:
        parts = {operator["name"]: operator for operator in step["operators"]}
        assert list(parts)[:5] == ["qkv", "o", "gate_up", "down", "lm_head"]
        assert sum(part["seconds"] for part in parts.values()) == pytest.approx(step["seconds"], rel=1e-6)
        assert step["floor"] == pytest.approx(sum(part["floor"] or 0 for part in parts.values()))
        weights = sum(parts[name]["floor"] for name in ("qkv", "o", "gate_up", "down", "lm_head"))
        dense = engine.runner.weight_bytes / step["bandwidth"]
        assert weights >= 0.9 * dense  # all matrices were counted (norms are the rest)
    assert "whole step" in step_roofline.text(result)


def test_what_cannot_be_taken_apart_is_refused(engine):
    with pytest.raises(ConfigError, match="context is 8; at least 64"):
        step_roofline.measure(engine, [1], context=8)
    reference = Engine(EngineConfig(model="tiny", device="reference", max_model_len=256))
    with pytest.raises(ConfigError, match="device 'cpu'"):
        step_roofline.measure(reference, [1], context=64)


def test_command_line(tmp_path):
    file = tmp_path / "step.json"
    arguments = ["bench", "roofline", "--step", "--model", "tiny", "--batch-size", "2", "--context", "64"]
    assert main([*arguments, "--num-threads", "2", "--max-model-len", "256", "--json", str(file)]) == 0
    assert json.loads(file.read_text())["steps"][0]["batch_size"] == 2
