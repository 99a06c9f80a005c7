"""Paged attention against a loop over tokens, heads and positions in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minipaged.kv_cache import KVCache
from minipaged.ops.interface import Batch
from minipaged.ops.reference import ReferenceOps
from minipaged.ops.reference.attention import QUERY_TILE

ops = ReferenceOps()


def make_batch(sequences: list[tuple[int, int]], block_size: int, rng, contiguous: bool) -> tuple[Batch, int]:
    """``sequences``: (tokens before the step, tokens of the step); returns the pool's size too."""
    context_lens = [before + new for before, new in sequences]
    num_blocks = [-(-n // block_size) for n in context_lens]
    total = sum(num_blocks) + 3
    free = iter(range(total) if contiguous else rng.permutation(total).tolist())
    block_tables = np.zeros((len(sequences), max(num_blocks) + 2), np.int32)
    slots, positions = [], []
    for row, (before, new), n in zip(block_tables, sequences, num_blocks, strict=True):
        row[:n] = [next(free) for _ in range(n)]
        for position in range(before, before + new):
            positions.append(position)
            slots.append(int(row[position // block_size]) * block_size + position % block_size)
    batch = Batch(
        input_ids=np.zeros(len(slots), np.int32),
        positions=np.array(positions, np.int32),
        slot_mapping=np.array(slots, np.int64),
        query_start_loc=np.cumsum([0, *(new for _, new in sequences)]).astype(np.int32),
        context_lens=np.array(context_lens, np.int32),
        block_tables=block_tables,
        logits_indices=np.zeros(0, np.int32),
    )
    return batch, total


def fill(cache: KVCache, batch: Batch, rng) -> None:
    """NaN everywhere, then random K and V where the sequences' tokens are."""
    cache.k[...] = np.nan
    cache.v[...] = np.nan
    shape = cache.k.shape[3:]
    for table, length in zip(batch.block_tables, batch.context_lens, strict=True):
        for position in range(length):
            where = (0, table[position // cache.block_size], position % cache.block_size)
            cache.k[where] = rng.standard_normal(shape)
            cache.v[where] = rng.standard_normal(shape)


def naive_attention(q, cache, batch, scale, window, soft_cap) -> np.ndarray:
    out = np.zeros(q.shape)
    group = q.shape[1] // cache.k.shape[3]
    for s, table in enumerate(batch.block_tables):
        for t in range(batch.query_start_loc[s], batch.query_start_loc[s + 1]):
            position = int(batch.positions[t])
            first = 0 if window is None else max(0, position - window + 1)
            slots = [(table[p // cache.block_size], p % cache.block_size) for p in range(first, position + 1)]
            for head in range(q.shape[1]):
                keys = np.array([cache.k[0, b, o, head // group] for b, o in slots], np.float64)
                values = np.array([cache.v[0, b, o, head // group] for b, o in slots], np.float64)
                scores = scale * (keys @ q[t, head].astype(np.float64))
                if soft_cap is not None:
                    scores = soft_cap * np.tanh(scores / soft_cap)
                weights = np.exp(scores - scores.max())
                out[t, head] = weights / weights.sum() @ values
    return out


def check(sequences, block_size, num_kv_heads, group, head_dim, window, soft_cap, contiguous, seed=0):
    rng = np.random.default_rng(seed)
    batch, num_blocks = make_batch(sequences, block_size, rng, contiguous)
    cache = KVCache(1, num_blocks, block_size, num_kv_heads, head_dim)
    fill(cache, batch, rng)
    q = rng.standard_normal((len(batch.positions), num_kv_heads * group, head_dim), dtype=np.float32)
    plan = ops.plan_attention(batch, block_size, window)
    scale = 2 / math.sqrt(head_dim)
    before = q.copy()
    out = ops.paged_attention(q, *cache.layer(0), plan, scale, soft_cap)
    assert out.dtype == np.float32 and (q == before).all()
    expected = naive_attention(q, cache, batch, scale, window, soft_cap)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("soft_cap", [None, 5.0])
@pytest.mark.parametrize("window", [None, 1, 7, 1000])
@pytest.mark.parametrize("block_size", [1, 8, 256])
def test_mixed_step(block_size, window, soft_cap, contiguous):
    sequences = [(0, 1), (12, 1), (0, 9), (20, 1), (5, 6)]
    check(sequences, block_size, 2, 3, 8, window, soft_cap, contiguous)


@pytest.mark.parametrize("new", [QUERY_TILE - 1, QUERY_TILE, QUERY_TILE + 1, 2 * QUERY_TILE + 3])
@pytest.mark.parametrize("window", [None, 5, QUERY_TILE])
def test_chunks_around_the_tile_size(new, window):
    check([(10, new)], 16, 1, 2, 4, window, None, False)


@settings(max_examples=60, deadline=None)
@given(
    sequences=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 12) | st.just(1)), min_size=1, max_size=5),
    block_size=st.sampled_from([1, 2, 4, 8, 16, 32, 64, 128, 256]),
    num_kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    head_dim=st.sampled_from([2, 6, 16]),
    window=st.none() | st.integers(1, 50),
    soft_cap=st.none() | st.just(3.0),
    contiguous=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_step(sequences, block_size, num_kv_heads, group, head_dim, window, soft_cap, contiguous, seed):
    check(sequences, block_size, num_kv_heads, group, head_dim, window, soft_cap, contiguous, seed)


@pytest.mark.parametrize("new", [1, 4])
def test_a_neighbour_with_nan_does_no_harm(new):
    rng = np.random.default_rng(0)
    batch, num_blocks = make_batch([(9, new), (17, new), (3, new)], 4, rng, contiguous=True)
    cache = KVCache(1, num_blocks, 4, 2, 8)
    fill(cache, batch, rng)
    q = rng.standard_normal((3 * new, 4, 8), dtype=np.float32)
    plan = ops.plan_attention(batch, 4, None)
    clean = ops.paged_attention(q, *cache.layer(0), plan, 1.0)
    cache.k[0, batch.block_tables[1, 0], 1] = np.nan
    cache.v[0, batch.block_tables[1, 0], 1] = np.inf
    out = ops.paged_attention(q, *cache.layer(0), plan, 1.0)
    assert not np.isfinite(out[new : 2 * new]).any()
    assert (np.delete(out, slice(new, 2 * new), 0) == np.delete(clean, slice(new, 2 * new), 0)).all()


def test_huge_scores_do_not_overflow():
    rng = np.random.default_rng(0)
    batch, num_blocks = make_batch([(9, 1), (3, 5)], 4, rng, contiguous=False)
    cache = KVCache(1, num_blocks, 4, 1, 8)
    fill(cache, batch, rng)
    q = rng.standard_normal((6, 1, 8), dtype=np.float32)
    out = ops.paged_attention(q, *cache.layer(0), ops.plan_attention(batch, 4, None), 1e6)
    assert np.isfinite(out).all()
