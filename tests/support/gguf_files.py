"""Writing GGUF files for tests, with the ``gguf`` package and the rules of llama.cpp's converter."""

from __future__ import annotations

import math
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

CONVERTED = {
    "llama": "llama", "mistral": "llama", "mixtral": "llama", "qwen2": "qwen2", "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe", "gemma2": "gemma2", "gemma3_text": "gemma3", "phi3": "phi3", "gpt2": "gpt2",
}  # fmt: skip
# What tensor types without a quantiser are made of: random bytes, with scales that are finite and small.
HALF_SCALES = {
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ2_XXS": (0,), "IQ2_XS": (0,),
    "IQ2_S": (0,), "IQ3_XXS": (0,), "IQ3_S": (0,), "IQ1_S": (0,), "IQ4_NL": (0,), "IQ4_XS": (0,),
}  # fmt: skip


def letters_vocabulary(size: int) -> dict:
    """Metadata of a SentencePiece-like vocabulary of ``size`` tokens, most of them single characters."""
    tokens = ["<unk>", "<s>", "</s>", "▁"] + [chr(0x41 + i) for i in range(size - 4)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * size,
        "tokenizer.ggml.token_type": [2, 3, 3] + [1] * (size - 3),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def write_gguf(path: Path, architecture: str, metadata: dict, tensors: dict) -> Path:
    """Write a file; ``tensors`` maps names to float32 arrays, or to ``(type, array)`` for another type."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        add_value(writer, key, value)
    for name, value in tensors.items():
        type_, array = value if isinstance(value, tuple) else (Type.F32, value)
        data = encode(array, type_)
        writer.add_tensor(name, data, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_value(writer: gguf.GGUFWriter, key: str, value) -> None:
    """Types as llama.cpp's converter chooses them: uint32, int32 in arrays, float32."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def encode(array: np.ndarray, type_: Type) -> np.ndarray:
    """The bytes of ``array`` in a tensor type that has a quantiser."""
    array = np.ascontiguousarray(array, dtype=np.float32)
    if type_ == Type.F32:
        return array
    return gguf.quants.quantize(array, type_)


def random_blocks(type_: Type, rows: int, columns: int, rng: np.random.Generator) -> np.ndarray:
    """Random bytes that are valid blocks of ``type_``, ``[rows, bytes]``."""
    block_size, type_size = gguf.GGML_QUANT_SIZES[type_]
    blocks = rng.integers(0, 256, (rows * columns // block_size, type_size), dtype=np.uint8)
    for at in HALF_SCALES.get(type_.name, ()):
        scale = rng.uniform(-0.1, 0.1, len(blocks)).astype(np.float16)
        blocks[:, at : at + 2] = scale.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, -1)


def convert(path: Path, hf: dict, tensors: dict[str, np.ndarray]) -> Path:
    """A Hugging Face checkpoint as llama.cpp's ``convert_hf_to_gguf.py`` would write it, in float32."""
    architecture = CONVERTED[hf["model_type"]]
    metadata = metadata_of(hf, architecture)
    layers = metadata[f"{architecture}.block_count"]
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, layers)
    converted = {}
    experts: dict[str, list] = {}
    for name, values in tensors.items():
        values = np.asarray(values, dtype=np.float32)
        if ".experts." in name:
            start, _, rest = name.partition(".experts.")
            expert, _, part = rest.partition(".")
            name = f"{start}.experts.{part}"
            experts.setdefault(name, []).append((int(expert), values))
            continue
        converted[names.get_name(name, (".weight", ".bias"))] = _values(name, values, hf, architecture)
    for name, parts in experts.items():
        stacked = np.stack([values for _, values in sorted(parts, key=lambda part: part[0])])
        converted[names.get_name(name, (".weight", ".bias"))] = stacked
    assert None not in converted, "a tensor that the gguf package does not know"
    converted |= rope_tensors(hf)
    return write_gguf(path, architecture, metadata | letters_vocabulary(hf["vocab_size"]), converted)


def _values(name: str, values: np.ndarray, hf: dict, architecture: str) -> np.ndarray:
    if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
        heads = hf["num_attention_heads"] if "q_proj" in name else hf["num_key_value_heads"]
        shape = values.shape  # LlamaModel.permute
        return values.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return values + 1
    if architecture == "gpt2" and name.endswith(("attn.c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return values.T
    return values


def metadata_of(hf: dict, architecture: str) -> dict:
    """The metadata keys of a ``config.json``; features that the format has no key for are left out."""
    if architecture == "gpt2":
        values = {
            "context_length": hf["n_positions"],
            "embedding_length": hf["n_embd"],
            "feed_forward_length": hf.get("n_inner") or 4 * hf["n_embd"],
            "block_count": hf["n_layer"],
            "attention.head_count": hf["n_head"],
            "attention.layer_norm_epsilon": hf["layer_norm_epsilon"],
        }
        return {f"gpt2.{key}": value for key, value in values.items()}
    heads = hf["num_attention_heads"]
    rope = hf.get("rope_parameters") or {}
    scaling = rope.get("full_attention", rope) or {}
    theta = hf.get("rope_theta") or scaling.get("rope_theta", 10000.0)
    scaling = hf.get("rope_scaling") or scaling
    head_dim = hf.get("head_dim") or hf["hidden_size"] // heads
    partial = hf.get("partial_rotary_factor") or scaling.get("partial_rotary_factor") or 1.0
    original = scaling.get("original_max_position_embeddings") or hf.get("original_max_position_embeddings")
    values = {
        "context_length": hf["max_position_embeddings"],
        "embedding_length": hf["hidden_size"],
        "feed_forward_length": hf["intermediate_size"],
        "block_count": hf["num_hidden_layers"],
        "attention.head_count": heads,
        "attention.head_count_kv": hf["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": float(hf["rms_norm_eps"]),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.sliding_window": hf.get("sliding_window"),
        "rope.freq_base": float(theta),
        "rope.dimension_count": int(head_dim * partial),
        "expert_count": hf.get("num_local_experts") or hf.get("num_experts"),
        "expert_used_count": hf.get("num_experts_per_tok"),
        "expert_feed_forward_length": hf.get("moe_intermediate_size"),
        "attn_logit_softcapping": hf.get("attn_logit_softcapping"),
        "final_logit_softcapping": hf.get("final_logit_softcapping"),
    }
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind in ("linear", "yarn"):
        values |= {"rope.scaling.type": kind, "rope.scaling.factor": float(scaling["factor"])}
    if kind in ("yarn", "longrope"):
        values["rope.scaling.original_context_length"] = original
    if kind == "longrope":
        ratio = hf["max_position_embeddings"] / original
        values["rope.scaling.attn_factor"] = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
    return {f"{architecture}.{key}": value for key, value in values.items() if value is not None}


def rope_tensors(hf: dict) -> dict[str, np.ndarray]:
    """The tensors in which the converter stores divisors of rotary frequencies."""
    scaling = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    kind = scaling.get("rope_type") or scaling.get("type")
    if kind == "longrope":
        return {
            "rope_factors_long.weight": np.array(scaling["long_factor"], np.float32),
            "rope_factors_short.weight": np.array(scaling["short_factor"], np.float32),
        }
    if kind != "llama3":
        return {}
    theta = hf.get("rope_theta") or scaling["rope_theta"]
    dim = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    context, factors = scaling["original_max_position_embeddings"], []
    for frequency in 1.0 / theta ** (np.arange(0, dim, 2, dtype=np.float32) / dim):  # Llama's generate_extra_tensors
        wavelength = 2 * math.pi / frequency
        if wavelength < context / high:
            factors.append(1.0)
        elif wavelength > context / low:
            factors.append(factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return {"rope_freqs.weight": np.array(factors, np.float32)}
