"""Mixtral and Qwen3-MoE: Llama-like models whose feed-forward part is a mixture of experts.

Experts are stored one tensor each, or (transformers 5 may write) stacked as the decoder has them.
"""

from __future__ import annotations

import numpy as np

from minipaged.errors import ModelFormatError, UnsupportedModelError
from minipaged.model.adapters import common
from minipaged.model.config import LayerConfig, ModelConfig
from minipaged.model.hf_config import ConfigReader
from minipaged.model.tensor_reader import TensorReader
from minipaged.model.weights import Experts, ModelWeights

MAX_EXPERTS = 4096
# Names of an expert's gate, up and down projections.
EXPERT_NAMES = {
    "MixtralForCausalLM": ("w1", "w3", "w2"),
    "Qwen3MoeForCausalLM": ("gate_proj", "up_proj", "down_proj"),
}


def mixtral(config: ConfigReader) -> ModelConfig:
    return common.build(
        config,
        positions=131072,
        theta=1e6,
        windows=common.same_window(config, None),
        moe=[True] * common.num_layers(config),
        moe_intermediate_size=config.integer("intermediate_size"),
        norm_topk_prob=True,
        **_experts(config, "num_local_experts", 8, 2),
    )


def qwen3_moe(config: ConfigReader) -> ModelConfig:
    config.agree("num_experts", "num_local_experts")
    key = "num_experts" if "num_experts" in config.values else "num_local_experts"
    experts = _experts(config, key, 128, 8)
    layers = common.num_layers(config)
    bias = config.boolean("attention_bias", False)
    return common.build(
        config,
        positions=32768,
        windows=_qwen3_moe_windows(config),
        moe=_sparse_layers(config, layers),
        qk_norm=True,
        qkv_bias=bias,
        o_bias=bias,
        moe_intermediate_size=config.integer("moe_intermediate_size", 768),
        norm_topk_prob=config.boolean("norm_topk_prob", False),
        **experts,
    )


def weights(config: ModelConfig, tensors: TensorReader) -> ModelWeights:
    return common.weights(config, tensors, read_mlp=_mlp)


def _experts(config: ConfigReader, key: str, count: int, per_token: int) -> dict:
    count = config.integer(key, count, high=MAX_EXPERTS)
    per_token = config.integer("num_experts_per_tok", per_token)
    if per_token > count:
        raise ModelFormatError(f"{config.where}: num_experts_per_tok ({per_token}) exceeds {key} ({count}).")
    return {"num_experts": count, "num_experts_per_tok": per_token}


def _qwen3_moe_windows(config: ConfigReader) -> list[int | None]:
    if not config.boolean("use_sliding_window", False):
        config.get("sliding_window")  # has no meaning then
        return common.layer_types(config, ["full_attention"] * common.num_layers(config), None)
    if config.get("max_window_layers", 0) != 0:
        raise UnsupportedModelError(
            f"{config.where}: max_window_layers is {config.get('max_window_layers')!r} with use_sliding_window; "
            "versions of transformers disagree on whether Qwen3-MoE heeds it. Only 0 or none is implemented."
        )
    return common.same_window(config, 4096)


def _sparse_layers(config: ConfigReader, layers: int) -> list[bool]:
    """Which layers have experts: every ``decoder_sparse_step``-th that is not in ``mlp_only_layers``."""
    step = config.integer("decoder_sparse_step", 1)
    dense = config.get("mlp_only_layers")
    dense = [] if dense is None else dense
    if not isinstance(dense, list) or any(type(i) is not int or not 0 <= i < layers for i in dense):
        raise config.error("mlp_only_layers", f"a list of layers from 0 to {layers - 1}")
    return [i not in dense and (i + 1) % step == 0 for i in range(layers)]


def _mlp(config: ModelConfig, tensors: TensorReader, prefix: str, layer: LayerConfig) -> dict:
    if not layer.moe:
        return common.mlp(config, tensors, prefix, layer)
    hidden, inner, count = config.hidden_size, config.moe_intermediate_size, config.num_experts
    mixtral_names = tensors.has(f"{prefix}block_sparse_moe.gate.weight")
    prefix += "block_sparse_moe." if mixtral_names else "mlp."
    gate_up_parts = [(f"{prefix}experts.gate_up_proj", ())]
    down_parts = [(f"{prefix}experts.down_proj", ())]
    if not tensors.has(gate_up_parts[0][0]):
        gate, up, down = EXPERT_NAMES[config.architecture]
        experts = [(e, f"{prefix}experts.{e}.") for e in range(count)]
        gate_up_parts = [(f"{name}{gate}.weight", (e, slice(0, inner))) for e, name in experts]
        gate_up_parts += [(f"{name}{up}.weight", (e, slice(inner, 2 * inner))) for e, name in experts]
        down_parts = [(f"{name}{down}.weight", (e,)) for e, name in experts]
    return {
        "experts": Experts(
            router=tensors.rows([(f"{prefix}gate.weight", count)], hidden),
            gate_up=_experts_packed(tensors, tensors.array((count, 2 * inner, hidden), gate_up_parts), "gated"),
            down=_experts_packed(tensors, tensors.array((count, hidden, inner), down_parts)),
        )
    }


def _experts_packed(tensors: TensorReader, matrices: np.ndarray, role: str = "linear"):
    """One array for all experts, or a list of packed matrices where the backend packs (or its packed stack)."""
    if getattr(tensors.pack, "stacks", False):
        return tensors.packed(matrices, role)
    return matrices if tensors.pack is None else [tensors.packed(matrix, role) for matrix in matrices]
