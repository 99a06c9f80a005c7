"""Paged attention: sequences of one row (decode) share one softmax, longer ones (prefill) go in tiles.

Exactly the visible tokens are read: as a view where a sequence's blocks lie side by side, gathered
otherwise. What else the cache holds cannot matter. The softmax is the plain one over a whole row of
scores; its sum divides the weighted V, which is shorter than the row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from minipaged.ops.interface import Batch
from minipaged.ops.reference import activations

QUERY_TILE = 32  # rows whose scores are computed at once: bounds memory, and skips most of their future


@dataclass
class Context:
    """The rows of one sequence, and the tokens that any of them sees."""

    first_row: int  # in the step's token arrays
    num_rows: int
    start: int  # position of the first visible token
    end: int  # position after the last one
    slots: slice | np.ndarray  # of these tokens; a slice where the blocks lie side by side


@dataclass
class AttentionPlan:
    """The sequences of a step by kind; those of one row with their segments in the row of all scores."""

    single: list[Context]
    longer: list[Context]
    single_rows: np.ndarray
    segments: list[slice]
    segment_starts: np.ndarray
    segment_lengths: np.ndarray
    sliding_window: int | None


def plan_attention(batch: Batch, block_size: int, sliding_window: int | None) -> AttentionPlan:
    """See :meth:`Ops.plan_attention <minipaged.ops.interface.Ops.plan_attention>`."""
    single, longer = [], []
    rows = batch.query_start_loc.tolist()
    for i, end in enumerate(batch.context_lens.tolist()):
        num_rows = rows[i + 1] - rows[i]
        start = 0 if sliding_window is None else max(0, end - num_rows - sliding_window + 1)
        slots = _visible_slots(batch.block_tables[i], block_size, start, end)
        (single if num_rows == 1 else longer).append(Context(rows[i], num_rows, start, end, slots))
    lengths = np.array([c.end - c.start for c in single], np.int64)
    ends = np.cumsum(lengths)
    return AttentionPlan(
        single=single,
        longer=longer,
        single_rows=np.array([c.first_row for c in single], np.int64),
        segments=[slice(end - n, end) for n, end in zip(lengths.tolist(), ends.tolist(), strict=True)],
        segment_starts=ends - lengths,
        segment_lengths=lengths,
        sliding_window=sliding_window,
    )


def _visible_slots(block_table: np.ndarray, block_size: int, start: int, end: int) -> slice | np.ndarray:
    """Slots of the tokens at positions ``start`` to ``end``."""
    first_block = start // block_size
    blocks = block_table[first_block : -(-end // block_size)].astype(np.int64)
    offset = start - first_block * block_size
    if (blocks[1:] - blocks[:-1] == 1).all():
        first_slot = int(blocks[0]) * block_size + offset
        return slice(first_slot, first_slot + end - start)
    slots = blocks[:, None] * block_size + np.arange(block_size)
    return slots.ravel()[offset : offset + end - start]


def paged_attention(
    q: np.ndarray,
    k_cache: np.ndarray,
    v_cache: np.ndarray,
    plan: AttentionPlan,
    scale: float,
    soft_cap: float | None = None,
) -> np.ndarray:
    """See :meth:`Ops.paged_attention <minipaged.ops.interface.Ops.paged_attention>`."""
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[2]
    q = (q * np.float32(scale)).reshape(num_tokens, num_kv_heads, num_heads // num_kv_heads, head_dim)
    k, v = _by_slot(k_cache), _by_slot(v_cache)
    out = np.empty_like(q)
    if plan.single:
        _attend_single(q, k, v, plan, soft_cap, out)
    for context in plan.longer:
        _attend_tiles(q, _read(k, context.slots), _read(v, context.slots), context, plan.sliding_window, soft_cap, out)
    return out.reshape(num_tokens, num_heads, head_dim)


def _by_slot(cache: np.ndarray) -> np.ndarray:
    """A layer's cache as ``[Nkv, num_slots, D]``."""
    num_blocks, block_size, num_kv_heads, head_dim = cache.shape
    return cache.reshape(num_blocks * block_size, num_kv_heads, head_dim).transpose(1, 0, 2)


def _read(tokens: np.ndarray, slots: slice | np.ndarray) -> np.ndarray:
    """K or V at ``slots`` of ``tokens [Nkv, num_slots, D]``."""
    if type(slots) is slice:
        return tokens[:, slots]
    return tokens.take(slots, axis=1, mode="clip")  # clip: no index is checked, and none is out of range


def _attend_single(q, k, v, plan: AttentionPlan, soft_cap: float | None, out) -> None:
    """Sequences with one row. The scores of all lie one after the other in ``[Nkv, group, 1, sum of lengths]``.

    A group's heads are separate products: BLAS is faster at vector times matrix than at the
    product with a matrix of three rows.
    """
    _, num_kv_heads, group, _ = q.shape
    scores = np.empty((num_kv_heads, group, 1, int(plan.segment_lengths.sum())), np.float32)
    queries, attended = q[:, :, :, None], out[:, :, :, None]
    for context, segment in zip(plan.single, plan.segments, strict=True):
        keys = _read(k, context.slots).transpose(0, 2, 1)
        np.matmul(queries[context.first_row], keys[:, None], out=scores[..., segment])
    if soft_cap is not None:
        scores = activations.soft_cap(scores, soft_cap)
    scores -= np.repeat(np.maximum.reduceat(scores, plan.segment_starts, axis=-1), plan.segment_lengths, axis=-1)
    np.exp(scores, out=scores)
    for context, segment in zip(plan.single, plan.segments, strict=True):
        values = _read(v, context.slots)
        np.matmul(scores[..., segment], values[:, None], out=attended[context.first_row])
    sums = np.add.reduceat(scores, plan.segment_starts, axis=-1)  # [Nkv, group, 1, sequences]
    out[plan.single_rows] /= sums.transpose(3, 0, 1, 2)


def _attend_tiles(q, k, v, context: Context, sliding_window: int | None, soft_cap: float | None, out) -> None:
    """A sequence with several rows; ``k``, ``v [Nkv, context.end - context.start, D]``.

    The heads that share a KV head are rows of one product: ``[Nkv, group * rows, D] @ [Nkv, D, keys]``.
    """
    _, num_kv_heads, group, head_dim = q.shape
    for first in range(0, context.num_rows, QUERY_TILE):
        num_rows = min(QUERY_TILE, context.num_rows - first)
        rows = slice(context.first_row + first, context.first_row + first + num_rows)
        position = context.end - context.num_rows + first  # of the tile's first row
        start = 0 if sliding_window is None else max(0, position - sliding_window + 1)
        visible = slice(start - context.start, position + num_rows - context.start)

        queries = q[rows].transpose(1, 2, 0, 3).reshape(num_kv_heads, group * num_rows, head_dim)
        scores = queries @ k[:, visible].swapaxes(-1, -2)
        if soft_cap is not None:
            scores = activations.soft_cap(scores, soft_cap)
        by_row = scores.reshape(num_kv_heads, group, num_rows, -1)
        # The last keys are the tile's own tokens: those after a row's own are its future.
        by_row[..., -num_rows:] += np.triu(np.full((num_rows, num_rows), -np.inf, np.float32), 1)
        if sliding_window is not None:
            outside = np.tri(num_rows, by_row.shape[-1], position - sliding_window - start, bool)
            by_row += np.where(outside, np.float32(-np.inf), np.float32(0))

        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        sums = scores.sum(axis=-1, keepdims=True)
        attended = scores @ v[:, visible]
        attended /= sums
        out[rows] = attended.reshape(num_kv_heads, group, num_rows, head_dim).transpose(2, 0, 1, 3)
