"""Attention on tensor cores agrees with the reference operator, and its three kernels agree in every bit.

Each case runs prefill, decode and split decode over the same step, in the PTX interpreter. Memory that no token
was written to is NaN, and so is the workspace.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.cuda_attention import make_step
from tests.support.cuda_cases import assert_close, decode, empty, run, run_on

from cuda_kernels import attention_decode, attention_prefill, attention_reduce  # isort: skip
from cuda_kernels.attention_tile import CHUNK, NO_WINDOW  # isort: skip

OLD, NEW = (7, 5), (8, 0)
KINDS = ["prefill", "decode", "split"]
# cc, (tokens, context) of the sequences, heads, kv_heads, head_dim, block_size, dtype, kv_dtype, window, soft_cap
CASES = [
    (NEW, [(1, 1), (3, 70), (1, 600)], 4, 2, 64, 16, "float16", "float16", None, None),
    (OLD, [(1, 64), (17, 70), (1, 513)], 3, 1, 64, 16, "float16", "float16", None, None),
    (NEW, [(2, 65)], 8, 1, 8, 1, "bfloat16", "bfloat16", None, None),
    (OLD, [(1, 530), (2, 3)], 6, 2, 40, 5, "float16", "int8", 80, 20.0),
]
SLOW_CASES = [
    (NEW, [(2, 130), (1, 1200)], 16, 1, 256, 256, "bfloat16", "bfloat16", None, None),
    (NEW, [(1, 700), (70, 100)], 8, 1, 128, 32, "bfloat16", "int8", None, None),
    (OLD, [(5, 5)], 10, 2, 96, 16, "float16", "float16", 3, None),
    (NEW, [(1, 2100)], 7, 1, 80, 7, "float16", "float16", 1000, 50.0),
    (NEW, [(4, 300)], 32, 2, 16, 64, "float16", "int8", None, 30.0),
    (NEW, [(1, 77)] * 3, 2, 2, 32, 16, "float16", "float16", None, None),
    (NEW, [(33, 33)], 5, 1, 136, 16, "float16", "float16", None, None),
    (OLD, [(1, 90)], 1, 1, 256, 4, "float16", "int8", None, None),
    (NEW, [(1, 3000), (2, 2)], 4, 1, 64, 128, "bfloat16", "bfloat16", None, None),
    (OLD, [(3, 2500)], 6, 1, 64, 8, "float16", "float16", None, None),
    (NEW, [(2, 40), (1, 129)], 12, 2, 128, 2, "float16", "int8", None, None),
]
cases = pytest.mark.parametrize(
    "case", CASES[::3] + [pytest.param(case, marks=pytest.mark.slow) for case in CASES[1:3] + SLOW_CASES]
)


def tiles_of(step, group, rows):
    """(sequence, first row) of every tile."""
    counts = np.diff(step.query_start_loc) * group
    return np.array([(s, row) for s, n in enumerate(counts) for row in range(0, n, rows)], np.int32)


def attend(kind, cc, step, heads, kv_heads, head_dim, block_size, dtype, kv_dtype, window=None, soft_cap=None):
    """What the kernels of ``kind`` make of ``step``."""
    group, out = heads // kv_heads, empty(step.q.shape, dtype)
    window, scale = NO_WINDOW if window is None else window, head_dim**-0.5
    build = heads, kv_heads, head_dim, block_size, soft_cap, dtype, kv_dtype, cc
    inputs = (
        step.q, step.k_cache, step.v_cache, step.k_scales, step.v_scales, step.block_tables,
        step.query_start_loc, step.context_lens,
    )  # fmt: skip
    if kind == "prefill":
        tiles = tiles_of(step, group, attention_prefill.TILE_ROWS)
        workspace = np.full(tiles.size // 2 * kv_heads * attention_prefill.TILE_ROWS * head_dim, np.nan, np.float32)
        dims = attention_prefill.launch_dims(len(tiles), kv_heads, head_dim, kv_dtype, cc)
        kernel = attention_prefill.build(*build)
        run_on(cc, kernel, dims, *inputs, tiles, out, workspace, step.max_blocks, window, scale)
        return out
    tiles = tiles_of(step, group, attention_decode.tile_rows(heads, kv_heads))
    chunks = -(-int(step.context_lens.max()) // CHUNK) if kind == "split" else 1
    size = attention_decode.workspace_size(len(tiles), chunks, heads, kv_heads, head_dim)
    workspace = np.full(size, np.nan, np.float32)
    dims = attention_decode.launch_dims(len(tiles), kv_heads, chunks)
    kernel = attention_decode.build(*build, kind == "split")
    run_on(cc, kernel, dims, *inputs, tiles, out, workspace, step.max_blocks, window, scale)
    if kind == "split":
        kernel = attention_reduce.build(heads, kv_heads, head_dim, dtype)
        dims = attention_reduce.launch_dims(len(tiles), kv_heads)
        run_on(cc, kernel, dims, workspace, step.query_start_loc, step.context_lens, tiles, out, chunks, window)
    return out


@cases
def test_agrees_with_the_reference_and_with_each_other(case):
    cc, sequences, *shape = case
    step = make_step(sequences, *shape)
    outs = [attend(kind, cc, step, *shape) for kind in KINDS]
    rows = step.num_tokens, -1  # what the next product takes as one row
    # bfloat16 has its weights in two halves, 16 bits together; float16 rounds them, and int8's values, to 11 bits.
    before = 1e-4 if shape[4] == "bfloat16" else 2e-3
    assert_close(outs[0].reshape(rows), step.expected.reshape(rows), shape[4], before)
    for kind, out in zip(KINDS[1:], outs[1:], strict=True):
        np.testing.assert_array_equal(out, outs[0], err_msg=kind)


def test_company_and_chunking_change_no_bit():
    cc, _, *shape = CASES[0]
    together = make_step([(20, 540), (1, 90)], *shape)
    expected = attend("prefill", cc, together, *shape)
    # The last token of the first sequence alone, and again with all but its last six tokens computed before.
    for rows in (1, 6):
        alone = make_step([(rows, 540), (1, 90)], *shape)
        for name in ("k_cache", "v_cache", "block_tables"):
            setattr(alone, name, getattr(together, name))
        alone.q = together.q[[*range(20 - rows, 20), 20]].copy()
        for kind in KINDS:
            found = attend(kind, cc, alone, *shape)
            np.testing.assert_array_equal(found[:rows], expected[20 - rows : 20], err_msg=kind)


def test_padding_becomes_zero():
    cc, _, *shape = CASES[0]
    step = make_step([(1, 40), (1, 1), (1, 70)], *shape)
    step.context_lens[1] = 0
    for kind in KINDS:
        found = decode(attend(kind, cc, step, *shape), shape[4])
        assert not found[1].any() and found[[0, 2]].all(), kind


def test_nan_stays_in_its_sequence():
    cc, _, *shape = CASES[0]
    step = make_step([(2, 70), (1, 50)], *shape)
    expected = attend("prefill", cc, step, *shape)
    block = step.block_tables[0, 1]
    step.k_cache[block] = step.v_cache[block] = 0x7E00
    for kind in KINDS:
        found = attend(kind, cc, step, *shape)
        assert np.isnan(decode(found, shape[4])[:2]).all(), kind
        np.testing.assert_array_equal(found[2], expected[2])


@pytest.mark.slow
def test_decode_moves_each_key_and_value_once():
    """The bytes of K and V in full sectors, at most 1.05 times what the context holds."""
    for kv_dtype, item in (("float16", 2), ("int8", 1)):
        heads, kv_heads, head_dim, block_size, context = 8, 1, 64, 16, 2048
        step = make_step([(1, context)], heads, kv_heads, head_dim, block_size, "float16", kv_dtype)
        kernel = attention_decode.build(heads, kv_heads, head_dim, block_size, None, "float16", kv_dtype, NEW)
        tiles, out = np.zeros((1, 2), np.int32), empty(step.q.shape, "float16")
        arguments = [
            step.q, step.k_cache, step.v_cache, step.k_scales, step.v_scales, step.block_tables, step.query_start_loc,
            step.context_lens, tiles, out, 0, step.max_blocks, NO_WINDOW, 0.125,
        ]  # fmt: skip
        counters = run(kernel, (1, 1, 1), arguments, cc=NEW)
        must = context * kv_heads * (2 * head_dim * item + (8 if kv_dtype == "int8" else 0))
        moved = counters.load.sector_bytes
        assert must <= moved <= 1.05 * must, (kv_dtype, moved, must)
