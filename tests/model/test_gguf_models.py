"""Whole models: a checkpoint converted to GGUF gives the same features and weights as the checkpoint."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from minipaged.errors import ModelFormatError, UnsupportedModelError
from minipaged.model.architectures import config_from_hf, load_weights
from minipaged.model.gguf import GGUFFile
from minipaged.model.gguf_config import hf_config
from minipaged.model.gguf_header import GGUFHeader, TensorInfo
from minipaged.model.gguf_quants import TYPES
from minipaged.model.rope import rope_tables
from minipaged.model.safetensors_file import SafetensorsSource
from tests.support.gguf_files import CONVERTED, convert, letters_vocabulary, metadata_of, write_gguf
from tests.support.published_configs import PUBLISHED

PARITY = Path(__file__).parent.parent / "fixtures" / "parity"
# A fixture, and what must be changed in its configuration because GGUF has no key for it.
CASES = {
    "llama_gqa": {},
    "llama_linear": {},
    "llama_llama3": {},
    "llama_one_kv_head": {},
    "llama_yarn": {},
    "mistral_no_window": {},
    "mistral_window": {},
    "mixtral_top2": {"sliding_window": None},
    "phi3_longrope_long": {},
    "phi3_longrope_short": {},
    "phi3_window": {},
    "qwen2_tied_yarn": {},
    "qwen3_head_dim": {},
    "gemma2_soft_caps": {"query_pre_attn_scalar": 12},
    "gemma3_two_ropes": {"layer_types": ["sliding_attention"] * 4},
    "gpt2_tied": {},
}
GEMMA3_27B = {
    "num_hidden_layers": 62,
    "hidden_size": 5376,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "intermediate_size": 21504,
}


def flat(value, path=""):
    """Every array inside dataclasses and lists, by its path."""
    if isinstance(value, np.ndarray):
        yield path, value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from flat(getattr(value, field.name), f"{path}.{field.name}")
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from flat(item, f"{path}[{i}]")


def without_rope(config, **changes):
    layers = tuple(dataclasses.replace(layer, rope=None) for layer in config.layers)
    return dataclasses.replace(config, layers=layers, bos_token_id=None, eos_token_ids=(), **changes)


def assert_same_features(got, wanted):
    assert without_rope(got, architecture=wanted.architecture) == without_rope(wanted)
    for a, b in zip(got.layers, wanted.layers, strict=True):
        assert (a.rope is None) == (b.rope is None)
        if b.rope is not None:
            for length in (32, 100):  # longrope changes with the length
                tables = rope_tables(a.rope, length), rope_tables(b.rope, length)
                np.testing.assert_allclose(*np.asarray(tables), atol=2e-6)


@pytest.mark.parametrize("name", CASES)
def test_a_converted_checkpoint_is_the_same_model(tmp_path, name):
    hf = json.loads((PARITY / name / "config.json").read_text()) | CASES[name]
    wanted = config_from_hf(hf)
    checkpoint = SafetensorsSource(PARITY / name)
    tensors = {tensor: checkpoint.read(tensor) for tensor in checkpoint.names()}
    file = GGUFFile(convert(tmp_path / "model.gguf", hf, tensors))
    got = config_from_hf(file.hf_config())
    assert_same_features(got, wanted)
    assert got.bos_token_id == 1 and got.eos_token_ids == (2,)
    wanted_arrays = dict(flat(load_weights(wanted, checkpoint)))
    got_arrays = dict(flat(load_weights(got, file)))
    assert got_arrays.keys() == wanted_arrays.keys()
    tolerance = 1e-7 if "gemma" in name else 0  # Gemma's norms were rounded when 1 was added
    for path, array in wanted_arrays.items():
        np.testing.assert_allclose(got_arrays[path], array, rtol=0, atol=tolerance, err_msg=path)


def header_of(hf: dict) -> GGUFHeader:
    """The header that a published model's file has, as far as its configuration is concerned."""
    architecture = CONVERTED[hf["model_type"]]
    metadata = {"general.architecture": architecture} | metadata_of(hf, architecture)
    shape = (hf["vocab_size"], hf.get("hidden_size") or hf["n_embd"])
    names = ["token_embd.weight"] if hf.get("tie_word_embeddings", True) else ["token_embd.weight", "output.weight"]
    return GGUFHeader(metadata, {name: TensorInfo(name, shape, TYPES[1], 0, 0) for name in names}, 0)


def in_gguf(hf: dict) -> bool:
    """Whether a configuration is one that a GGUF file can be made of, without tensors for rope."""
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    return hf["model_type"] != "gemma" and not {"llama3", "longrope", "su", "dynamic"} & {
        rope.get("rope_type"), rope.get("type")
    }


@pytest.mark.parametrize("name", [name for name, hf in PUBLISHED.items() if in_gguf(hf)])
def test_features_of_published_models_survive(name):
    hf = PUBLISHED[name]
    wanted = config_from_hf(hf)
    got = config_from_hf(hf_config(header_of(hf)))
    assert_same_features(got, wanted)


def test_the_largest_gemmas_scale_scores_by_the_mean_head_size():
    base = next(hf for hf in PUBLISHED.values() if hf["model_type"] == "gemma3_text")
    config = config_from_hf(hf_config(header_of(base | GEMMA3_27B)))
    assert config.attention_scale == pytest.approx((5376 / 32) ** -0.5)
    small = config_from_hf(hf_config(header_of(base)))
    assert small.attention_scale == pytest.approx(small.head_dim**-0.5)


def test_gemma_layers_alternate_without_being_told(tmp_path):
    hf = json.loads((PARITY / "gemma3_two_ropes" / "config.json").read_text())
    metadata = metadata_of(hf, "gemma3") | {"general.architecture": "gemma3", "gemma3.block_count": 13}
    info = TensorInfo("token_embd.weight", (101, 32), TYPES[0], 0, 0)
    config = config_from_hf(hf_config(GGUFHeader(metadata, {info.name: info}, 0)))
    assert [layer.sliding_window for layer in config.layers] == [6, 6, 6, 6, 6, None] * 2 + [6]
    assert {layer.rope.theta for layer in config.layers if layer.sliding_window} == {10000.0}
    metadata = {key.replace("gemma3", "gemma2"): value for key, value in metadata.items()}
    del metadata["gemma2.attention.sliding_window"], metadata["gemma2.final_logit_softcapping"]
    config = config_from_hf(hf_config(GGUFHeader(metadata | {"general.architecture": "gemma2"}, {info.name: info}, 0)))
    assert [layer.sliding_window for layer in config.layers[:4]] == [4096, None, 4096, None]
    assert (config.attention_soft_cap, config.final_soft_cap) == (50.0, 30.0)


TINY = {
    "llama.context_length": 64,
    "llama.embedding_length": 8,
    "llama.feed_forward_length": 16,
    "llama.block_count": 1,
    "llama.attention.head_count": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}


def tiny(tmp_path, metadata=(), tensors=(), architecture="llama", drop=()) -> GGUFFile:
    metadata = TINY | letters_vocabulary(20) | dict(metadata)
    tensors = {"token_embd.weight": np.zeros((20, 8))} | dict(tensors)
    metadata = {key: value for key, value in metadata.items() if key not in drop}
    return GGUFFile(write_gguf(tmp_path / "tiny.gguf", architecture, metadata, tensors))


def test_defaults(tmp_path):
    config = tiny(tmp_path).hf_config()
    assert config["num_key_value_heads"] == 2 and config["head_dim"] == 4 and config["rope_theta"] == 10000.0
    assert config["tie_word_embeddings"] is True and config["rms_norm_eps"] == 1e-5
    assert config["bos_token_id"] == 1 and config["eos_token_id"] == [2]


def test_old_linear_scaling(tmp_path):
    assert tiny(tmp_path, {"llama.rope.scale_linear": 4.0}).hf_config()["rope_scaling"] == {
        "rope_type": "linear",
        "factor": 4.0,
    }


def test_experts_stored_one_by_one(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {f"blk.0.ffn_gate.{i}.weight": rng.normal(size=(16, 8)) for i in range(2)}
    file = tiny(tmp_path, {"llama.expert_count": 2, "llama.expert_used_count": 1}, tensors)
    for i in range(2):
        got = file.read(f"model.layers.0.block_sparse_moe.experts.{i}.w1.weight")
        np.testing.assert_array_equal(got, tensors[f"blk.0.ffn_gate.{i}.weight"].astype(np.float32))


def test_stacked_experts_of_qwen3(tmp_path):
    metadata = {key.replace("llama", "qwen3moe"): value for key, value in TINY.items()} | {
        "qwen3moe.expert_count": 3,
        "qwen3moe.expert_used_count": 2,
        "qwen3moe.expert_feed_forward_length": 4,
    }
    rng = np.random.default_rng(0)
    router, down = rng.normal(size=(3, 8)).astype(np.float32), rng.normal(size=(3, 8, 4)).astype(np.float32)
    tensors = {"blk.0.ffn_gate_inp.weight": router, "blk.0.ffn_down_exps.weight": down}
    file = tiny(tmp_path, metadata, tensors, architecture="qwen3moe")
    assert config_from_hf(file.hf_config()).layers[0].moe
    np.testing.assert_array_equal(file.read("model.layers.0.mlp.gate.weight"), router)
    out = np.zeros((3, 8, 4), np.float32)
    for i in range(3):
        file.read(f"model.layers.0.mlp.experts.{i}.down_proj.weight", out=out[i])
    np.testing.assert_array_equal(out, down)


@pytest.mark.parametrize(
    "changes, error, words",
    [
        ({"architecture": "mamba"}, UnsupportedModelError, "architecture 'mamba'"),
        ({"metadata": {"llama.rope.scaling.type": "ntk"}}, UnsupportedModelError, "'ntk'"),
        ({"metadata": {"llama.rope.dimension_count": 2}}, UnsupportedModelError, "rotary embedding of 2 of 4"),
        ({"metadata": {"llama.attention.value_length": 2}}, UnsupportedModelError, "values 2"),
        ({"metadata": {"split.count": 3}}, UnsupportedModelError, "several GGUF files"),
        ({"metadata": {"llama.logit_scale": 0.5}}, UnsupportedModelError, "llama.logit_scale is 0.5"),
        ({"tensors": {"blk.0.ssm_in.weight": np.zeros((8, 8))}}, UnsupportedModelError, "'blk.0.ssm_in.weight'"),
        ({"tensors": {"blk.0.attn_q.3.weight": np.zeros((8, 8))}}, UnsupportedModelError, "'blk.0.attn_q.3.weight'"),
        ({"tensors": {"unknown": np.zeros(8)}}, UnsupportedModelError, "'unknown'"),
        ({"tensors": {"blk.0.attn_q.weight": np.zeros((6, 8))}}, ModelFormatError, "6 rows"),
        ({"metadata": {"llama.vocab_size": 21}}, ModelFormatError, "vocab_size is 21, but the embedding has 20 rows"),
        ({"metadata": {"llama.block_count": 0}}, ModelFormatError, "block_count is 0"),
        ({"metadata": {"llama.embedding_length": "8"}}, ModelFormatError, "embedding_length is '8'"),
        ({"metadata": {"llama.rope.freq_base": float("nan")}}, ModelFormatError, "freq_base is nan"),
        ({"metadata": {"llama.attention.head_count_kv": [1, 2]}}, ModelFormatError, "head_count_kv"),
        ({"drop": ["llama.context_length"]}, ModelFormatError, "context_length is missing"),
    ],
)
def test_what_is_refused(tmp_path, changes, error, words):
    with pytest.raises(error, match=words):
        tiny(tmp_path, **changes)


def test_rope_tensors_that_contradict_are_refused(tmp_path):
    factors = {"rope_factors_long.weight": np.ones(2)}
    with pytest.raises(ModelFormatError, match="one short and one long"):
        tiny(tmp_path, tensors=factors).hf_config()
    scaled = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    with pytest.raises(UnsupportedModelError, match="together with rope scaling"):
        tiny(tmp_path, scaled, {"rope_freqs.weight": np.ones(2)}).hf_config()


def test_chat_template(tmp_path):
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    file = tiny(tmp_path, {"tokenizer.chat_template": template})
    assert file.chat_template().render([{"role": "user", "content": "Hi"}]) == "<s>Hi</s>"
    assert tiny(tmp_path).chat_template() is None
