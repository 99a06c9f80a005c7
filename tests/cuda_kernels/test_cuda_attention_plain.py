"""Plain paged attention agrees with the reference operator, in the PTX interpreter."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.cuda_attention import make_step
from tests.support.cuda_cases import CARDS, assert_close, decode, empty, run_on

from cuda_kernels import attention_plain  # isort: skip

OLDER, NEWER = CARDS
cards = pytest.mark.parametrize("cc", [pytest.param(OLDER, marks=pytest.mark.slow), NEWER], ids=["sm_75", "sm_80"])


def attend(cc, step, heads, kv_heads, head_dim, block_size, dtype, kv_dtype, window=None, soft_cap=None, scale=None):
    out = empty(step.q.shape, dtype)
    kernel = attention_plain.build(heads, kv_heads, head_dim, block_size, soft_cap, dtype, kv_dtype)
    run_on(
        cc, kernel, attention_plain.launch_dims(step.num_tokens, heads),
        step.q, step.k_cache, step.v_cache, step.k_scales, step.v_scales, step.block_tables, step.sequences,
        step.positions, out, step.max_blocks, attention_plain.NO_WINDOW if window is None else window,
        head_dim**-0.5 if scale is None else scale,
    )  # fmt: skip
    return out


@cards
@pytest.mark.parametrize(
    ("sequences", "heads", "kv_heads", "head_dim", "block_size", "window", "soft_cap"),
    [
        ([(1, 1)], 1, 1, 8, 1, None, None),
        ([(1, 33), (5, 70), (1, 64)], 4, 2, 64, 16, None, None),
        ([(3, 40), (1, 100)], 8, 1, 40, 256, 30, None),
        ([(2, 65)], 3, 1, 256, 5, None, 20.0),
        ([(1, 300)], 2, 2, 128, 32, 17, None),
        pytest.param([(1, 3000)], 6, 1, 64, 64, None, None, marks=pytest.mark.slow),
    ],
)
def test_agrees(cc, sequences, heads, kv_heads, head_dim, block_size, window, soft_cap):
    shape = heads, kv_heads, head_dim, block_size
    for dtype, kv_dtype in (("float32", "float32"), ("float16", "int8"), ("bfloat16", "bfloat16")):
        step = make_step(sequences, *shape, dtype, kv_dtype, window, soft_cap)
        out = attend(cc, step, *shape, dtype, kv_dtype, window, soft_cap)
        assert_close(out, step.expected, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("cc", CARDS, ids=["sm_75", "sm_80"])
@pytest.mark.parametrize("kv_dtype", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_any_format_of_the_cache_beside_any_other(cc, dtype, kv_dtype):
    """What tensor cores do not multiply comes here, so this kernel takes every pair."""
    shape = 6, 2, 40, 16, dtype, kv_dtype
    step = make_step([(3, 50), (1, 17)], *shape)
    assert_close(attend(cc, step, *shape), step.expected, dtype)


def test_padding_becomes_zero_and_company_changes_no_bit():
    shape = 4, 2, 64, 16, "float32", "float32"
    step = make_step([(4, 90), (1, 35)], *shape)
    together = attend((8, 0), step, *shape)
    step.positions[2] = -1
    padded = attend((8, 0), step, *shape)
    assert not decode(padded, "float32")[2].any()
    np.testing.assert_array_equal(np.delete(padded, 2, 0), np.delete(together, 2, 0))
