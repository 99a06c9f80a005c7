"""Llama 2 and 3, SmolLM2, TinyLlama (``LlamaForCausalLM``); Mistral; Qwen2; Qwen3.

They differ in biases (Qwen2: on q, k and v), norms on q and k (Qwen3), and which layers have a
sliding window.
"""

from __future__ import annotations

from minipaged.model.adapters import common
from minipaged.model.config import ModelConfig
from minipaged.model.hf_config import ConfigReader


def llama(config: ConfigReader) -> ModelConfig:
    bias = config.boolean("attention_bias", False)
    return common.build(
        config,
        positions=2048,
        windows=common.layer_types(config, ["full_attention"] * common.num_layers(config), None),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=config.boolean("mlp_bias", False),
    )


def mistral(config: ConfigReader) -> ModelConfig:
    return common.build(config, positions=131072, windows=common.same_window(config, 4096))


def qwen2(config: ConfigReader) -> ModelConfig:
    return common.build(config, positions=32768, windows=qwen_windows(config), qkv_bias=True)


def qwen3(config: ConfigReader) -> ModelConfig:
    bias = config.boolean("attention_bias", False)
    return common.build(
        config, positions=32768, windows=qwen_windows(config), head_dim=128, qk_norm=True, qkv_bias=bias, o_bias=bias
    )


def qwen_windows(config: ConfigReader) -> list[int | None]:
    """With ``use_sliding_window`` the layers from ``max_window_layers`` on have one."""
    window = config.integer("sliding_window", 4096, high=2**31, optional=True)
    if not config.boolean("use_sliding_window", False):
        window = None
    first = config.integer("max_window_layers", 28, low=0)
    layers = range(common.num_layers(config))
    default = ["sliding_attention" if window and i >= first else "full_attention" for i in layers]
    return common.layer_types(config, default, window)
