"""From GGUF's tensors to Hugging Face's: names, and what converters did to the values.

llama.cpp's converters rename tensors, interleave the rows of llama's query and key projections (its
rotary embedding pairs neighbours), add the 1 of Gemma's ``1 + weight`` norms, transpose GPT-2's
weights and stack the experts of a mixture into one tensor. Each of these is undone here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from minipaged.errors import ModelFormatError, UnsupportedModelError
from minipaged.model.gguf_header import GGUFHeader, TensorInfo

MODEL_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GEMMA_LAYER_TENSORS = LAYER_TENSORS | {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
PHI3_LAYER_TENSORS = LAYER_TENSORS | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
QWEN3_MOE_LAYER_TENSORS = LAYER_TENSORS | {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}
MIXTRAL_LAYER_TENSORS = LAYER_TENSORS | {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
}
GPT2_MODEL_TENSORS = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}
GPT2_LAYER_TENSORS = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
LAYER_TENSORS_OF = {
    "LlamaForCausalLM": LAYER_TENSORS,
    "MistralForCausalLM": LAYER_TENSORS,
    "MixtralForCausalLM": MIXTRAL_LAYER_TENSORS,
    "Qwen2ForCausalLM": LAYER_TENSORS,
    "Qwen3ForCausalLM": LAYER_TENSORS,
    "Qwen3MoeForCausalLM": QWEN3_MOE_LAYER_TENSORS,
    "Gemma2ForCausalLM": GEMMA_LAYER_TENSORS,
    "Gemma3ForCausalLM": GEMMA_LAYER_TENSORS,
    "Phi3ForCausalLM": PHI3_LAYER_TENSORS,
    "GPT2LMHeadModel": GPT2_LAYER_TENSORS,
}
INTERLEAVED = ("LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM")
MAX_TENSORS = 1 << 17  # a stacked tensor counts once for each expert
# Not weights: what they say is in the configuration.
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_NAME = re.compile(r"(?:blk\.(\d{1,5})\.)?(\w+)(?:\.(\d{1,5}))?\.(weight|bias)")


@dataclass(frozen=True, slots=True)
class TensorView:
    """A Hugging Face tensor inside a GGUF tensor.

    Attributes:
        info: the GGUF tensor, seen as rows (its last dimension is a row).
        shape: the shape that Hugging Face's tensor has.
        first_row: where its rows begin.
        interleaved_heads: undo the interleaving of the rows of this many heads; 0: none.
        transposed: GGUF's rows are columns.
        shift: is added to each value.
    """

    info: TensorInfo
    shape: tuple[int, ...]
    first_row: int = 0
    interleaved_heads: int = 0
    transposed: bool = False
    shift: float = 0.0


def hf_tensors(header: GGUFHeader, config: dict) -> dict[str, TensorView]:
    """All tensors of the file by the names that Hugging Face gives them.

    ``config`` is what ``gguf_config.hf_config`` makes of the metadata. Raises
    :class:`UnsupportedModelError` for a tensor that its architecture is not known to have.
    """
    found: dict[str, TensorView] = {}
    for info in header.tensors.values():
        if info.name not in ROPE_TENSORS:
            for name, view in _views(info, config):
                if name in found:
                    raise ModelFormatError(f"tensor {info.name!r}: {name} is also in {found[name].info.name!r}.")
                if len(found) == MAX_TENSORS:
                    raise ModelFormatError(f"the file has more than {MAX_TENSORS} tensors, experts counted apart.")
                found[name] = view
    return found


def _views(info: TensorInfo, config: dict) -> Iterator[tuple[str, TensorView]]:
    architecture = config["architectures"][0]
    gpt2 = architecture == "GPT2LMHeadModel"
    match = _NAME.fullmatch(info.name)
    layer, kind, expert, suffix = match.groups() if match else (None,) * 4
    if layer is None:
        base = (GPT2_MODEL_TENSORS if gpt2 else MODEL_TENSORS).get(kind)
    else:
        # Before experts were stacked, "ffn_up.3" was the fourth expert of "ffn_up_exps".
        base = LAYER_TENSORS_OF[architecture].get(kind if expert is None else f"{kind}_exps")
    if base is None or (expert is not None and (layer is None or "{}" not in base)):
        raise UnsupportedModelError(f"{architecture} is not known to have a tensor {info.name!r}.")
    prefix = "" if layer is None else f"transformer.h.{int(layer)}." if gpt2 else f"model.layers.{int(layer)}."

    name = f"{prefix}{base}.{suffix}"
    if expert is not None:
        yield name.format(int(expert)), TensorView(info, info.shape)
    elif "{}" in name:
        yield from _experts(name, info)
    elif kind in ("attn_q", "attn_k") and architecture in INTERLEAVED:
        heads = config["num_attention_heads" if kind == "attn_q" else "num_key_value_heads"]
        if info.shape[0] % (2 * heads):
            raise ModelFormatError(f"tensor {info.name!r} has {info.shape[0]} rows, not pairs for {heads} heads.")
        yield name, TensorView(info, info.shape, interleaved_heads=heads)
    elif kind.endswith("norm") and architecture in ("Gemma2ForCausalLM", "Gemma3ForCausalLM"):
        yield name, TensorView(info, info.shape, shift=-1.0)
    elif gpt2 and layer is not None and len(info.shape) == 2:
        yield name, TensorView(info, info.shape[::-1], transposed=True)
    else:
        yield name, TensorView(info, info.shape)


def _experts(name: str, info: TensorInfo) -> Iterator[tuple[str, TensorView]]:
    """One view for each expert of a stacked tensor ``[experts, out, in]``."""
    if len(info.shape) != 3:
        raise ModelFormatError(f"tensor {info.name!r} has shape {info.shape}; experts are stacked in 3 dimensions.")
    for expert in range(info.shape[0]):
        yield name.format(expert), TensorView(info, info.shape[1:], first_row=expert * info.shape[1])
