"""The forward pass, written once for every architecture over the features of ``ModelConfig``."""

from __future__ import annotations

import numpy as np

from minipaged.kv_cache import KVCache
from minipaged.model.config import LayerConfig, ModelConfig, RopeConfig
from minipaged.model.rope import rope_tables
from minipaged.model.weights import LayerWeights, ModelWeights, Norm
from minipaged.ops.interface import Batch, Ops


class Decoder:
    """A decoder-only transformer: tokens of many sequences in, logits out, K and V left in blocks.

    ``max_model_len`` bounds ``batch.positions``; the rope tables are computed for it.
    """

    examined = None  # nothing is known of the logits but they (cf. CpuDecoder)

    def __init__(self, config: ModelConfig, weights: ModelWeights, ops: Ops, max_model_len: int):
        self.config = config
        self.weights = weights
        self.ops = ops
        # Layers that rotate alike, or see equally far, share what is computed once a step.
        self.ropes: list[RopeConfig] = []
        for layer in config.layers:
            if layer.rope is not None and layer.rope not in self.ropes:
                self.ropes.append(layer.rope)
        self.rope_tables = [rope_tables(rope, max_model_len) for rope in self.ropes]
        self.windows = {layer.sliding_window for layer in config.layers}

    def forward(self, batch: Batch, kv_cache: KVCache) -> np.ndarray:
        """Compute a step: K and V of its tokens go to ``batch.slot_mapping``.

        Returns the logits of the rows ``batch.logits_indices``, float32 ``[L, vocab_size]``.
        """
        # Overflow is no event here: whoever reads the logits finds it in the row it belongs to.
        with np.errstate(all="ignore"):
            return self._logits(self._hidden(batch, kv_cache))

    def close(self) -> None:
        """Nothing to end: this backend has no threads of its own."""

    def _hidden(self, batch: Batch, kv_cache: KVCache) -> np.ndarray:
        """What the last layer leaves for the rows ``batch.logits_indices``, ``[L, hidden_size]``."""
        config, ops = self.config, self.ops
        rotations = [
            (ops.embedding(batch.positions, cos), ops.embedding(batch.positions, sin)) for cos, sin in self.rope_tables
        ]
        plans = {window: ops.plan_attention(batch, kv_cache.block_size, window) for window in self.windows}

        hidden = ops.embedding(batch.input_ids, self.weights.embedding)
        if config.embedding_scale != 1.0:
            hidden *= np.float32(config.embedding_scale)
        if config.learned_positions:
            hidden += ops.embedding(batch.positions, self.weights.positions)

        for i, (layer, weights) in enumerate(zip(config.layers, self.weights.layers, strict=True)):
            rotation = None if layer.rope is None else rotations[self.ropes.index(layer.rope)]
            x = self._norm(hidden, weights.input_norm)
            attended = self._attention(
                weights, x, rotation, plans[layer.sliding_window], batch.slot_mapping, *kv_cache.layer(i)
            )
            if i == config.num_layers - 1 and len(batch.logits_indices) < len(hidden):
                # K and V are written: from here on only rows whose logits are wanted matter.
                attended, hidden = attended[batch.logits_indices], hidden[batch.logits_indices]
            hidden += self._attention_output(weights, attended)
            hidden += self._feed_forward(layer, weights, self._norm(hidden, weights.mlp_norm))
        return hidden

    def _logits(self, hidden: np.ndarray) -> np.ndarray:
        logits = self.ops.linear(self._norm(hidden, self.weights.final_norm), self.weights.lm_head)
        cap = self.config.final_soft_cap
        return logits if cap is None else self.ops.soft_cap(logits, cap)

    def _attention(self, weights: LayerWeights, x, rotation, plan, slot_mapping, k_cache, v_cache) -> np.ndarray:
        """The heads' outputs side by side, ``[T, num_heads * head_dim]``."""
        config, ops = self.config, self.ops
        num_heads, num_kv_heads = config.num_heads, config.num_kv_heads
        qkv = ops.linear(x, weights.qkv.weight, weights.qkv.bias)
        qkv = qkv.reshape(len(x), num_heads + 2 * num_kv_heads, config.head_dim)
        qk, v = qkv[:, : num_heads + num_kv_heads], qkv[:, num_heads + num_kv_heads :]
        q, k = qk[:, :num_heads], qk[:, num_heads:]
        if config.qk_norm:
            q[...] = self._norm(q, weights.q_norm)
            k[...] = self._norm(k, weights.k_norm)
        if rotation is not None:
            ops.rope(qk, *rotation)
        ops.write_kv(k, v, k_cache, v_cache, slot_mapping)
        attended = ops.paged_attention(q, k_cache, v_cache, plan, config.attention_scale, config.attention_soft_cap)
        return attended.reshape(len(x), num_heads * config.head_dim)

    def _attention_output(self, weights: LayerWeights, attended: np.ndarray) -> np.ndarray:
        y = self.ops.linear(attended, weights.o.weight, weights.o.bias)
        return self._norm(y, weights.post_attention_norm) if self.config.post_norms else y

    def _feed_forward(self, layer: LayerConfig, weights: LayerWeights, x: np.ndarray) -> np.ndarray:
        config, ops = self.config, self.ops
        if layer.moe:
            y = ops.moe(
                x,
                weights.experts.router,
                weights.experts.gate_up,
                weights.experts.down,
                config.num_experts_per_tok,
                config.norm_topk_prob,
                config.activation,
            )
        else:
            y = ops.linear(x, weights.gate_up.weight, weights.gate_up.bias)
            activate = ops.gated_activation if config.gated else ops.activation
            y = ops.linear(activate(config.activation, y), weights.down.weight, weights.down.bias)
        return self._norm(y, weights.post_mlp_norm) if config.post_norms else y

    def _norm(self, x: np.ndarray, norm: Norm) -> np.ndarray:
        if self.config.norm == "rms":
            return self.ops.rms_norm(x, norm.weight, self.config.norm_eps)
        return self.ops.layer_norm(x, norm.weight, norm.bias, self.config.norm_eps)
