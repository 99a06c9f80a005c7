"""Phi-3, Phi-3.5 and Phi-4-mini: Llama with stacked projections, longrope and partly rotated heads."""

from __future__ import annotations

from minipaged.model.adapters import common
from minipaged.model.config import ModelConfig
from minipaged.model.hf_config import ConfigReader


def phi3(config: ConfigReader) -> ModelConfig:
    window = config.integer("sliding_window", None, high=2**31, optional=True)
    return common.build(config, positions=4096, windows=[window] * common.num_layers(config), partial_rope=True)
