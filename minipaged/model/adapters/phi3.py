"""Phi-3, Phi-3.5 and Phi-4-mini: Llama with stacked projections, longrope and partly rotated heads."""

from __future__ import annotations

from minipaged.model.adapters import common
from minipaged.model.config import ModelConfig
from minipaged.model.hf_config import ConfigReader


def phi3(config: ConfigReader) -> ModelConfig:
    return common.build(config, positions=4096, windows=common.same_window(config, None), partial_rope=True)
