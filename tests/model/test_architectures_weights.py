"""Tensors into weights: what is missing, misshaped or left over, ties, and how much memory it takes."""

from __future__ import annotations

import dataclasses
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from minipaged.errors import ModelFormatError
from minipaged.model.architectures import config_from_hf, load_weights
from minipaged.model.config import ModelConfig
from minipaged.model.weights import ModelWeights

PARITY = Path(__file__).parent.parent / "fixtures" / "parity"


class DictSource:
    """A TensorSource over arrays in memory, which remembers what was read."""

    def __init__(self, tensors: dict[str, np.ndarray]):
        self.tensors = tensors
        self.reads: list[str] = []

    def names(self):
        return list(self.tensors)

    def shape(self, name):
        return self.tensors[name].shape

    def read(self, name, out=None):
        self.reads.append(name)
        out[...] = self.tensors[name]
        return out


def fixture(name: str) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    folder = PARITY / name
    return config_from_hf(json.loads((folder / "config.json").read_text())), load_file(folder / "model.safetensors")


def refused(config: ModelConfig, tensors: dict[str, np.ndarray], message: str) -> None:
    source = DictSource(tensors)
    with pytest.raises(ModelFormatError, match=message):
        load_weights(config, source)
    assert source.reads == []


def test_qkv_and_gate_up_are_stacked_in_order():
    config, tensors = fixture("llama_biases_head_dim")
    layer = load_weights(config, DictSource(tensors)).layers[1]
    prefix = "model.layers.1."
    for stacked, names in (
        (layer.qkv, ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
        (layer.gate_up, ["mlp.gate_proj", "mlp.up_proj"]),
        (layer.o, ["self_attn.o_proj"]),
        (layer.down, ["mlp.down_proj"]),
    ):
        for part in ("weight", "bias"):
            expected = np.concatenate([tensors[f"{prefix}{name}.{part}"] for name in names])
            array = getattr(stacked, part)
            np.testing.assert_array_equal(array, expected.astype(np.float32))
            assert array.dtype == np.float32
    # At least as many outputs as inputs: by columns.
    assert layer.gate_up.weight.flags.f_contiguous and layer.down.weight.flags.c_contiguous


def test_gpt2_is_transposed_and_gemma_norms_are_one_more():
    config, tensors = fixture("gpt2_untied_erf")
    weights = load_weights(config, DictSource(tensors))
    np.testing.assert_array_equal(weights.layers[0].qkv.weight, tensors["h.0.attn.c_attn.weight"].T)
    assert weights.layers[0].qkv.weight.flags.f_contiguous
    config, tensors = fixture("gemma3_pattern")
    weights = load_weights(config, DictSource(tensors))
    np.testing.assert_array_equal(weights.final_norm.weight, 1 + tensors["model.norm.weight"].astype(np.float32))


def test_experts_one_by_one_and_stacked_give_the_same():
    config, tensors = fixture("qwen3_moe_dense_layer")
    separate = load_weights(config, DictSource(tensors))
    assert separate.layers[1].experts is None and separate.layers[0].gate_up is None
    stacked = {name: t for name, t in tensors.items() if ".experts." not in name}
    for i in (0, 2):
        experts = separate.layers[i].experts
        stacked[f"model.layers.{i}.mlp.experts.gate_up_proj"] = experts.gate_up
        stacked[f"model.layers.{i}.mlp.experts.down_proj"] = experts.down
    again = load_weights(config, DictSource(stacked))
    for i in (0, 2):
        np.testing.assert_array_equal(again.layers[i].experts.gate_up, separate.layers[i].experts.gate_up)
        np.testing.assert_array_equal(again.layers[i].experts.down, separate.layers[i].experts.down)
    up = tensors["model.layers.2.mlp.experts.3.up_proj.weight"]
    np.testing.assert_array_equal(separate.layers[2].experts.gate_up[3, config.moe_intermediate_size :], up)


def test_tied_embeddings_are_one_array():
    config, tensors = fixture("llama_biases_head_dim")
    assert config.tie_word_embeddings and "lm_head.weight" not in tensors
    weights = load_weights(config, DictSource(tensors))
    assert weights.lm_head is weights.embedding
    # An equal copy of the embedding is harmless, another matrix is a contradiction.
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    weights = load_weights(config, DictSource(tensors))
    assert weights.lm_head is weights.embedding
    np.testing.assert_array_equal(weights.embedding, tensors["model.embed_tokens.weight"])
    tensors["lm_head.weight"][3, 5] += 1
    with pytest.raises(ModelFormatError, match="tie_word_embeddings is true, but .*lm_head.weight"):
        load_weights(config, DictSource(tensors))


@pytest.mark.parametrize("name", sorted(path.name for path in PARITY.iterdir()))
def test_each_missing_tensor_is_reported_by_name(name):
    config, tensors = fixture(name)
    ignored = ".attn.bias" if config.architecture == "GPT2LMHeadModel" else "nothing"
    for missing in tensors:
        if not missing.endswith(ignored):
            source = DictSource({k: v for k, v in tensors.items() if k != missing})
            with pytest.raises(ModelFormatError):
                load_weights(config, source)
            assert source.reads == []
    name = next(n for n in tensors if n.endswith("norm.weight") or n.endswith("ln_f.weight"))
    refused(config, {k: v for k, v in tensors.items() if k != name}, rf"missing from the file \(1\): {name}")


def test_a_misshaped_tensor_is_reported_with_both_shapes():
    config, tensors = fixture("llama_gqa")
    tensors["model.layers.1.self_attn.k_proj.weight"] = np.zeros((8, 32), np.float16)
    refused(config, tensors, r"k_proj.weight has \(8, 32\), needed \(16, 32\)")


@pytest.mark.parametrize(
    "extra",
    [
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.2.input_layernorm.weight",
        "lm_head.bias",
    ],
)
def test_tensors_that_would_be_left_out_are_refused(extra):
    config, tensors = fixture("llama_gqa")
    refused(config, {**tensors, extra: np.zeros(32, np.float16)}, rf"unknown to this architecture \(1\): {extra}")


def test_buffers_of_old_files_are_ignored():
    config, tensors = fixture("llama_gqa")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
    load_weights(config, DictSource(tensors))
    config, tensors = fixture("gpt2_tied")
    tensors["transformer.h.0.attn.masked_bias"] = np.zeros((), np.float32)
    tensors["transformer.h.0.attn.bias"] = np.zeros((1, 1, 64, 64), np.float32)
    load_weights(config, DictSource(tensors))


BIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 4000,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
}


def big_source(config: ModelConfig) -> DictSource:
    """A checkpoint of 33 MB whose tensors occupy no memory."""
    hidden, inner = config.hidden_size, config.intermediate_size
    shapes = {"model.embed_tokens": (4000, hidden), "lm_head": (4000, hidden), "model.norm": (hidden,)}
    for i in range(config.num_layers):
        prefix = f"model.layers.{i}."
        shapes.update({f"{prefix}self_attn.{p}_proj": (hidden, hidden) for p in "qkvo"})
        shapes.update({f"{prefix}mlp.{p}_proj": (inner, hidden) for p in ("gate", "up")})
        shapes[f"{prefix}mlp.down_proj"] = (hidden, inner)
        shapes.update({f"{prefix}{p}_layernorm": (hidden,) for p in ("input", "post_attention")})
    return DictSource({f"{n}.weight": np.broadcast_to(np.float32(1), shape) for n, shape in shapes.items()})


def peak_of(function) -> int:
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_loading_takes_no_more_memory_than_the_weights():
    config = config_from_hf(BIG)
    source = big_source(config)
    size = sum(t.size * 4 for t in source.tensors.values())
    held: list[ModelWeights] = []
    peak = peak_of(lambda: held.append(load_weights(config, source)))
    assert size <= peak < size + 200_000


def test_a_lying_file_costs_no_memory():
    config = config_from_hf(BIG)
    source = big_source(config)
    source.tensors["model.norm.weight"] = np.zeros(511, np.float32)  # the last to be looked at

    def load():
        with pytest.raises(ModelFormatError, match="511"):
            load_weights(config, source)

    assert peak_of(load) < 1_000_000


def test_a_config_of_many_experts_is_refused_at_once():
    """4096 layers of 4096 experts would be 50 million tensors to miss."""
    config, tensors = fixture("mixtral_top2")
    layers = (config.layers[0],) * 4096
    config = dataclasses.replace(config, num_layers=4096, layers=layers, num_experts=4096)
    refused(config, tensors, r"tensors missing from the file \(999\)")


def test_sizes_at_their_limits_do_not_overflow():
    huge = {**BIG, "vocab_size": 2**24, "hidden_size": 2**20, "intermediate_size": 2**20, "head_dim": 2**16}
    config = config_from_hf({**huge, "num_attention_heads": 2**16, "num_hidden_layers": 1})
    refused(config, big_source(config_from_hf(BIG)).tensors, "of another shape")
