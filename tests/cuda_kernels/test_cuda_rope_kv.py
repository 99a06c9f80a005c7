"""Rope, q/k norm and the write to the KV cache agree with the reference operators, in the PTX interpreter."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from minipaged.ops import reference
from tests.support.cuda_cases import CARDS, assert_close, decode, empty, run_on

from cuda_kernels import rope_kv  # isort: skip

cards = pytest.mark.parametrize("cc", CARDS, ids=["sm_75", "sm_80"])
EPS = 1e-6
FLOATS = ["float32", "float16", "bfloat16"]
#  heads, kv_heads, head_dim, block_size, rotary_dim, qk_norm
SHAPES = [
    (4, 2, 64, 16, 64, False),
    (3, 1, 8, 1, 8, True),
    (8, 8, 40, 5, 20, False),
    (2, 1, 256, 256, 256, True),
    (2, 2, 16, 4, 0, False),
]


def make(num_tokens, heads, kv_heads, head_dim, block_size, rotary_dim):
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    angles = normal(50, max(rotary_dim, 2) // 2)
    num_blocks = -(-num_tokens // block_size) + 2
    slots = rng.permutation(num_blocks * block_size)[:num_tokens].astype(np.int64)
    return {
        "qkv": normal(num_tokens, heads + 2 * kv_heads, head_dim) * 3,
        "positions": rng.integers(0, 50, num_tokens).astype(np.int32),
        "cos": np.cos(angles), "sin": np.sin(angles),
        "q_weight": normal(head_dim), "k_weight": normal(head_dim),
        "slots": slots, "num_blocks": num_blocks,
    }  # fmt: skip


def expected_qkv(data, heads, kv_heads, rotary_dim, qk_norm):
    qkv = data["qkv"].copy()
    qk = qkv[:, : heads + kv_heads]
    if qk_norm:
        qk[:, :heads] = reference.rms_norm(qk[:, :heads], data["q_weight"], EPS)
        qk[:, heads:] = reference.rms_norm(qk[:, heads:], data["k_weight"], EPS)
    if rotary_dim:
        reference.rope(qk, data["cos"][data["positions"]], data["sin"][data["positions"]])
    return qkv[:, :heads], qk[:, heads:], qkv[:, heads + kv_heads :]


def launch(cc, data, heads, kv_heads, head_dim, block_size, rotary_dim, qk_norm, dtype, kv_dtype):
    num_tokens, num_blocks = len(data["qkv"]), data["num_blocks"]
    q = empty((num_tokens, heads, head_dim), dtype)
    shape = (num_blocks, kv_heads, block_size, head_dim)
    caches = [np.zeros(shape, np.int8) if kv_dtype == "int8" else empty(shape, kv_dtype) for _ in range(2)]
    scales = [np.full(shape[:3], np.nan, np.float32) for _ in range(2)]
    kernel = rope_kv.build(heads, kv_heads, head_dim, block_size, rotary_dim, qk_norm, dtype, kv_dtype)
    run_on(
        cc, kernel, rope_kv.launch_dims(num_tokens, heads, kv_heads),
        data["qkv"], data["positions"], data["cos"], data["sin"], data["q_weight"], data["k_weight"], data["slots"],
        q, *caches, *scales, EPS,
    )  # fmt: skip
    return q, caches, scales


def stored(cache, slots, block_size):
    """What ``cache [blocks, kv_heads, block_size, ...]`` holds at ``slots``: ``[T, kv_heads, ...]``."""
    return cache[slots // block_size, :, slots % block_size]


def check(cc, shape, dtype, kv_dtype):
    heads, kv_heads, head_dim, block_size, rotary_dim, qk_norm = shape
    data = make(7, heads, kv_heads, head_dim, block_size, rotary_dim)
    q, caches, _ = launch(cc, data, *shape, dtype, kv_dtype)
    expected = expected_qkv(data, heads, kv_heads, rotary_dim, qk_norm)
    assert_close(q, expected[0], dtype)
    for cache, values in zip(caches, expected[1:], strict=True):
        assert_close(stored(cache, data["slots"], block_size), values, kv_dtype)
        others = np.setdiff1d(np.arange(data["num_blocks"] * block_size), data["slots"])
        assert np.isnan(decode(stored(cache, others, block_size), kv_dtype)).all()


@cards
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_rope_kv(cc, shape, dtype):
    check(cc, shape, dtype, dtype)


@pytest.mark.slow
@cards
@pytest.mark.parametrize("dtype, kv_dtype", list(permutations(FLOATS, 2)))
def test_a_cache_of_another_format(cc, dtype, kv_dtype):
    check(cc, SHAPES[0], dtype, kv_dtype)


@cards
@pytest.mark.parametrize(
    "shape, dtype",
    [(shape, "float16") for shape in SHAPES]
    + [pytest.param(SHAPES[1], dtype, marks=pytest.mark.slow) for dtype in ("float32", "bfloat16")],
)
def test_int8_keeps_a_scale_for_each_token_and_head(cc, shape, dtype):
    heads, kv_heads, head_dim, block_size, rotary_dim, qk_norm = shape
    data = make(5, heads, kv_heads, head_dim, block_size, rotary_dim)
    data["qkv"][2, heads:] = 0  # a head of zeros has no scale to divide by
    data["k_weight"] = np.abs(data["k_weight"]) + 0.1
    q, caches, scales = launch(cc, data, *shape, dtype, "int8")
    expected = expected_qkv(data, heads, kv_heads, rotary_dim, qk_norm)
    assert_close(q, expected[0], dtype)
    for cache, scale, values in zip(caches, scales, expected[1:], strict=True):
        integers, scale = (stored(a, data["slots"], block_size) for a in (cache, scale))
        largest = np.abs(values).max(-1)
        np.testing.assert_allclose(scale, largest / 127, rtol=1e-5, atol=1e-30)
        assert (np.abs(integers.astype(int)).max(-1) == np.where(largest > 0, 127, 0)).all()
        limit = 0.501 * scale[..., None] + 1e-5 * largest[..., None]
        assert (np.abs(integers * scale[..., None] - values) <= limit).all()


def test_padding_is_not_stored():
    shape = (2, 1, 16, 4, 16, False)
    data = make(3, *shape[:5])
    data["slots"][1] = -1
    _, caches, _ = launch((8, 0), data, *shape, "float32", "float32")
    for cache in caches:
        assert np.isfinite(cache).all(-1).sum() == 2
