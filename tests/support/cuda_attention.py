"""Steps of paged attention for tests of the CUDA kernels, and what the reference operator makes of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from minipaged.ops import reference
from minipaged.ops.interface import Batch
from tests.support.cuda_cases import decode, encode


@dataclass
class Step:
    """One step; arrays as a kernel takes them, ``expected [T, Nq, D]`` from the reference operator."""

    q: np.ndarray
    k_cache: np.ndarray
    v_cache: np.ndarray
    k_scales: np.ndarray
    v_scales: np.ndarray
    block_tables: np.ndarray
    sequences: np.ndarray
    positions: np.ndarray
    query_start_loc: np.ndarray
    context_lens: np.ndarray
    expected: np.ndarray

    @property
    def max_blocks(self) -> int:
        return self.block_tables.shape[1]

    @property
    def num_tokens(self) -> int:
        return len(self.positions)


def make_step(
    sequences, heads, kv_heads, head_dim, block_size, dtype, kv_dtype, window=None, soft_cap=None, seed=0, scale=None
) -> Step:
    """``sequences``: (tokens of the step, context length) of each. Unused memory is NaN, and int8's scales too."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    scale = head_dim**-0.5 if scale is None else scale
    lengths = np.array([length for _, length in sequences], np.int32)
    counts = -(-lengths // block_size)
    num_blocks = int(counts.sum()) + 3
    order = rng.permutation(num_blocks).astype(np.int32)
    tables = np.zeros((len(sequences), max(int(counts.max()), 1) + 1), np.int32)
    visible = np.zeros((num_blocks, block_size), bool)
    start = 0
    for row, (count, length) in enumerate(zip(counts.tolist(), lengths.tolist(), strict=True)):
        tables[row, :count] = order[start : start + count]
        start += count
        positions = np.arange(length)
        visible[tables[row, positions // block_size], positions % block_size] = True
    rows = np.array([n for n, _ in sequences])
    starts = np.concatenate([[0], np.cumsum(rows)]).astype(np.int32)
    positions = np.concatenate([np.arange(length - n, length) for n, length in sequences]).astype(np.int32)

    q = encode(normal(int(starts[-1]), heads, head_dim), dtype)
    caches, scales, values = [], [], []
    for _ in range(2):
        cache, scale_of, value = _fill(normal(num_blocks, kv_heads, block_size, head_dim), visible, kv_dtype)
        caches.append(cache)
        scales.append(scale_of)
        values.append(value.transpose(0, 2, 1, 3))  # the reference's order: offset before head
    batch = Batch(
        input_ids=np.zeros(len(positions), np.int32), positions=positions,
        slot_mapping=np.zeros(len(positions), np.int64), query_start_loc=starts, context_lens=lengths,
        block_tables=tables, logits_indices=np.zeros(0, np.int32),
    )  # fmt: skip
    plan = reference.plan_attention(batch, block_size, window)
    expected = reference.paged_attention(decode(q, dtype), *values, plan, scale, soft_cap)
    return Step(
        q=q, k_cache=caches[0], v_cache=caches[1], k_scales=scales[0], v_scales=scales[1],
        block_tables=tables, sequences=np.repeat(np.arange(len(rows)), rows).astype(np.int32), positions=positions,
        query_start_loc=starts, context_lens=lengths, expected=expected,
    )  # fmt: skip


def _fill(values, visible, kv_dtype):
    """(stored, scales, the float32 values stored) of ``values [blocks, kv_heads, block_size, D]``."""
    hidden = ~visible[:, None, :]
    if kv_dtype == "int8":
        scales = np.abs(values).max(-1) / np.float32(127)
        stored = np.rint(values / scales[..., None]).astype(np.int8)
        known = stored * scales[..., None]
        scales = np.where(hidden, np.float32(np.nan), scales)
        return stored, scales, known
    stored = encode(np.where(hidden[..., None], np.float32(np.nan), values), kv_dtype)
    return stored, np.zeros(1, np.float32), decode(stored, kv_dtype)
