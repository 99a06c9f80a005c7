"""The forward pass on a CUDA device: a plan of launches for each size of step, recorded where it repeats.

What a step computes is :class:`~minipaged.model.decoder.Decoder`'s forward pass, feature for feature.
Decode steps, one token a sequence, are padded to one of a few sizes (*buckets*); the launches of a bucket,
sampling included, are recorded once as a graph and repeated by a single call.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from minipaged.errors import UnsupportedModelError
from minipaged.model.config import LayerConfig, ModelConfig
from minipaged.model.rope import rope_tables
from minipaged.model.weights import LayerWeights, ModelWeights
from minipaged.ops.cuda import asks as packing
from minipaged.ops.cuda import memory
from minipaged.ops.cuda.asks import Packed, Turn
from minipaged.ops.cuda.attention import (
    MAX_HEAD_DIM,
    PLAIN,
    AttentionShape,
    decode_shape,
    make_tiles,
    uses_tensor_cores,
)
from minipaged.ops.cuda.buffers import Buffers
from minipaged.ops.cuda.device import Call, Device, DeviceArray, Recording
from minipaged.ops.cuda.inputs import MAX_COPIES, NO_COPIES, StepInputs
from minipaged.ops.cuda.kv import CudaKVCache
from minipaged.ops.cuda.plan import Plan
from minipaged.ops.cuda.sampling import DeviceSampling, Needs
from minipaged.ops.cuda.weights import total_bytes, weights_on_device
from minipaged.ops.interface import Batch
from minipaged.ops.sampling import Answers, Ask, Draw

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Sequences of a decode step that is repeated as a graph; a step is padded to the next of them."""
PLANS_KEPT = 32


class CudaDecoder:
    """A decoder-only transformer: tokens of many sequences in, logits or what is sampled from them out, K and V
    left in blocks.

    Args:
        weights: matrices packed by :class:`~minipaged.ops.cuda.weights.DevicePacker`.
        activation: dtype of what products read, ``"float32"``, ``"float16"`` or ``"bfloat16"``.
        kv_cache: where K and V go, in every step.
        max_model_len: bounds ``batch.positions``.
        max_num_tokens: tokens of a step, at most; the buffers are made for so many.
        use_graphs: repeat decode steps as recorded graphs, not launch by launch.
    """

    examined = None  # nothing is known of the logits of :meth:`forward` but they (cf. CpuDecoder)

    def __init__(
        self,
        device: Device,
        config: ModelConfig,
        weights: ModelWeights,
        kv_cache: CudaKVCache,
        *,
        activation: str,
        max_model_len: int,
        max_num_tokens: int,
        use_graphs: bool = True,
    ):
        if config.head_dim > MAX_HEAD_DIM:
            raise UnsupportedModelError(
                f"head_dim is {config.head_dim}; attention on a CUDA device takes {MAX_HEAD_DIM} at most. "
                "Use device='cpu'."
            )
        self.device, self.config, self.kv_cache, self.activation = device, config, kv_cache, activation
        self.use_graphs = use_graphs
        self.max_num_tokens = max_num_tokens
        self._buckets = [size for size in BUCKETS if size <= max_num_tokens]
        self._graphs: dict[tuple[int, int, AttentionShape, Needs | None], Recording | None] = {}
        self._ropes: dict[int, tuple[DeviceArray, DeviceArray]] = {}
        for layer in config.layers:
            if layer.rope is not None and id(layer.rope) not in self._ropes:
                cos, sin = rope_tables(layer.rope, max_model_len)
                self._ropes[id(layer.rope)] = DeviceArray.from_host(device, cos), DeviceArray.from_host(device, sin)
        self.weights = weights_on_device(device, weights, activation)
        self._rows_at_once = memory.num_logits(max_num_tokens)
        self.buffers = Buffers(device, config, activation, max_num_tokens, self._rows_at_once)
        max_blocks = -(-max_model_len // kv_cache.block_size)
        self.inputs = StepInputs(device, memory.input_sizes(config, max_num_tokens, max_blocks))
        self.sampling = DeviceSampling(device, self.inputs, self.buffers, activation)
        self._tensor_cores = uses_tensor_cores(
            device.compute_capability, activation, kv_cache.layout.dtype, config.head_dim
        )
        self._plan = lru_cache(maxsize=PLANS_KEPT)(self._make_plan)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights on the device."""
        return total_bytes(self.weights)

    def forward(self, batch: Batch, kv_cache: CudaKVCache) -> np.ndarray:
        """Compute a step: K and V of its tokens go to ``batch.slot_mapping``.

        Returns the logits of the rows ``batch.logits_indices``, float32 ``[L, vocab_size]``.
        Raises :class:`~minipaged.errors.DeviceError` if the device fails.
        """
        num_logits = len(batch.logits_indices)
        answers = self.sample(batch, kv_cache, [Ask(row, whole=True) for row in range(num_logits)])
        if num_logits == 0:
            return np.empty((0, self.config.vocab_size), np.float32)
        return np.stack([answers.rows[row] for row in range(num_logits)])

    def sample(
        self,
        batch: Batch,
        kv_cache: CudaKVCache,
        asks: Sequence[Ask],
        copies: Sequence[tuple[int, int]] = (),
    ) -> Answers:
        """Compute a step as :meth:`forward`, and answer ``asks`` about its logits, in the order of their rows.

        ``copies``: pairs of blocks, copied before (:meth:`~minipaged.ops.cuda.kv.CudaKVCache.copy_blocks`). All that
        the device must know is sent by one copy, and its answers come by one; asks that do not fit at once
        (:data:`~minipaged.ops.cuda.memory.MAX_LOGITS_ROWS`), and whole rows, take more.
        """
        assert kv_cache is self.kv_cache, "plans point to the cache that the decoder was made with"
        num_tokens, num_logits, answers = len(batch.input_ids), len(batch.logits_indices), Answers(len(asks))
        if len(copies) > MAX_COPIES:
            kv_cache.copy_blocks(list(copies))
            copies = ()
        groups = kv_cache.copy_groups(copies)
        pairs = np.array([pair for group in groups for pair in group], np.int32).reshape(-1, 2) if groups else NO_COPIES
        words_end = self.inputs.words_end(len(pairs))
        turns = list(packing.turns(asks, self._rows_at_once, words_end))
        bucket = self._bucket(batch) if len(turns) == 1 else None
        slots = bucket and bucket * -(-len(asks) // bucket)  # a grammar's draws are several asks each
        if slots is not None and slots > self._rows_at_once:
            bucket = slots = None
        first = self._pack(asks, turns[0], words_end, slots) if turns else None
        shape = self._send(batch, bucket or num_tokens, first, pairs, groups)
        if bucket is not None:
            self._launch(bucket, slots, shape, _needs(first))
            self.sampling.fetch(asks, turns[0], first, answers)
            return answers
        self.device.run(self._plan(num_tokens, num_logits, shape))
        if not turns:
            self.device.synchronize()  # the next step's inputs take the place of this one's
        for turn in turns:
            packed = first
            if turn is not turns[0]:
                packed = self._pack(asks, turn, self.inputs.words_end())
                self.inputs.send_asks(packed)
            self.device.run(self._logits_plan(turn.first_row, turn.num_rows))
            if needs := _needs(packed):
                self.device.run(self.sampling.calls(turn.end - turn.begin, needs))
            self.sampling.fetch(asks, turn, packed, answers)
        return answers

    def plan_step(self, batch: Batch) -> list[Call]:
        """Send a step and return its launches, without padding; for measurements. Every row draws at temperature 1."""
        num_tokens, num_logits = len(batch.input_ids), len(batch.logits_indices)
        asks = [Ask(row, Draw(temperature=1.0, seed=row)) for row in range(num_logits)]
        packed = packing.pack(asks, 0, num_logits, self.inputs.words_end())
        shape = self._send(batch, num_tokens, packed)
        calls = [*self._plan(num_tokens, num_logits, shape), *self._logits_plan(0, num_logits)]
        return calls + self.sampling.calls(num_logits, Needs())

    def close(self) -> None:
        """Give the device back. Closing twice is harmless."""
        self._plan.cache_clear()
        self._graphs.clear()
        self.device.close()

    # -- running ----------------------------------------------------------------------------------

    def _bucket(self, batch: Batch) -> int | None:
        """The padded size of a step that decodes one token for each sequence, and samples all of them."""
        size = len(batch.input_ids)
        if not self.use_graphs or not len(batch.context_lens) == len(batch.logits_indices) == size:
            return None
        return min((bucket for bucket in self._buckets if bucket >= size), default=None)

    def _pack(self, asks: Sequence[Ask], turn: Turn, words_end: int, slots: int | None = None) -> Packed:
        num_slots = slots or turn.end - turn.begin
        return packing.pack(asks[turn.begin : turn.end], turn.first_row, num_slots, words_end)

    def _send(
        self,
        batch: Batch,
        num_rows: int,
        asks: Packed | None = None,
        pairs: np.ndarray = NO_COPIES,
        groups: Sequence[Sequence[tuple[int, int]]] = (),
    ) -> AttentionShape:
        """Send a step of ``num_rows`` rows, padding included, and copy blocks; returns what its attention is like."""
        tiles, shape = np.zeros((0, 2), np.int32), PLAIN
        if self._tensor_cores:
            decode = len(batch.context_lens) == len(batch.input_ids)
            tiles = make_tiles(self.config, batch, num_rows, decode)
            shape = AttentionShape("prefill", len(tiles))
            if decode:
                shape = decode_shape(self.config, num_rows, int(batch.context_lens.max()))
        address = self.inputs.send(batch, num_rows, tiles, asks, pairs)
        for group in groups:
            self.device.run(self.kv_cache.copy_calls(address, len(group)))
            address += 8 * len(group)
        return shape

    def _launch(self, bucket: int, slots: int, shape: AttentionShape, needs: Needs | None) -> None:
        """Repeat the graph of a bucket with so many asks; the first time, run its launches (which compiles them) and
        record."""
        key = bucket, slots, shape, needs
        graph = self._graphs.get(key)
        if graph is not None:
            graph.launch()
            return
        calls = [*self._plan(bucket, bucket, shape), *self._logits_plan(0, bucket)]
        if needs:
            calls += self.sampling.calls(slots, needs)
        self.device.run(calls)
        if key not in self._graphs:
            self._graphs[key] = self.device.record(calls)

    # -- plans ------------------------------------------------------------------------------------

    def _make_plan(self, num_tokens: int, num_logits: int, shape: AttentionShape) -> list[Call]:
        """All layers, for so many rows; leaves the rows whose logits are wanted in ``normed``."""
        config, b = self.config, self.buffers
        plan = Plan(self.device, self.activation, num_tokens, shape)
        plan.embedding(self.inputs, self.weights.embedding, self.weights.positions, b.hidden, config.embedding_scale)
        hidden, output, branch = b.hidden, b.output, {}
        for i, (layer, weights) in enumerate(zip(config.layers, self.weights.layers, strict=True)):
            plan.norm(hidden, weights.input_norm, b.normed, config.norm_eps, config.hidden_size, **branch)
            branch = self._attention(plan, i, layer, weights)
            if i == config.num_layers - 1 and num_logits < num_tokens:
                # K and V are written: from here on only rows whose logits are wanted matter.
                if num_logits == 0:
                    return plan.calls
                indices, width = self.inputs.logits_indices, config.hidden_size
                plan.gather(hidden, indices, b.last_hidden, width, num_logits)
                hidden = b.last_hidden
                if branch:
                    plan.gather(output, indices, b.last_output, width, num_logits)
                    output = b.last_output
                    branch["branch"] = output
                plan.num_rows = num_logits
            plan.norm(hidden, weights.mlp_norm, b.normed, config.norm_eps, config.hidden_size, **branch)
            branch = self._feed_forward(plan, layer, weights, hidden, output)
        plan.norm(hidden, self.weights.final_norm, b.normed, config.norm_eps, config.hidden_size, **branch)
        return plan.calls

    def _attention(self, plan: Plan, index: int, layer: LayerConfig, weights: LayerWeights) -> dict:
        """``normed`` to ``hidden``, or to ``output``, which the next norm is then told to add."""
        config, b, layout = self.config, self.buffers, self.kv_cache.layout
        cache = self.kv_cache.layer(index)
        plan.product(b.normed, weights.qkv.weight, b.qkv, bias=weights.qkv.bias)
        rope = None if layer.rope is None else self._ropes[id(layer.rope)]
        norms = (weights.q_norm, weights.k_norm) if config.qk_norm else None
        plan.rope_kv(config, layout, self.inputs, b.qkv, rope, norms, b.q, cache, config.norm_eps)
        plan.attention(config, layout, self.inputs, b.q, cache, b.attended, b.workspace, layer.sliding_window)
        return self._into_residual(plan, b.attended, weights.o, b.hidden, b.output, weights.post_attention_norm)

    def _feed_forward(self, plan: Plan, layer: LayerConfig, weights: LayerWeights, hidden, output) -> dict:
        config, b = self.config, self.buffers
        if layer.moe:
            target, add = (output, False) if config.post_norms else (hidden, True)
            plan.moe(config, weights.experts, b.normed, b, target, add)
            return {"branch": output, "branch_norm": weights.post_mlp_norm} if config.post_norms else {}
        plan.product(
            b.normed,
            weights.gate_up.weight,
            b.inner,
            bias=weights.gate_up.bias,
            out_dtype=self.activation,
            act=config.activation,
            gated=config.gated,
        )
        return self._into_residual(plan, b.inner, weights.down, hidden, output, weights.post_mlp_norm)

    def _into_residual(self, plan: Plan, x, linear, hidden, output, post_norm) -> dict:
        """The product that ends a branch: added to ``hidden`` at once, or left to the next norm."""
        if post_norm is None:
            plan.product(x, linear.weight, hidden, bias=linear.bias, add=True)
            return {}
        plan.product(x, linear.weight, output, bias=linear.bias)
        return {"branch": output, "branch_norm": post_norm}

    def _logits_plan(self, first: int, num_rows: int) -> list[Call]:
        """Logits of ``num_rows`` of the rows that the layers left, from ``first`` on."""
        config, b = self.config, self.buffers
        plan = Plan(self.device, self.activation, num_rows)
        plan.product(b.normed.row(first), self.weights.lm_head, b.logits)
        if config.final_soft_cap is not None:
            plan.soft_cap(b.logits, config.vocab_size, config.final_soft_cap)
        return plan.calls


def _needs(packed: Packed) -> Needs | None:
    """The kernels that a turn takes; ``None``: it only fetches rows."""
    if not packed.drawn and not packed.told:
        return None
    return Needs(packed.edited, packed.drawn, packed.told)
