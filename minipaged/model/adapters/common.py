"""What Llama and its many descendants share: the keys of their configuration and their tensor names."""

from __future__ import annotations

from minipaged.errors import ModelFormatError, UnsupportedModelError
from minipaged.model.config import LayerConfig, ModelConfig
from minipaged.model.hf_config import ConfigReader
from minipaged.model.hf_rope import MAX_POSITIONS, longest_sequence, read_rope
from minipaged.model.tensor_reader import TensorReader
from minipaged.model.weights import LayerWeights, Linear, ModelWeights, Norm

MAX_LAYERS = 4096
MAX_HEADS = 2**16  # also of head_dim: together with MAX_SIZE, products stay inside 64 bits
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def sizes(config: ConfigReader, head_dim: int | None = None) -> dict:
    """The dimensions of a Llama-like model, as fields of :class:`ModelConfig`.

    ``head_dim`` is the architecture's default; ``None``: hidden size / heads, as where it is ``null``.
    """
    hidden = config.integer("hidden_size")
    heads = config.integer("num_attention_heads", high=MAX_HEADS)
    kv_heads = config.integer("num_key_value_heads", None, optional=True) or heads
    if heads % kv_heads:
        raise ModelFormatError(
            f"{config.where}: num_attention_heads ({heads}) is not a multiple of num_key_value_heads ({kv_heads})."
        )
    head_dim = config.integer("head_dim", head_dim, high=MAX_HEADS, optional=True)
    if head_dim is None:
        if hidden % heads:
            raise ModelFormatError(
                f"{config.where}: hidden_size ({hidden}) is not a multiple of num_attention_heads ({heads}) "
                "and there is no head_dim."
            )
        head_dim = hidden // heads
    return {
        "vocab_size": config.integer("vocab_size", high=2**24),
        "hidden_size": hidden,
        "intermediate_size": config.integer("intermediate_size"),
        "num_layers": num_layers(config),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
    }


def max_positions(config: ConfigReader, default: int) -> int:
    return config.integer("max_position_embeddings", default, high=MAX_POSITIONS)


def end_of_text(config: ConfigReader) -> dict:
    """``bos_token_id`` and ``eos_token_ids``."""
    bos = config.token_ids("bos_token_id")
    return {"bos_token_id": bos[0] if bos else None, "eos_token_ids": config.token_ids("eos_token_id")}


def build(
    config: ConfigReader,
    positions: int,
    windows: list[int | None],
    moe: list[bool] | None = None,
    head_dim: int | None = None,
    theta: float = 10000.0,
    partial_rope: bool = False,
    **features,
) -> ModelConfig:
    """The configuration of a Llama-like model.

    ``positions``, ``head_dim``, ``theta``: what the architecture takes where the file says nothing.
    ``windows``, ``moe``: for each layer. ``partial_rope``: a part of each head may be rotated.
    ``features``: further fields of :class:`ModelConfig`.
    """
    dims = sizes(config, head_dim)
    layers = dims["num_layers"]
    positions = max_positions(config, positions)
    rope = read_rope(config, dims["head_dim"], positions, theta)
    if rope.rotary_dim != dims["head_dim"] and not partial_rope:
        raise UnsupportedModelError(
            f"{config.where}: only {rope.rotary_dim} of {dims['head_dim']} values of a head are to be rotated "
            "(partial_rotary_factor), which is not implemented for this architecture."
        )
    return ModelConfig(
        architecture=config.architecture,
        **dims,
        max_position_embeddings=longest_sequence(rope, positions),
        layers=tuple(
            LayerConfig(window, rope, is_moe) for window, is_moe in zip(windows, moe or [False] * layers, strict=True)
        ),
        norm_eps=config.number("rms_norm_eps", 1e-6),
        activation=config.choice("hidden_act", "silu", ACTIVATIONS),
        attention_scale=dims["head_dim"] ** -0.5,
        tie_word_embeddings=config.boolean("tie_word_embeddings", False),
        **end_of_text(config),
        **features,
    )


def num_layers(config: ConfigReader) -> int:
    return config.integer("num_hidden_layers", high=MAX_LAYERS)


def same_window(config: ConfigReader, default: int | None) -> list[int | None]:
    """The window of each layer where all have the same, ``sliding_window`` (``null``: none)."""
    window = config.integer("sliding_window", default, high=2**31, optional=True)
    layers = num_layers(config)
    if config.get("layer_types") not in (None, ["full_attention" if window is None else "sliding_attention"] * layers):
        raise UnsupportedModelError(
            f"{config.where}: layer_types that differ between layers, or from sliding_window, are not implemented "
            f"for {config.architecture}."
        )
    return [window] * layers


def layer_types(config: ConfigReader, default: list[str], window: int | None) -> list[int | None]:
    """The sliding window of each layer by ``layer_types`` (transformers 5), or by ``default``."""
    types = config.get("layer_types")
    types = default if types is None else types
    if not isinstance(types, list) or len(types) != len(default):
        length = len(types) if isinstance(types, list) else None
        raise config.error("layer_types", f"a list of num_hidden_layers ({len(default)}) names, not of {length}")
    windows = {"full_attention": None, "sliding_attention": window}
    if any(not isinstance(t, str) or t not in windows for t in types):
        raise config.error("layer_types", f"a list of {' or '.join(windows)}")
    if "sliding_attention" in types and window is None:
        raise ModelFormatError(f"{config.where}: layer_types has sliding_attention, but there is no sliding_window.")
    return [windows[t] for t in types]


def weights(config: ModelConfig, tensors: TensorReader, read_mlp=None, norm_plus: float = 0.0) -> ModelWeights:
    """All weights under Llama's names; ``read_mlp`` gives the feed-forward fields, as :func:`mlp` does.

    ``norm_plus`` is added to the weights of norms.
    """
    hidden, read_mlp = config.hidden_size, read_mlp or mlp
    embedding, lm_head = embeddings(config, tensors, "model.embed_tokens.weight")
    layers = []
    for i, layer in enumerate(config.layers):
        prefix = f"model.layers.{i}."

        def norm(name: str, size: int = hidden, prefix=prefix) -> Norm:
            return Norm(tensors.vector(f"{prefix}{name}.weight", size, norm_plus))

        mlp_norm = "pre_feedforward_layernorm" if config.post_norms else "post_attention_layernorm"
        layers.append(
            LayerWeights(
                input_norm=norm("input_layernorm"),
                mlp_norm=norm(mlp_norm),
                post_attention_norm=norm("post_attention_layernorm") if config.post_norms else None,
                post_mlp_norm=norm("post_feedforward_layernorm") if config.post_norms else None,
                q_norm=norm("self_attn.q_norm", config.head_dim) if config.qk_norm else None,
                k_norm=norm("self_attn.k_norm", config.head_dim) if config.qk_norm else None,
                qkv=qkv(config, tensors, prefix + "self_attn."),
                o=linear(
                    tensors, [(prefix + "self_attn.o_proj", hidden)], config.num_heads * config.head_dim, config.o_bias
                ),
                **read_mlp(config, tensors, prefix, layer),
            )
        )
    return ModelWeights(embedding, lm_head, Norm(tensors.vector("model.norm.weight", hidden, norm_plus)), layers)


def embeddings(config: ModelConfig, tensors: TensorReader, name: str, head: str = "lm_head.weight"):
    """The embedding and the output matrix ``[vocab, hidden]``: one array where they are tied."""
    shape = (config.vocab_size, config.hidden_size)
    if config.tie_word_embeddings:
        if tensors.has(head):
            embedding = tensors.packed(tensors.shared(name, head, *shape), "lm_head")
        else:
            embedding = tensors.matrix([(name, shape[0])], shape[1], role="lm_head")
        return embedding, embedding
    embedding = tensors.matrix([(name, shape[0])], shape[1], role="embedding")
    return embedding, tensors.matrix([(head, shape[0])], shape[1], role="lm_head")


def linear(
    tensors: TensorReader, parts: list[tuple[str, int]], columns: int, bias: bool, role: str = "linear"
) -> Linear:
    """Several projections of one input stacked into one."""
    weight = tensors.matrix([(f"{name}.weight", rows) for name, rows in parts], columns, role=role)
    return Linear(weight, tensors.rows([(f"{name}.bias", rows) for name, rows in parts]) if bias else None)


def qkv(config: ModelConfig, tensors: TensorReader, prefix: str) -> Linear:
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    parts = [(f"{prefix}q_proj", q_rows), (f"{prefix}k_proj", kv_rows), (f"{prefix}v_proj", kv_rows)]
    if tensors.has(f"{prefix}qkv_proj.weight"):  # Phi-3 stores them stacked
        parts = [(f"{prefix}qkv_proj", q_rows + 2 * kv_rows)]
    return linear(tensors, parts, config.hidden_size, config.qkv_bias)


def mlp(config: ModelConfig, tensors: TensorReader, prefix: str, layer: LayerConfig) -> dict:
    """The feed-forward fields of the layer whose tensors' names begin with ``prefix``."""
    prefix, inner = f"{prefix}mlp.", config.intermediate_size
    parts = [(f"{prefix}gate_proj", inner), (f"{prefix}up_proj", inner)]
    if tensors.has(f"{prefix}gate_up_proj.weight"):  # Phi-3 stores them stacked
        parts = [(f"{prefix}gate_up_proj", 2 * inner)]
    return {
        "gate_up": linear(tensors, parts, config.hidden_size, config.mlp_bias, role="gated"),
        "down": linear(tensors, [(f"{prefix}down_proj", config.hidden_size)], inner, config.mlp_bias),
    }
