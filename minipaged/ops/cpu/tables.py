"""The tables that tell the compiled step what to compute: one record for the model, one a layer, one a product.

Every architecture, size and weight format is a matter of these numbers, so one compiled function
serves them all. An integer is an address (0: absent), a size in bytes, a count, an index or a flag;
Python writes the fields once when a model is loaded, and those of :data:`BATCH` before each step.
"""

from __future__ import annotations

import numpy as np


def _record(floats: str, ints: str) -> np.dtype:
    names = [(name, np.int64) for name in ints.split()] + [(name, np.float32) for name in floats.split()]
    return np.dtype(names, align=True)


LINEAR = _record(
    "",
    # product, prepare: addresses of compiled functions (products.py); row_bytes: from one prepared row to the next.
    # weight: the packed array. bias: float32 [num_outputs].
    "product prepare row_bytes weight bias num_inputs num_outputs num_panels",
)
"""``y = x @ weight.T + bias``."""

LAYER = _record(
    "",
    # Weights and biases of norms; a bias of 0 where there is none.
    "input_norm input_norm_bias mlp_norm mlp_norm_bias q_norm q_norm_bias k_norm k_norm_bias "
    "post_attention_norm post_attention_norm_bias post_mlp_norm post_mlp_norm_bias "
    # Indices of LINEAR records; with experts, gate_up and down are the first of num_experts records.
    "qkv o gate_up down "
    # window: tokens that a query sees (0: all). cos, sin: tables [positions, rotary_half] (0: no rope).
    # router: float32 [num_experts, hidden_size] (0: no experts).
    "window cos sin rotary_half router cache",
)
"""One layer; ``cache`` is the address of its KV blocks."""

BATCH_FIELDS = (
    # The arrays of ops.interface.Batch; tiles: int32 [num_tiles, 4], see attention.py.
    "num_tokens input_ids positions slot_mapping block_tables block_table_stride tiles num_tiles "
    # Of each row of logits: index of the largest, bits of the largest magnitude (logits.py).
    "num_logits logits_indices logits logits_stride likeliest magnitudes"
)

MODEL = _record(
    "norm_eps attention_scale attention_soft_cap final_soft_cap embedding_scale",
    BATCH_FIELDS + " "
    # Sizes.
    "num_layers hidden_size num_heads num_kv_heads head_dim padded_dim vocab_size inner_size "
    "block_size block_bytes k_bytes v_bytes item_bytes "
    # Features. embedding_format: see embedding.py.
    "layer_norm activation gated qk_norm post_norms "
    "embedding_format embedding position_embedding final_norm final_norm_bias lm_head "
    "num_experts experts_per_token normalize_experts "
    # Buffers, one row a token, strides in bytes. prepared: input of a product.
    "hidden hidden_stride normed output qkv qkv_stride attended attended_stride inner inner_stride "
    "prepared scratch scratch_bytes "
    # Experts: see moe.py.
    "expert_ids expert_weights expert_slots expert_starts expert_rows expert_input "
    # Threads: see team.py; counters: [num_layers, num_threads], a line each, the next item of a share of attention.
    "barrier counters "
    # Addresses of this record, of the tables, and of the phases that the model uses.
    "address layer_table linear_table write_phase attention_phase experts_phase",
)
"""The model, its buffers and the batch of the step."""
