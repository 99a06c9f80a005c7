"""Llama 2 and 3, SmolLM2, TinyLlama (``LlamaForCausalLM``); Mistral; Qwen2; Qwen3.

They differ in biases (Qwen2: on q, k and v), norms on q and k (Qwen3), and which layers have a
sliding window.
"""

from __future__ import annotations

from minipaged.errors import UnsupportedModelError
from minipaged.model.adapters import common
from minipaged.model.config import LayerConfig, ModelConfig
from minipaged.model.hf_config import ConfigReader
from minipaged.model.hf_rope import longest_sequence, read_rope


def llama(config: ConfigReader) -> ModelConfig:
    bias = config.boolean("attention_bias", False)
    return _build(config, positions=2048, qkv_bias=bias, o_bias=bias, mlp_bias=config.boolean("mlp_bias", False))


def mistral(config: ConfigReader) -> ModelConfig:
    layers = config.integer("num_hidden_layers", high=common.MAX_LAYERS)
    window = config.integer("sliding_window", 4096, high=2**31, optional=True)
    everywhere = ["full_attention" if window is None else "sliding_attention"] * layers
    if config.get("layer_types") not in (None, everywhere):
        raise UnsupportedModelError(
            f"{config.where}: layer_types that differ between layers are not implemented for MistralForCausalLM."
        )
    return _build(config, positions=131072, windows=[window] * layers)


def qwen2(config: ConfigReader) -> ModelConfig:
    return _build(config, positions=32768, windows=qwen_windows(config), qkv_bias=True)


def qwen3(config: ConfigReader) -> ModelConfig:
    bias = config.boolean("attention_bias", False)
    return _build(
        config, positions=32768, windows=qwen_windows(config), head_dim=128, qk_norm=True, qkv_bias=bias, o_bias=bias
    )


def qwen_windows(config: ConfigReader) -> list[int | None]:
    """With ``use_sliding_window`` the layers from ``max_window_layers`` on have one."""
    window = config.integer("sliding_window", 4096, high=2**31, optional=True)
    if not config.boolean("use_sliding_window", False):
        window = None
    first = config.integer("max_window_layers", 28, low=0)
    layers = range(config.integer("num_hidden_layers", high=common.MAX_LAYERS))
    default = ["sliding_attention" if window and i >= first else "full_attention" for i in layers]
    return common.layer_types(config, default, window)


def _build(config: ConfigReader, positions: int, windows=None, head_dim: int | None = None, **features) -> ModelConfig:
    sizes = common.sizes(config, head_dim)
    positions = common.max_positions(config, positions)
    rope = read_rope(config, sizes["head_dim"], positions)
    if rope.rotary_dim != sizes["head_dim"]:
        raise UnsupportedModelError(f"{config.where}: partial_rotary_factor is not implemented for this architecture.")
    return ModelConfig(
        architecture=config.values["architectures"][0],
        **sizes,
        max_position_embeddings=longest_sequence(rope, positions),
        layers=tuple(LayerConfig(window, rope) for window in windows or [None] * sizes["num_layers"]),
        norm_eps=config.number("rms_norm_eps", 1e-6),
        activation=config.choice("hidden_act", "silu", common.ACTIVATIONS),
        attention_scale=sizes["head_dim"] ** -0.5,
        tie_word_embeddings=config.boolean("tie_word_embeddings", False),
        **common.end_of_text(config),
        **features,
    )
