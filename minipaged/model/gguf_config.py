"""From GGUF metadata to what Hugging Face's ``config.json`` says of the same model.

Some of a model's features are not in the metadata, because llama.cpp has them in its code, by
architecture (``src/llama-model.cpp``): those are written down here.
"""

from __future__ import annotations

import math

import numpy as np

from minipaged.errors import ModelFormatError, UnsupportedModelError
from minipaged.model.gguf_header import GGUFHeader

MAX_SIZE = 1 << 31
# General architecture in GGUF -> class and model type in config.json.
ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
    "qwen3moe": ("Qwen3MoeForCausalLM", "qwen3_moe"),
    "gemma2": ("Gemma2ForCausalLM", "gemma2"),
    "gemma3": ("Gemma3ForCausalLM", "gemma3_text"),
    "phi3": ("Phi3ForCausalLM", "phi3"),
    "gpt2": ("GPT2LMHeadModel", "gpt2"),
}

# Features of other architectures; where one is switched on, leaving it out would change the result.
UNSUPPORTED = (
    "attention.clamp_kqv", "attention.max_alibi_bias", "attention.scale", "embedding_scale", "expert_shared_count",
    "leading_dense_block_count", "logit_scale", "nextn_predict_layers", "residual_scale", "use_parallel_residual",
)  # fmt: skip


class Metadata:
    """Typed access to metadata; keys are given without the architecture they begin with."""

    def __init__(self, header: GGUFHeader):
        self.header = header
        self.values = header.metadata
        self.architecture = self._typed("general.architecture", str, None)
        if self.architecture not in ARCHITECTURES:
            raise UnsupportedModelError(
                f"architecture {self.architecture!r} is not supported; supported in GGUF files: "
                f"{', '.join(ARCHITECTURES)}."
            )

    def integer(self, key: str, default: int | None = None, low: int = 1, high: int = MAX_SIZE) -> int:
        """A size or count. Where the format allows one value a layer, all must be equal."""
        value = self.get(key)
        if isinstance(value, np.ndarray) and value.size and value.dtype.kind in "iu" and (value == value[0]).all():
            value = int(value[0])
        if value is None and default is not None:
            return default
        if type(value) is not int or not low <= value <= high:
            raise ModelFormatError(f"metadata {self._full(key)} is {_show(value)}; it must be from {low} to {high}.")
        return value

    def number(self, key: str, default: float | None = None, high: float = 1e12) -> float:
        """A positive, finite number."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if type(value) not in (int, float) or not 0 < value <= high:
            raise ModelFormatError(f"metadata {self._full(key)} is {_show(value)}; it must be a positive number.")
        return float(str(np.float32(value)))  # 1e-05, not its float32 neighbour 9.99999975e-06

    def optional_number(self, key: str) -> float | None:
        return self.number(key) if self.get(key) else None

    def string(self, key: str, default: str) -> str:
        return self._typed(self._full(key), str, default)

    def get(self, key: str):
        return self.values.get(self._full(key))

    def _full(self, key: str) -> str:
        return key if key.startswith(("general.", "tokenizer.", "split.")) else f"{self.architecture}.{key}"

    def _typed(self, key: str, type_: type, default):
        value = self.values.get(key, default)
        if type(value) is not type_:
            raise ModelFormatError(f"metadata {key} is {_show(value)}; it must be a {type_.__name__}.")
        return value


def hf_config(header: GGUFHeader) -> dict:
    """The model's configuration in ``config.json``'s spelling, without token ids.

    Raises :class:`ModelFormatError` for metadata that is missing or makes no sense,
    :class:`UnsupportedModelError` for architectures and features that are not known.
    """
    meta = Metadata(header)
    if meta.integer("split.count", 1, low=0) > 1:
        raise UnsupportedModelError(
            "the model is split over several GGUF files; join them with `llama-gguf-split --merge`."
        )
    for key in UNSUPPORTED:
        if meta.get(key):
            raise UnsupportedModelError(f"metadata {meta.architecture}.{key} is {_show(meta.get(key))}; not supported.")
    if meta.architecture == "gpt2":
        return _gpt2(meta)
    class_name, model_type = ARCHITECTURES[meta.architecture]
    hidden_size = meta.integer("embedding_length")
    num_heads = meta.integer("attention.head_count")
    head_dim = meta.integer("attention.key_length", hidden_size // num_heads or None)
    value_dim = meta.integer("attention.value_length", head_dim)
    if value_dim != head_dim:
        raise UnsupportedModelError(f"keys have {head_dim} numbers a head, values {value_dim}; both must be equal.")
    config = {
        "architectures": [class_name],
        "model_type": model_type,
        "vocab_size": _vocab_size(meta),
        "hidden_size": hidden_size,
        "intermediate_size": meta.integer("feed_forward_length"),
        "num_hidden_layers": meta.integer("block_count", high=1 << 16),
        "num_attention_heads": num_heads,
        "num_key_value_heads": meta.integer("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "max_position_embeddings": meta.integer("context_length"),
        "rms_norm_eps": meta.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": meta.number("rope.freq_base", 1e6 if meta.architecture == "gemma3" else 1e4),
        "rope_scaling": _rope_scaling(meta),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in header.tensors,
    }
    rotary_dim = meta.integer("rope.dimension_count", head_dim)
    if rotary_dim != head_dim:
        if meta.architecture != "phi3":
            raise UnsupportedModelError(f"rotary embedding of {rotary_dim} of {head_dim} dimensions of a head.")
        config["partial_rotary_factor"] = rotary_dim / head_dim
    return config | _FEATURES[meta.architecture](meta, config)


def _vocab_size(meta: Metadata) -> int:
    embedding = meta.header.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelFormatError("the file has no tensor token_embd.weight; it holds no language model.")
    if meta.integer("vocab_size", embedding.shape[0]) != embedding.shape[0]:
        raise ModelFormatError(
            f"metadata vocab_size is {meta.integer('vocab_size')}, but the embedding has {embedding.shape[0]} rows."
        )
    return embedding.shape[0]


def _llama(meta: Metadata, config: dict) -> dict:
    if meta.get("expert_count"):
        return {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "num_local_experts": meta.integer("expert_count"),
            "num_experts_per_tok": meta.integer("expert_used_count"),
            "sliding_window": None,
        }
    if meta.get("attention.sliding_window"):
        window = meta.integer("attention.sliding_window")
        return {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window}
    return {
        "attention_bias": "blk.0.attn_q.bias" in meta.header.tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in meta.header.tensors,
    }


def _qwen(meta: Metadata, config: dict) -> dict:
    return {"use_sliding_window": False, "sliding_window": None}


def _qwen3_moe(meta: Metadata, config: dict) -> dict:
    return {
        "num_experts": meta.integer("expert_count"),
        "num_experts_per_tok": meta.integer("expert_used_count"),
        "moe_intermediate_size": meta.integer("expert_feed_forward_length"),
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _gemma2(meta: Metadata, config: dict) -> dict:
    """Every other layer is local, beginning with the first; the 27B model scales scores by the mean head size."""
    heads_scale = config["num_hidden_layers"] == 46
    return _gemma(meta, config, period=2, window=4096, mean_head_scale=heads_scale) | {
        "attn_logit_softcapping": meta.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": meta.number("final_logit_softcapping", 30.0),
    }


def _gemma3(meta: Metadata, config: dict) -> dict:
    """Five local layers, then a global one; local layers rotate with their own base, unscaled."""
    heads_scale = config["num_hidden_layers"] == 62
    return _gemma(meta, config, period=6, window=None, mean_head_scale=heads_scale) | {
        "rope_local_base_freq": meta.number("rope.freq_base_swa", 1e4),
        "attn_logit_softcapping": None,
        "final_logit_softcapping": meta.optional_number("final_logit_softcapping"),
    }


def _gemma(meta: Metadata, config: dict, period: int, window: int | None, mean_head_scale: bool) -> dict:
    layers = range(1, config["num_hidden_layers"] + 1)
    mean_head_dim = config["hidden_size"] // config["num_attention_heads"]
    return {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": mean_head_dim if mean_head_scale else config["head_dim"],
        "sliding_window": meta.integer("attention.sliding_window", window),
        "layer_types": ["full_attention" if layer % period == 0 else "sliding_attention" for layer in layers],
    }


def _phi3(meta: Metadata, config: dict) -> dict:
    window = meta.get("attention.sliding_window")
    return {
        "sliding_window": meta.integer("attention.sliding_window") if window else None,
    }


_FEATURES = {
    "llama": _llama,
    "qwen2": _qwen,
    "qwen3": _qwen,
    "qwen3moe": _qwen3_moe,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
}


def _gpt2(meta: Metadata) -> dict:
    class_name, model_type = ARCHITECTURES["gpt2"]
    return {
        "architectures": [class_name],
        "model_type": model_type,
        "vocab_size": _vocab_size(meta),
        "n_embd": meta.integer("embedding_length"),
        "n_layer": meta.integer("block_count", high=1 << 16),
        "n_head": meta.integer("attention.head_count"),
        "n_positions": meta.integer("context_length"),
        "n_inner": meta.integer("feed_forward_length"),
        "layer_norm_epsilon": meta.number("attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
        "tie_word_embeddings": "output.weight" not in meta.header.tensors,
    }


def _rope_scaling(meta: Metadata) -> dict | None:
    """``rope_scaling`` of ``config.json``, where it is in the metadata alone."""
    kind = meta.string("rope.scaling.type", "none")
    if kind == "none" and meta.get("rope.scale_linear"):
        return {"rope_type": "linear", "factor": meta.number("rope.scale_linear")}
    if kind in ("none", "longrope"):
        return None
    if kind not in ("linear", "yarn"):
        raise UnsupportedModelError(f"rope scaling of type {kind!r} is not supported.")
    factor = meta.number("rope.scaling.factor")
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    scaling = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": meta.integer("rope.scaling.original_context_length"),
        "beta_fast": meta.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": meta.number("rope.scaling.yarn_beta_slow", 1.0),
    }
    if meta.get("rope.scaling.attn_factor"):
        scaling["attention_factor"] = meta.number("rope.scaling.attn_factor") * (0.1 * math.log(factor) + 1.0)
    return scaling


def rope_factors_config(header: GGUFHeader, config: dict, factors: dict[str, np.ndarray]) -> dict:
    """``rope_scaling`` made of the tensors that hold a divisor for each rotary frequency.

    Llama 3's files have one set, ``rope_freqs``, worked out by the converter from the parameters of
    its scaling; it is given back as ``longrope`` with equal divisors for all lengths, which is the
    same thing. Phi-3's have two, for short and for long sequences.
    """
    if not factors:
        return {}
    meta = Metadata(header)
    if config.get("rope_scaling"):
        raise UnsupportedModelError(f"{', '.join(factors)} together with rope scaling {config['rope_scaling']}.")
    context = config["max_position_embeddings"]
    same = factors.get("rope_freqs.weight")
    short = factors.get("rope_factors_short.weight", same)
    long = factors.get("rope_factors_long.weight", same)
    if short is None or long is None or (same is not None and len(factors) > 1):
        raise ModelFormatError(f"the file has {', '.join(factors)}; it must be one set, or one short and one long.")
    scaling = {
        "rope_type": "longrope",
        "short_factor": short.ravel().tolist(),
        "long_factor": long.ravel().tolist(),
        "original_max_position_embeddings": context,
        "attention_factor": 1.0,
    }
    if same is None:
        scaling["original_max_position_embeddings"] = meta.integer("rope.scaling.original_context_length")
        scaling["attention_factor"] = meta.number("rope.scaling.attn_factor", 1.0)
    return {"rope_scaling": scaling}


def _show(value) -> str:
    return "missing" if value is None else repr(value)[:60]
