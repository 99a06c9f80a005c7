"""The forward pass on the CPU backend: fills the tables of the compiled step and runs it.

What the step computes is :class:`~minipaged.model.decoder.Decoder`'s forward pass, feature for feature;
``minipaged/ops/cpu/step.py`` has it in one function for all architectures.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from minipaged.model.config import ModelConfig
from minipaged.model.rope import rope_tables
from minipaged.model.weights import Linear, ModelWeights, Norm
from minipaged.ops.cpu import attention, embedding, masks, packing
from minipaged.ops.cpu.arrays import StepArrays
from minipaged.ops.cpu.draws import RowDrawer
from minipaged.ops.cpu.elementwise import ACTIVATIONS
from minipaged.ops.cpu.kv import CpuKVCache, KVLayout
from minipaged.ops.cpu.kv_writes import write_phase
from minipaged.ops.cpu.moe import experts_phase
from minipaged.ops.cpu.packing import PackedWeight, aligned_zeros, padded_rows
from minipaged.ops.cpu.products import product_kernel
from minipaged.ops.cpu.step import step_function
from minipaged.ops.cpu.tables import LAYER, LINEAR, MODEL
from minipaged.ops.cpu.team import LINE, Team
from minipaged.ops.cpu.warmup import warm_up
from minipaged.ops.interface import Batch


class CpuDecoder:
    """A decoder-only transformer: tokens of many sequences in, logits out, K and V left in blocks.

    Args:
        weights: matrices packed by :class:`~minipaged.model.weight_packer.WeightPacker`.
        max_model_len: bounds ``batch.positions``.
        max_num_tokens: tokens of a step, at most; the buffers are made for so many.
        kv_cache: where K and V go, in every step.
        num_threads: threads that compute, the caller's included.

    Attributes:
        examined: what :func:`minipaged.sampling.sampler.examine` says of the logits of the last step.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: ModelWeights,
        kv_cache: CpuKVCache,
        *,
        max_model_len: int,
        max_num_tokens: int,
        num_threads: int,
    ):
        warm_up({weights.lm_head.format, _first_format(weights)}, [kv_cache.layout.dtype], config.num_experts > 0)
        self.config = config
        self.weights = weights
        self.kv_cache = kv_cache
        self.max_num_tokens = max_num_tokens
        self.examined: tuple[list[int], list[bool]] | None = None
        self.team = Team(num_threads)
        self._keep: list = []  # whatever the tables point to
        self._linears: list[tuple] = []
        self._model = np.zeros(1, MODEL)
        self._layers = self._layer_table(weights, max_model_len)
        self._fill_model(weights)
        self._allocate_buffers(kv_cache.layout, num_threads)
        self._linear_table = np.array(self._linears, LINEAR)
        # A row's place is its own in every product: threads that keep their rows are not all at the same product.
        self._linear_table["row_bytes"] = self._linear_table["row_bytes"].max()
        queries_per_tile = attention.queries_per_tile(config.num_heads // config.num_kv_heads)
        row_length = padded_rows(config.vocab_size)
        self._arrays = StepArrays(self._model, max_num_tokens, queries_per_tile, row_length, num_threads)
        self._counters = aligned_zeros((config.num_layers * num_threads * LINE,), np.dtype(np.uint8))
        self._fill_addresses()
        step = step_function()
        arrays = (self._model, self._layers, self._linear_table)
        self._everything = (self._keep, weights, kv_cache, self._counters, self._arrays)
        self.team.start(_Work(step, arrays, self._everything))

    def forward(self, batch: Batch, kv_cache: CpuKVCache) -> np.ndarray:
        """Compute a step: K and V of its tokens go to ``batch.slot_mapping``.

        Returns the logits of the rows ``batch.logits_indices``, float32 ``[L, vocab_size]``.
        Raises :class:`~minipaged.errors.EngineClosedError` after :meth:`close` and in a forked process.
        """
        assert kv_cache is self.kv_cache, "the tables point to the cache that the decoder was made with"
        result = self._arrays.fill(batch)
        self._counters.fill(0)
        self.team.run()
        self.examined = self._arrays.findings(len(result))
        return result[:, : self.config.vocab_size]

    def passes_over_logits(self) -> dict[str, Callable]:
        """Faster ways for one sampler."""
        return {
            "mask_row": masks.mask_row,
            "few_allowed": masks.few_allowed,
            "likeliest_allowed": masks.likeliest_allowed,
            "draw_row": RowDrawer(self.config.vocab_size),
        }

    def close(self) -> None:
        """End the threads. Closing twice is harmless."""
        self.team.close()

    def products(self) -> dict[str, np.ndarray]:
        """The LINEAR records of a dense model by name, in the order of the layers; for measurements."""
        names = ("qkv", "o", "gate_up", "down")
        found = {name: self._linear_table[self._layers[name]] for name in names}
        return found | {"lm_head": self._linear_table[self._model["lm_head"]]}

    # -- tables -----------------------------------------------------------------------------------

    def _address(self, array: np.ndarray | None) -> int:
        """The address of an array that will live as long as the decoder; 0 for ``None``."""
        if array is None:
            return 0
        array = np.ascontiguousarray(array)
        self._keep.append(array)
        return array.ctypes.data

    def _linear(self, weight: PackedWeight, bias: np.ndarray | None = None) -> int:
        """Add a product to the table; returns its index."""
        kernel = product_kernel(weight.format)
        self._linears.append(
            (
                kernel.product,
                kernel.prepare,
                kernel.row_bytes(weight.num_columns),
                weight.address,
                self._address(bias),
                weight.num_columns,
                weight.num_rows,
                weight.num_panels,
            )
        )
        return len(self._linears) - 1

    def _layer_table(self, weights: ModelWeights, max_model_len: int) -> np.ndarray:
        table = np.zeros(self.config.num_layers, LAYER)
        ropes: dict[int, tuple[int, int, int]] = {}
        for i, (layer, w) in enumerate(zip(self.config.layers, weights.layers, strict=True)):
            row = table[i]
            for name in ("input_norm", "mlp_norm", "q_norm", "k_norm", "post_attention_norm", "post_mlp_norm"):
                norm: Norm | None = getattr(w, name)
                if norm is not None:
                    row[name], row[f"{name}_bias"] = self._address(norm.weight), self._address(norm.bias)
            products: dict[str, Linear | None] = {name: getattr(w, name) for name in ("qkv", "o", "gate_up", "down")}
            for name, linear in products.items():
                if linear is not None:
                    row[name] = self._linear(linear.weight, linear.bias)
            if w.experts is not None:
                row["router"] = self._address(w.experts.router)
                row["gate_up"] = [self._linear(expert) for expert in w.experts.gate_up][0]
                row["down"] = [self._linear(expert) for expert in w.experts.down][0]
            row["window"] = layer.sliding_window or 0
            if layer.rope is not None:
                if id(layer.rope) not in ropes:
                    cos, sin = rope_tables(layer.rope, max_model_len)
                    ropes[id(layer.rope)] = self._address(cos), self._address(sin), cos.shape[1]
                row["cos"], row["sin"], row["rotary_half"] = ropes[id(layer.rope)]
            row["cache"] = self.kv_cache.data[i].ctypes.data
        return table

    def _fill_model(self, weights: ModelWeights) -> None:
        config, layout, model = self.config, self.kv_cache.layout, self._model
        for name in ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size"):
            model[name] = getattr(config, name)
        for name in ("padded_dim", "block_size", "block_bytes", "k_bytes", "v_bytes", "item_bytes"):
            model[name] = getattr(layout, name)
        for name in ("gated", "qk_norm", "post_norms", "num_experts", "norm_eps", "attention_scale", "embedding_scale"):
            model[name] = getattr(config, name)
        model["layer_norm"] = config.norm == "layer"
        model["activation"] = ACTIVATIONS[config.activation]
        model["attention_soft_cap"] = config.attention_soft_cap or 0
        model["final_soft_cap"] = config.final_soft_cap or 0
        model["experts_per_token"] = config.num_experts_per_tok
        model["normalize_experts"] = config.norm_topk_prob
        model["final_norm"] = self._address(weights.final_norm.weight)
        model["final_norm_bias"] = self._address(weights.final_norm.bias)
        model["position_embedding"] = self._address(weights.positions)
        model["lm_head"] = self._linear(weights.lm_head)
        table = weights.embedding
        if isinstance(table, PackedWeight):
            model["embedding"] = table.address
            model["embedding_format"] = embedding.FORMATS[table.format]
        else:
            model["embedding"] = self._address(table)
            model["embedding_format"] = embedding.FORMATS[
                "float32 rows" if table.dtype == np.float32 else "bfloat16 rows"
            ]

    def _fill_addresses(self) -> None:
        """Where the tables are, and the phases that this model needs."""
        model, dtype = self._model, self.kv_cache.layout.dtype
        model["counters"] = self._counters.ctypes.data
        model["address"] = model.ctypes.data
        model["layer_table"] = self._layers.ctypes.data
        model["linear_table"] = self._linear_table.ctypes.data
        model["write_phase"] = write_phase(dtype).address
        model["attention_phase"] = attention.attention_phase(dtype).address
        if self.config.num_experts:
            model["experts_phase"] = experts_phase().address

    def _allocate_buffers(self, layout: KVLayout, num_threads: int) -> None:
        """Rows for every token of the largest step; the system provides what is used."""
        config, model, rows = self.config, self._model, self.max_num_tokens
        moe = any(layer.moe for layer in config.layers)
        dense = any(not layer.moe for layer in config.layers)
        gates = 2 if config.gated else 1
        inner = max(dense * gates * config.intermediate_size, moe * gates * config.moe_intermediate_size)
        slots = rows * max(1, moe * config.num_experts_per_tok)
        heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim

        def buffer(name: str, num_rows: int, num_columns: int) -> None:
            stride = 4 * padded_rows(num_columns)
            # One row more: kernels may touch up to 15 values beyond a row.
            model[name] = self._address(aligned_zeros((num_rows + 1, stride), np.dtype(np.uint8)))
            if f"{name}_stride" in MODEL.names:
                model[f"{name}_stride"] = stride

        for name in ("hidden", "normed", "output"):
            buffer(name, rows, config.hidden_size)
        buffer("qkv", rows, heads)
        buffer("attended", rows, config.num_heads * config.head_dim)
        buffer("inner", slots, inner)
        model["prepared"] = self._address(
            aligned_zeros((slots, max(linear[2] for linear in self._linears)), np.dtype(np.uint8))
        )
        group = config.num_heads // config.num_kv_heads
        scratch = packing.round_up(attention.scratch_bytes(group, layout.padded_dim) + 4 * config.num_experts, 4096)
        model["scratch_bytes"] = scratch
        model["scratch"] = self._address(aligned_zeros((num_threads, scratch), np.dtype(np.uint8)))
        model["barrier"] = self.team.barrier
        if moe:
            buffer("expert_input", slots, config.hidden_size)
            for name in ("expert_ids", "expert_weights", "expert_slots", "expert_rows"):
                model[name] = self._address(np.zeros(slots, np.int32))
            model["expert_starts"] = self._address(np.zeros(config.num_experts + 1, np.int32))


def _first_format(weights: ModelWeights) -> str:
    """The format of the layers' products."""
    return weights.layers[0].qkv.weight.format


class _Work:
    """What a thread of the team calls; it keeps all memory of the tables alive, and not the decoder."""

    def __init__(self, step, arrays: tuple[np.ndarray, ...], keep: tuple):
        self.step, self.arrays, self.keep = step, arrays, keep

    def __call__(self, thread: int, num_threads: int, mailbox: int, seen: int) -> int:
        return self.step(*self.arrays, thread, num_threads, mailbox, seen)
