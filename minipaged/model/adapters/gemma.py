"""Gemma 2 and the text model of Gemma 3.

Embeddings are scaled by sqrt(hidden_size), norms multiply by one more than what is stored and also
stand after attention and feed-forward part, and layers with a sliding window alternate with layers
that see everything. Gemma 2 soft-caps scores and logits; Gemma 3 has norms on q and k instead, and a
rope of its own for each kind of layer.
"""

from __future__ import annotations

from minipaged.errors import ModelFormatError
from minipaged.model.adapters import common
from minipaged.model.config import LayerConfig, ModelConfig, RopeConfig
from minipaged.model.hf_config import ConfigReader
from minipaged.model.hf_rope import longest_sequence, read_rope, read_rope_section
from minipaged.model.tensor_reader import TensorReader
from minipaged.model.weights import ModelWeights


def gemma2(config: ConfigReader) -> ModelConfig:
    windows = _windows(config, pattern=2)
    sizes = common.sizes(config, head_dim=256)
    positions = common.max_positions(config, 8192)
    rope = read_rope(config, sizes["head_dim"], positions)
    return _build(
        config,
        sizes,
        longest_sequence(rope, positions),
        [(window, rope) for window in windows],
        attention_soft_cap=config.number("attn_logit_softcapping", 50.0, optional=True),
        final_soft_cap=config.number("final_logit_softcapping", 30.0, optional=True),
    )


def gemma3(config: ConfigReader) -> ModelConfig:
    # _sliding_window_pattern, which transformers 5 writes as well, is always 6 and means nothing.
    windows = _windows(config, pattern=config.integer("sliding_window_pattern", 6))
    sizes = common.sizes(config, head_dim=256)
    positions = common.max_positions(config, 131072)
    sections = config.section("rope_parameters")
    if sections is None:  # transformers 4: rope_scaling is for the layers that see everything
        full, local = config.section("rope_scaling"), None
    else:
        full, local = sections.section("full_attention"), sections.section("sliding_attention")
        config.agree("rope_scaling", "rope_parameters")
        if sections.values.keys() - sections.seen:
            raise config.error("rope_parameters", "an object of full_attention and sliding_attention")
    # Scaled or not, max_position_embeddings of Gemma 3 is the final length.
    full_rope = read_rope_section(config, full, sizes["head_dim"], positions, "rope_theta", 1e6)
    local_rope = read_rope_section(config, local, sizes["head_dim"], positions, "rope_local_base_freq", 1e4)
    # attn_logit_softcapping is deliberately not read: transformers ignores it in Gemma 3, so that a
    # file that sets it has no clear meaning and is refused.
    return _build(
        config,
        sizes,
        positions,
        [(window, full_rope if window is None else local_rope) for window in windows],
        final_soft_cap=config.number("final_logit_softcapping", None, optional=True),
        qk_norm=True,
    )


def weights(config: ModelConfig, tensors: TensorReader) -> ModelWeights:
    return common.weights(config, tensors, norm_plus=1.0)


def _windows(config: ConfigReader, pattern: int) -> list[int | None]:
    """The last of every ``pattern`` layers sees everything, the others have a sliding window."""
    window = config.integer("sliding_window", 4096, high=2**31, optional=True)
    layers = common.num_layers(config)
    default = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(layers)]
    types = config.get("layer_types")
    if config.values.get("sliding_window_pattern") is not None and types not in (None, default):
        raise ModelFormatError(
            f"{config.where}: sliding_window_pattern is {pattern}, but layer_types follows another pattern."
        )
    return common.layer_types(config, default, window)


def _build(
    config: ConfigReader, sizes: dict, positions: int, layers: list[tuple[int | None, RopeConfig]], **features
) -> ModelConfig:
    for _, rope in layers:
        if rope.rotary_dim != sizes["head_dim"]:
            raise ModelFormatError(f"{config.where}: partial_rotary_factor has no meaning for Gemma.")
    bias = config.boolean("attention_bias", False)
    return ModelConfig(
        architecture=config.architecture,
        **sizes,
        max_position_embeddings=positions,
        layers=tuple(LayerConfig(window, rope) for window, rope in layers),
        norm_eps=config.number("rms_norm_eps", 1e-6),
        # Not hidden_act: published files have a wrong one beside it, which transformers ignores too.
        activation=config.choice("hidden_activation", "gelu_pytorch_tanh", common.ACTIVATIONS),
        attention_scale=config.number("query_pre_attn_scalar", 256) ** -0.5,
        embedding_scale=sizes["hidden_size"] ** 0.5,
        post_norms=True,
        qkv_bias=bias,
        o_bias=bias,
        tie_word_embeddings=config.boolean("tie_word_embeddings", True),
        **common.end_of_text(config),
        **features,
    )
