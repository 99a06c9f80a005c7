"""Embedding, norms, activations and copies agree with the reference operators, in the PTX interpreter."""

from __future__ import annotations

import numpy as np
import pytest

from minipaged.ops import reference
from minipaged.ops.reference.kv import copy_blocks as reference_copy_blocks
from tests.support.cuda_cases import CARDS, assert_close, empty, encode, rounded, run_on

from cuda_kernels import activation, copy_blocks, embedding, layer_norm, rms_norm, row_gather  # isort: skip

FLOATS = ["float32", "float16", "bfloat16"]
cards = pytest.mark.parametrize("cc", CARDS, ids=["sm_75", "sm_80"])
dtypes = pytest.mark.parametrize("dtype", FLOATS)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@cards
@dtypes
@pytest.mark.parametrize(("num_tokens", "width"), [(1, 8), (5, 128), (3, 333)])
def test_embedding(cc, dtype, num_tokens, width):
    table, places = normal(0, 50, width), normal(1, 9, width)
    ids = np.arange(num_tokens, dtype=np.int32) * 7 % 50
    positions = np.arange(num_tokens, dtype=np.int32)[::-1].copy()
    hidden = empty((num_tokens, width), "float32")
    dims = embedding.launch_dims(num_tokens)
    run_on(cc, embedding.build(dtype), dims, ids, encode(table, dtype), hidden, width, 2.5)
    expected = reference.embedding(ids, rounded(table, dtype)) * np.float32(2.5)
    np.testing.assert_array_equal(hidden, expected)

    arguments = ids, encode(table, dtype), positions, encode(places, dtype), hidden, width, 2.5
    run_on(cc, embedding.build(dtype, learned_positions=True), dims, *arguments)
    assert_close(hidden, expected + reference.embedding(positions, rounded(places, dtype)), "float32")


def test_embedding_zeroes_padding():
    hidden = empty((2, 40), "float32")
    ids = np.array([-1, 3], np.int32)
    run_on((8, 0), embedding.build(), embedding.launch_dims(2), ids, normal(0, 4, 40), hidden, 40, 1.0)
    assert not hidden[0].any() and hidden[1].all()


def norm_arrays(num_rows, width):
    return normal(0, num_rows, width), normal(1, num_rows, width), normal(2, width), normal(3, width)


@cards
@dtypes
@pytest.mark.parametrize("residual", ["none", "add", "norm_add"])
@pytest.mark.parametrize(("num_rows", "width"), [(1, 8), (3, 576), (2, 777)])
def test_rms_norm(cc, dtype, residual, num_rows, width):
    hidden, branch, weight, branch_weight = norm_arrays(num_rows, width)
    hidden *= 30
    out, eps = empty(hidden.shape, dtype), 1e-5
    added = hidden
    inputs = [hidden.copy()]
    if residual == "add":
        added, inputs = hidden + branch, [*inputs, branch]
    if residual == "norm_add":
        added, inputs = hidden + reference.rms_norm(branch, branch_weight, eps), [*inputs, branch, branch_weight]
    run_on(cc, rms_norm.build(dtype, residual), rms_norm.launch_dims(num_rows), *inputs, weight, out, width, eps)
    assert_close(inputs[0], added, "float32")
    assert_close(out, reference.rms_norm(added, weight, eps), dtype)


@cards
@dtypes
@pytest.mark.parametrize("residual", ["none", "add"])
@pytest.mark.parametrize(("num_rows", "width"), [(1, 8), (3, 768), (2, 333)])
def test_layer_norm(cc, dtype, residual, num_rows, width):
    hidden, branch, weight, bias = norm_arrays(num_rows, width)
    hidden += 100  # a mean far from zero must not cost the variance its digits
    out, eps = empty(hidden.shape, dtype), 1e-5
    added, inputs = hidden, [hidden.copy()]
    if residual == "add":
        added, inputs = hidden + branch, [*inputs, branch]
    run_on(
        cc, layer_norm.build(dtype, residual), layer_norm.launch_dims(num_rows), *inputs, weight, bias, out, width, eps
    )
    wide = added.astype(np.float64)
    expected = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + eps) * weight + bias
    assert_close(out, expected, dtype)


@cards
@dtypes
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("name", list(activation.ACTIVATIONS))
def test_activation(cc, dtype, gated, name):
    for num_rows, width in ((1, 1), (3, 300)):
        x = normal(0, num_rows, width * (1 + gated)) * 4
        out = empty((num_rows, width), dtype)
        kernel = activation.build(name, gated, dtype)
        run_on(cc, kernel, activation.launch_dims(num_rows, width), x, out, width)
        assert_close(out, reference.gated_activation(name, x) if gated else reference.activation(name, x), dtype)


@cards
def test_activation_of_extremes(cc):
    x = np.array([[-3e38, -100, -0.0, 0.0, 100, 3e38, np.nan]], np.float32)
    for name in activation.ACTIVATIONS:
        out = empty(x.shape, "float32")
        run_on(cc, activation.build(name, False), activation.launch_dims(1, 7), x, out, 7)
        np.testing.assert_allclose(out, [[0, 0, 0, 0, 100, 3e38, np.nan]], rtol=1e-6, atol=1e-30)


@cards
def test_soft_cap(cc):
    x = normal(0, 3, 513) * 60
    found = x.copy()
    run_on(cc, activation.build_soft_cap(), activation.launch_dims(3, 513), found, 513, 30.0)
    assert_close(found, reference.soft_cap(x, 30.0), "float32")


@cards
@pytest.mark.parametrize("width", [1, 127, 300])
def test_row_gather(cc, width):
    x, indices = normal(0, 6, width), np.array([5, 0, 5, 3], np.int32)
    out = empty((4, width), "float32")
    run_on(cc, row_gather.build(), row_gather.launch_dims(4), x, indices, out, width)
    np.testing.assert_array_equal(out, x[indices])


@cards
@pytest.mark.parametrize(("word_bytes", "block_bytes"), [(16, 4096), (16, 48), (4, 20)])
def test_copy_blocks(cc, word_bytes, block_bytes):
    cache = np.random.default_rng(0).integers(0, 2**32, (3, 7, block_bytes // 4), np.uint32)
    expected = cache.copy()
    pairs = [(0, 3), (6, 1), (0, 2)]
    reference_copy_blocks(expected, pairs)
    layer_words = cache[0].nbytes // word_bytes
    dims = copy_blocks.launch_dims(len(pairs), 3)
    # The same memory twice: the interpreter's copy of it comes back from the destination.
    found = cache.copy()
    run_on(
        cc, copy_blocks.build(word_bytes), dims, cache, found, np.array(pairs, np.int32),
        block_bytes // word_bytes, layer_words, layer_words,
    )  # fmt: skip
    np.testing.assert_array_equal(found, expected)
