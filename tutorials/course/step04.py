"""Checks of step 04."""

from __future__ import annotations

import numpy as np

from minipaged.ops.interface import Batch
from minipaged.ops.reference import ReferenceOps

NUM_HEADS, NUM_KV_HEADS, D = 6, 2, 32


def examine_attend(attend) -> None:
    rng = np.random.default_rng(0)
    q, k, v = _random(rng, 1)
    found = _result(attend, q, k, v)
    for head in range(NUM_HEADS):
        kv_head = head // 3
        right = np.allclose(found[0, head], v[0, kv_head], atol=1e-5)
        assert right, f"of a single token, head {head} must return the value of KV head {kv_head}."

    q, k, v = _random(rng, 5)
    found = _result(attend, np.zeros_like(q), k, v)
    for row in range(5):
        right = np.allclose(found[row, 0], v[: row + 1, 0].mean(axis=0), atol=1e-5)
        assert right, f"with equal scores row {row} must be the mean of the values 0 to {row} and of no later one."

    q, k, v = _random(rng, 37)
    difference = np.abs(_result(attend, q, k, v) - _paged(q, k, v)).max()
    hint = "is the score divided by sqrt(D)?"
    assert difference < 1e-4, f"the result differs from the engine's paged attention by {difference:.3f}; {hint}"
    found = _result(attend, 1000 * q, k, v)
    assert np.isfinite(found).all(), "large scores give NaN or infinity; subtract each row's largest score before exp."


def examine_rotate(rotate) -> None:
    unit = np.zeros((1, 1, D), np.float32)
    unit[..., 0] = 1
    found = np.asarray(rotate(unit, np.array([1])))
    assert found.shape == unit.shape, f"the result has the shape {found.shape}; it must be {unit.shape}."
    first, second = found[0, 0, 0], found[0, 0, 16]
    right = abs(abs(second) - np.sin(1)) < 1e-5
    assert right, f"value 0 of a head of 32 pairs with value 16, which must become sin(1) = 0.841; it is {second:.3f}."
    assert second > 0, f"the pairs turn the wrong way: (1, 0) at position 1 becomes ({first:.3f}, {second:.3f})."

    unit = np.zeros((1, 1, D), np.float32)
    unit[..., 1] = 1
    turned = np.arctan2(*np.asarray(rotate(unit, np.array([1])))[0, 0, [17, 1]])
    right = abs(turned - 0.56234) < 1e-4
    assert right, f"pair 1 at position 1 must turn by 10000 ** (-2 / 32) = 0.562; it turns {turned:.3f}."

    rng = np.random.default_rng(0)
    x, positions = rng.standard_normal((7, 3, D), np.float32), np.array([0, 1, 2, 3, 64, 200, 511])
    before, expected = x.copy(), x.copy()
    angles = positions[:, None] * 10000.0 ** (-2 * np.arange(D // 2) / D)
    ReferenceOps().rope(expected, np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32))
    difference = np.abs(rotate(x, positions) - expected).max()
    assert difference < 1e-4, f"the result differs from the engine's rope by {difference:.4f}."
    assert (x == before).all(), "x was changed; return a new array."


def _random(rng, num_tokens: int):
    shapes = [(num_tokens, heads, D) for heads in (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)]
    return [rng.standard_normal(shape, np.float32) for shape in shapes]


def _result(attend, q, k, v) -> np.ndarray:
    found = np.asarray(attend(q.copy(), k.copy(), v.copy()))
    assert found.shape == q.shape, f"the result has the shape {found.shape}; it must be that of q, {q.shape}."
    return found


def _paged(q, k, v) -> np.ndarray:
    """The engine's own, from a paged cache with shuffled blocks."""
    ops, num_tokens, block_size = ReferenceOps(), len(q), 4
    num_blocks = -(-num_tokens // block_size)
    block_table = np.random.default_rng(1).permutation(num_blocks)
    positions = np.arange(num_tokens)
    batch = Batch(
        input_ids=np.zeros(num_tokens, np.int32),
        positions=positions.astype(np.int32),
        slot_mapping=block_table[positions // block_size] * block_size + positions % block_size,
        query_start_loc=np.array([0, num_tokens], np.int32),
        context_lens=np.array([num_tokens], np.int32),
        block_tables=block_table[None].astype(np.int32),
        logits_indices=np.array([num_tokens - 1], np.int32),
    )
    cache = np.full((2, num_blocks, block_size, NUM_KV_HEADS, D), np.nan, np.float32)
    ops.write_kv(k, v, *cache, batch.slot_mapping)
    return ops.paged_attention(q, *cache, ops.plan_attention(batch, block_size, None), D**-0.5)
