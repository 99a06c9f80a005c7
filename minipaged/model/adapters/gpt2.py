"""GPT-2: learned positions, LayerNorm, biases everywhere, and weights stored ``[in, out]`` ("Conv1D")."""

from __future__ import annotations

from minipaged.errors import ModelFormatError
from minipaged.model.adapters import common
from minipaged.model.config import LayerConfig, ModelConfig
from minipaged.model.hf_config import ConfigReader
from minipaged.model.tensor_reader import TensorReader
from minipaged.model.weights import LayerWeights, Linear, ModelWeights, Norm

IGNORED_TENSORS = r"(^|\.)h\.\d+\.attn\.bias$"  # the causal mask


def gpt2(config: ConfigReader) -> ModelConfig:
    config.agree("n_ctx", "n_positions")
    hidden = config.integer("n_embd")
    heads = config.integer("n_head")
    if hidden % heads:
        raise ModelFormatError(f"{config.where}: n_embd ({hidden}) is not a multiple of n_head ({heads}).")
    layers = config.integer("n_layer", high=common.MAX_LAYERS)
    return ModelConfig(
        architecture=config.architecture,
        vocab_size=config.integer("vocab_size", high=2**24),
        hidden_size=hidden,
        intermediate_size=config.integer("n_inner", None, optional=True) or 4 * hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        max_position_embeddings=config.integer("n_positions", 1024),
        layers=(LayerConfig(),) * layers,
        norm="layer",
        norm_eps=config.number("layer_norm_epsilon", 1e-5),
        activation=config.choice("activation_function", "gelu_new", common.ACTIVATIONS),
        gated=False,
        attention_scale=(hidden // heads) ** -0.5,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        learned_positions=True,
        tie_word_embeddings=config.boolean("tie_word_embeddings", True),
        **common.end_of_text(config),
    )


def weights(config: ModelConfig, tensors: TensorReader) -> ModelWeights:
    hidden, inner = config.hidden_size, config.intermediate_size
    top = "transformer." if tensors.has("transformer.wte.weight") else ""  # older files have no prefix

    def norm(name: str) -> Norm:
        return Norm(tensors.vector(f"{name}.weight", hidden), tensors.vector(f"{name}.bias", hidden))

    def conv1d(name: str, rows: int, columns: int) -> Linear:
        weight = tensors.matrix([(f"{name}.weight", rows)], columns, transposed=True)
        return Linear(weight, tensors.vector(f"{name}.bias", rows))

    embedding, lm_head = common.embeddings(config, tensors, f"{top}wte.weight")
    layers = []
    for i in range(config.num_layers):
        prefix = f"{top}h.{i}."
        layers.append(
            LayerWeights(
                input_norm=norm(f"{prefix}ln_1"),
                qkv=conv1d(f"{prefix}attn.c_attn", 3 * hidden, hidden),
                o=conv1d(f"{prefix}attn.c_proj", hidden, hidden),
                mlp_norm=norm(f"{prefix}ln_2"),
                gate_up=conv1d(f"{prefix}mlp.c_fc", inner, hidden),
                down=conv1d(f"{prefix}mlp.c_proj", hidden, inner),
            )
        )
    return ModelWeights(
        embedding=embedding,
        lm_head=lm_head,
        final_norm=norm(f"{top}ln_f"),
        layers=layers,
        positions=tensors.rows([(f"{top}wpe.weight", config.max_position_embeddings)], hidden),
    )
