"""config.json of published models, in both spellings, and everything that is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minipaged.errors import ModelError, ModelFormatError, UnsupportedModelError
from minipaged.model.architectures import config_from_hf
from minipaged.model.config import ModelConfig
from tests.support.published_configs import PUBLISHED

PARITY = Path(__file__).parent.parent / "fixtures" / "parity"
# What must come out: shape of the model, and of what makes it special.
SHAPES = {  # layers, heads, kv heads, head_dim, tied, longest sequence
    "Llama-2-7b": (32, 32, 32, 128, False, 4096),
    "Llama-3.2-1B": (16, 32, 8, 64, True, 131072),
    "SmolLM2-135M-Instruct": (30, 9, 3, 64, True, 8192),
    "TinyLlama-1.1B-Chat-v1.0": (22, 32, 4, 64, False, 2048),
    "Mistral-7B-v0.1": (32, 32, 8, 128, False, 32768),
    "Mistral-7B-v0.3": (32, 32, 8, 128, False, 32768),
    "Qwen2.5-0.5B": (24, 14, 2, 64, True, 32768),
    "Qwen3-0.6B": (28, 16, 8, 128, True, 40960),
    "gemma-2-2b": (26, 8, 4, 256, True, 8192),
    "gemma-3-270m": (18, 4, 1, 256, True, 32768),
    "gemma-3-1b-it": (26, 4, 1, 256, True, 32768),
    "Phi-3-mini-4k-instruct": (32, 32, 32, 96, False, 4096),
    "Phi-3-mini-128k-instruct": (32, 32, 32, 96, False, 131072),
    "Phi-4-mini-instruct": (32, 24, 8, 128, True, 131072),
    "gpt2": (12, 12, 12, 64, True, 1024),
    "Mixtral-8x7B-v0.1": (32, 32, 8, 128, False, 32768),
    "Qwen3-30B-A3B": (48, 32, 4, 128, False, 40960),
}


def read(name: str, **changes) -> ModelConfig:
    return config_from_hf({**PUBLISHED[name], **changes})


def without(name: str, *keys: str, **changes) -> dict:
    return {k: v for k, v in {**PUBLISHED[name], **changes}.items() if k not in keys}


@pytest.mark.parametrize("name", PUBLISHED)
def test_shape_of_published_models(name):
    c = read(name)
    assert SHAPES[name] == (
        c.num_layers,
        c.num_heads,
        c.num_kv_heads,
        c.head_dim,
        c.tie_word_embeddings,
        c.max_position_embeddings,
    )
    assert len(c.layers) == c.num_layers


def test_features_of_published_models():
    c = read("Llama-3.2-1B")
    assert c.layers[0].rope.scaling == "llama3" and c.layers[0].rope.theta == 500000
    assert c.layers[0].rope.parameters["original_max_position_embeddings"] == 8192
    assert c.eos_token_ids == (128001, 128008, 128009) and c.bos_token_id == 128000
    assert c.norm_eps == 1e-5 and c.attention_scale == 0.125 and not c.qkv_bias and not c.mlp_bias

    assert {layer.sliding_window for layer in read("Mistral-7B-v0.1").layers} == {4096}
    assert {layer.sliding_window for layer in read("Mistral-7B-v0.3").layers} == {None}

    c = read("Qwen2.5-0.5B")
    assert c.qkv_bias and not c.o_bias and not c.qk_norm and c.layers[23].sliding_window is None
    c = read("Qwen3-0.6B")
    assert c.qk_norm and not c.qkv_bias and c.hidden_size != c.num_heads * c.head_dim

    c = read("gemma-2-2b")
    assert (c.attention_soft_cap, c.final_soft_cap) == (50, 30) and c.embedding_scale == 48 and c.post_norms
    assert c.activation == "gelu_tanh" and c.attention_scale == 1 / 16
    assert [layer.sliding_window for layer in c.layers[:4]] == [4096, None, 4096, None]

    for name in ("gemma-3-270m", "gemma-3-1b-it"):
        c = read(name)
        assert [layer.sliding_window for layer in c.layers[:7]] == [512] * 5 + [None, 512]
        assert [layer.rope.theta for layer in c.layers[:7]] == [1e4] * 5 + [1e6, 1e4]
        assert c.qk_norm and c.post_norms and c.attention_soft_cap is None
    assert c.eos_token_ids == (1, 106)

    assert read("Phi-3-mini-4k-instruct").layers[0].sliding_window == 2047
    rope = read("Phi-3-mini-128k-instruct").layers[0].rope
    assert rope.scaling == "longrope" and rope.parameters["factor"] == 32 and rope.rotary_dim == 96
    assert read("Phi-4-mini-instruct").layers[0].rope.rotary_dim == 96  # of 128

    c = read("gpt2")
    assert c.norm == "layer" and c.learned_positions and not c.gated and c.layers[0].rope is None
    assert c.intermediate_size == 3072 and c.qkv_bias and c.o_bias and c.mlp_bias

    c = read("Mixtral-8x7B-v0.1")
    assert (c.num_experts, c.num_experts_per_tok, c.moe_intermediate_size) == (8, 2, 14336)
    assert c.norm_topk_prob and all(layer.moe for layer in c.layers)
    c = read("Qwen3-30B-A3B")
    assert (c.num_experts, c.num_experts_per_tok, c.moe_intermediate_size) == (128, 8, 768)


def version_5(config: dict) -> dict:
    """The configuration as transformers 5 writes it."""
    new = {k: v for k, v in config.items() if k not in ("torch_dtype", "rope_theta", "rope_scaling")}
    new["dtype"] = config.get("torch_dtype")
    theta, scaling = config.get("rope_theta", 10000.0), config.get("rope_scaling") or {}
    rope = {"rope_type": scaling.get("rope_type", scaling.get("type", "default")), "rope_theta": theta}
    rope.update({k: v for k, v in scaling.items() if k not in ("type", "rope_type")})
    layers = config.get("num_hidden_layers")
    if config["model_type"] == "gpt2":
        return new
    new.setdefault("head_dim", None)
    if config["model_type"].startswith("qwen") and config["model_type"] != "qwen3_moe":
        new["layer_types"] = ["full_attention"] * layers
    if config["model_type"] == "gemma2":
        new["layer_types"] = ["sliding_attention", "full_attention"] * (layers // 2)
    if config["model_type"] == "gemma3_text":
        local = {"rope_type": "default", "rope_theta": new.pop("rope_local_base_freq")}
        rope = {"full_attention": rope, "sliding_attention": local}
        new["layer_types"] = ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(layers)]
    new["rope_parameters"] = rope
    if "partial_rotary_factor" in new:
        rope["partial_rotary_factor"] = new.pop("partial_rotary_factor")
    return new


@pytest.mark.parametrize("name", PUBLISHED)
def test_both_spellings_mean_the_same(name):
    assert config_from_hf(version_5(PUBLISHED[name])) == read(name)


def test_a_missing_architectures_is_found_by_model_type():
    assert config_from_hf(without("gemma-3-270m", "architectures")) == read("gemma-3-270m")
    with pytest.raises(UnsupportedModelError, match="'bert'"):
        config_from_hf({"model_type": "bert"})


def test_layer_types_that_only_repeat_the_rest_are_read():
    for name, kind in (
        ("Llama-2-7b", "full"),
        ("Mistral-7B-v0.1", "sliding"),
        ("Mistral-7B-v0.3", "full"),
        ("Phi-3-mini-4k-instruct", "sliding"),
        ("Mixtral-8x7B-v0.1", "full"),
        ("Qwen3-30B-A3B", "full"),
    ):
        types = [f"{kind}_attention"] * PUBLISHED[name]["num_hidden_layers"]
        assert read(name, layer_types=types) == read(name)


def test_scaled_models_take_the_length_they_are_scaled_to():
    def longest(**scaling):
        return read("TinyLlama-1.1B-Chat-v1.0", rope_scaling=scaling).max_position_embeddings

    assert longest(type="linear", factor=4.0) == 8192
    assert longest(type="dynamic", factor=2.0) == 4096
    assert longest(type="yarn", factor=8.0, original_max_position_embeddings=2048) == 16384
    assert longest(type="yarn", factor=1.5, original_max_position_embeddings=1024) == 2048


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("Llama-3.2-1B", dict(num_key_value_heads=5), "32.*5"),
        ("TinyLlama-1.1B-Chat-v1.0", dict(hidden_size=2050), "2050.*32"),
        ("Llama-3.2-1B", dict(head_dim=63), "63 values"),
        ("Llama-3.2-1B", dict(rope_parameters={"rope_type": "default"}), "rope_scaling.*rope_parameters"),
        ("Llama-2-7b", dict(rope_theta=1e4, rope_parameters={"rope_theta": 5e5}), "rope_theta is 10000.0.*500000.0"),
        ("Llama-2-7b", dict(rope_scaling={"type": "linear", "rope_type": "dynamic", "factor": 2.0}), "linear.*dynamic"),
        ("Llama-2-7b", dict(rope_scaling={"type": "linear"}), "factor is missing"),
        ("Llama-2-7b", dict(rope_scaling={"type": "linear", "factor": 0.5}), "factor is 0.5"),
        ("Llama-2-7b", dict(rope_scaling={"type": "linear", "factor": "8"}), "factor is '8'"),
        ("Llama-2-7b", dict(rope_scaling=[1]), "rope_scaling"),
        ("Llama-2-7b", dict(dtype="float32"), "torch_dtype is 'float16' but dtype is 'float32'"),
        ("Llama-2-7b", dict(model_type="mistral"), "'mistral'"),
        ("Llama-2-7b", dict(architectures=[]), "architectures"),
        ("Llama-2-7b", dict(architectures="LlamaForCausalLM"), "architectures"),
        ("Llama-2-7b", dict(eos_token_id="2"), "eos_token_id"),
        ("Llama-2-7b", dict(eos_token_id=[1, -1]), "eos_token_id"),
        ("Llama-2-7b", dict(vocab_size=None), "vocab_size"),
        ("Llama-2-7b", dict(vocab_size=0), "vocab_size is 0"),
        ("Llama-2-7b", dict(hidden_size=2**40), "hidden_size"),
        ("Llama-2-7b", dict(hidden_size=4096.0), "hidden_size"),
        ("Llama-2-7b", dict(num_hidden_layers=True), "num_hidden_layers is True"),
        ("Llama-2-7b", dict(num_hidden_layers=10**9), "num_hidden_layers"),
        ("Llama-2-7b", dict(rms_norm_eps=float("nan")), "rms_norm_eps"),
        ("Llama-2-7b", dict(rms_norm_eps=-1e-5), "rms_norm_eps"),
        ("Llama-2-7b", dict(tie_word_embeddings="yes"), "tie_word_embeddings"),
        (
            "Llama-3.2-1B",
            dict(rope_scaling={**PUBLISHED["Llama-3.2-1B"]["rope_scaling"], "high_freq_factor": 1.0}),
            "1.0",
        ),
        ("Llama-2-7b", dict(max_position_embeddings=2**31), "max_position_embeddings"),
        ("Llama-2-7b", dict(rope_scaling={"type": "linear", "factor": 5000.0}), "20480000 tokens"),
        ("Llama-2-7b", dict(layer_types=["sliding_attention"] * 32), "no sliding_window"),
        ("Qwen3-0.6B", dict(layer_types=["full_attention"] * 27), "28.*27"),
        ("Qwen3-0.6B", dict(layer_types=["sliding_attention"] * 28), "no sliding_window"),
        ("Qwen3-0.6B", dict(layer_types=["linear_attention"] * 28), "layer_types"),
        ("Qwen3-0.6B", dict(layer_types="full_attention"), "layer_types"),
        ("gemma-3-1b-it", dict(layer_types=["full_attention"] * 26), "sliding_window_pattern is 6"),
        ("gemma-3-1b-it", dict(rope_parameters={"rope_type": "default"}), "full_attention and sliding_attention"),
        ("Phi-4-mini-instruct", dict(partial_rotary_factor=0.5), "short_factor has 48 numbers; it must have 32"),
        ("Phi-4-mini-instruct", dict(partial_rotary_factor=1.5), "partial_rotary_factor"),
        ("Phi-4-mini-instruct", dict(original_max_position_embeddings=None), "original_max_position_embeddings"),
        (
            "Phi-4-mini-instruct",
            dict(rope_scaling={**PUBLISHED["Phi-4-mini-instruct"]["rope_scaling"], "factor": 8.0}),
            "factor is 8.*= 32",
        ),
        ("gpt2", dict(n_ctx=512), "n_ctx is 512 but n_positions is 1024"),
        ("gpt2", dict(n_head=7), "768.*7"),
        ("Mixtral-8x7B-v0.1", dict(num_experts_per_tok=9), "9.*8"),
        ("Qwen3-30B-A3B", dict(mlp_only_layers=[48]), "mlp_only_layers"),
        ("Qwen3-30B-A3B", dict(num_local_experts=64), "num_experts is 128 but num_local_experts is 64"),
    ],
)
def test_contradictions_and_malformed_values_are_refused(name, changes, message):
    with pytest.raises(ModelFormatError, match=message):
        read(name, **changes)


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("Llama-2-7b", dict(architectures=["Llama4ForConditionalGeneration"], model_type="llama4"), "Llama4"),
        ("Llama-2-7b", dict(architectures=["LlamaForSequenceClassification"]), "LlamaForSequenceClassification"),
        ("gemma-3-1b-it", dict(architectures=["Gemma3ForConditionalGeneration"]), "Gemma3ForConditionalGeneration"),
        ("Llama-2-7b", dict(quantization_config={"quant_method": "awq"}), "quantization_config.*awq"),
        ("Llama-2-7b", dict(rope_scaling={"type": "proportional", "factor": 2.0}), "proportional"),
        ("Llama-2-7b", dict(rope_scaling={"type": "default", "mrope_section": [16, 24, 24]}), "mrope_section"),
        ("Llama-2-7b", dict(rope_scaling={"type": "linear", "factor": 2.0, "beta_fast": 32}), "beta_fast"),
        ("Llama-2-7b", dict(hidden_act="relu2"), "relu2"),
        ("Llama-2-7b", dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
        ("Llama-2-7b", dict(sliding_window=4096), "sliding_window is 4096"),
        ("Llama-2-7b", dict(attn_logit_softcapping=50.0), "attn_logit_softcapping"),
        ("Llama-2-7b", dict(num_experts=8), "num_experts"),
        ("SmolLM2-135M-Instruct", dict(rope_interleaved=True), "rope_interleaved"),
        ("Mistral-7B-v0.1", dict(attention_bias=True), "attention_bias"),
        ("Mistral-7B-v0.1", dict(layer_types=["full_attention", "sliding_attention"] * 16), "layer_types"),
        ("Qwen2.5-0.5B", dict(use_mrope=True), "use_mrope"),
        ("Qwen2.5-0.5B", dict(rope_parameters={"full_attention": {"rope_theta": 1e4}}), "full_attention"),
        ("gemma-3-270m", dict(use_bidirectional_attention=True), "use_bidirectional_attention"),
        ("gemma-3-270m", dict(attn_logit_softcapping=50.0), "attn_logit_softcapping"),
        ("Phi-4-mini-instruct", dict(lm_head_bias=True), "lm_head_bias"),
        ("Phi-3-mini-4k-instruct", dict(attention_bias=True), "attention_bias"),
        ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx"),
        ("gpt2", dict(scale_attn_weights=False), "scale_attn_weights"),
        ("gpt2", dict(add_cross_attention=True), "add_cross_attention"),
        ("Qwen3-30B-A3B", dict(use_sliding_window=True, sliding_window=4096), "max_window_layers is 48"),
        ("Qwen3-30B-A3B", dict(shared_expert_intermediate_size=512), "shared_expert_intermediate_size"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(name, changes, message):
    with pytest.raises(UnsupportedModelError, match=message):
        read(name, **changes)


FIXTURE_CONFIGS = [json.loads(path.read_text()) for path in sorted(PARITY.glob("*/config.json"))]
JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 200)
    | st.sampled_from([2**31, 2**63, 10**400, -(10**400), 1e-300, 1e300, float("nan"), float("inf")])
    | st.floats()
    | st.sampled_from(["default", "yarn", "longrope", "silu", "sliding_attention", "LlamaForCausalLM", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["rope_type", "factor"]), inner),
    max_leaves=5,
)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(FIXTURE_CONFIGS), st.data())
def test_any_config_is_read_or_refused_with_a_typed_error(config, data):
    config = json.loads(json.dumps(config))
    for _ in range(data.draw(st.integers(1, 3))):
        target = config
        key = data.draw(st.sampled_from(sorted(target)))
        if isinstance(target[key], dict) and data.draw(st.booleans()):
            target = target[key]
            key = data.draw(st.sampled_from(sorted(target) or ["rope_type"]))
        target[key] = data.draw(JSON_VALUES)
    try:
        assert isinstance(config_from_hf(config), ModelConfig)
    except ModelError as error:
        assert len(str(error)) < 1000
