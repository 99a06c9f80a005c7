"""Each operator of the reference backend against loops over single values."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest

from minipaged.ops.reference import ReferenceOps
from minipaged.ops.reference.activations import erf
from minipaged.ops.reference.kv import copy_blocks

ops = ReferenceOps()


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def assert_close(actual: np.ndarray, expected, tolerance: float = 2e-6) -> None:
    expected = np.asarray(expected, np.float64)
    assert actual.dtype == np.float32 and actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def test_embedding_is_a_new_array():
    table = random(5, 3)
    rows = ops.embedding(np.array([4, 0, 4], np.int32), table)
    assert_close(rows, [table[4], table[0], table[4]])
    rows += 1
    assert table[0, 0] != rows[1, 0]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("n", [0, 1, 5])
def test_linear(n, with_bias):
    x, weight, bias = random(n, 7), random(4, 7, seed=1), random(4, seed=2)
    expected = np.zeros((n, 4))
    for i in range(n):
        for j in range(4):
            expected[i, j] = sum(float(x[i, k]) * float(weight[j, k]) for k in range(7)) + with_bias * float(bias[j])
    assert_close(ops.linear(x, weight, bias if with_bias else None), expected)


@pytest.mark.parametrize("shape", [(3, 16), (2, 5, 8), (0, 16)])
def test_rms_norm(shape):
    x, weight = 3 * random(*shape), random(shape[-1], seed=1)
    before = x.copy()
    expected = np.zeros(shape)
    for index in np.ndindex(shape[:-1]):
        mean_square = sum(float(v) ** 2 for v in x[index]) / shape[-1]
        for j in range(shape[-1]):
            expected[index + (j,)] = x[index][j] / math.sqrt(mean_square + 0.25) * weight[j]
    assert_close(ops.rms_norm(x, weight, 0.25), expected)
    assert (x == before).all()


@pytest.mark.parametrize("with_bias", [False, True])
def test_layer_norm(with_bias):
    x, weight, bias = 3 * random(4, 16) + 5, random(16, seed=1), random(16, seed=2)
    before = x.copy()
    expected = np.zeros((4, 16))
    for i in range(4):
        mean = sum(map(float, x[i])) / 16
        variance = sum((float(v) - mean) ** 2 for v in x[i]) / 16
        for j in range(16):
            expected[i, j] = (x[i, j] - mean) / math.sqrt(variance + 0.25) * weight[j] + with_bias * bias[j]
    assert_close(ops.layer_norm(x, weight, bias if with_bias else None, 0.25), expected)
    assert (x == before).all()


@pytest.mark.parametrize("rotary_dim", [2, 6, 8])
def test_rope(rotary_dim):
    x = random(3, 2, 8)
    angles = random(3, rotary_dim // 2, seed=1)
    expected = x.astype(np.float64)
    for t in range(3):
        for head in range(2):
            for i in range(rotary_dim // 2):
                pair = complex(x[t, head, i], x[t, head, i + rotary_dim // 2])
                turned = pair * complex(math.cos(angles[t, i]), math.sin(angles[t, i]))
                expected[t, head, i], expected[t, head, i + rotary_dim // 2] = turned.real, turned.imag
    assert ops.rope(x, np.cos(angles), np.sin(angles)) is None
    assert_close(x, expected)


def test_rope_turns_a_view_in_place():
    qkv = random(3, 5, 8)
    alone, untouched = qkv[:, :4].copy(), qkv[:, 4].copy()
    angles = random(3, 4, seed=1)
    ops.rope(qkv[:, :4], np.cos(angles), np.sin(angles))
    ops.rope(alone, np.cos(angles), np.sin(angles))
    assert (qkv[:, :4] == alone).all() and (qkv[:, 4] == untouched).all()


def phi(x: float) -> float:
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


SCALAR_ACTIVATIONS = {
    "silu": lambda x: x / (1 + math.exp(-x)) if x > -700 else 0.0,
    "gelu": lambda x: x * phi(x),
    "gelu_tanh": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}


@pytest.mark.parametrize("name", SCALAR_ACTIVATIONS)
def test_activations(name):
    x = np.concatenate([np.linspace(-12, 12, 4001), [-1e4, -200.0, -89.0, 0.0, 200.0, 1e4]]).astype(np.float32)[None]
    before = x.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = ops.activation(name, x)
    assert (x == before).all()
    assert_close(y, [[SCALAR_ACTIVATIONS[name](float(v)) for v in x[0]]], 4e-6)


@pytest.mark.parametrize("name", SCALAR_ACTIVATIONS)
def test_gated_activation(name):
    gate_up = 4 * random(3, 10)
    expected = [[SCALAR_ACTIVATIONS[name](float(r[j])) * r[j + 5] for j in range(5)] for r in gate_up]
    assert_close(ops.gated_activation(name, gate_up), expected, 4e-6)


def test_erf_is_exact_to_float32_rounding():
    x = np.linspace(-6, 6, 20001).astype(np.float32)
    assert np.abs(erf(x) - np.array([math.erf(float(v)) for v in x])).max() < 4e-7


def test_soft_cap():
    x = 40 * random(4, 6)
    before = x.copy()
    assert_close(ops.soft_cap(x, 30.0), 30 * np.tanh(x.astype(np.float64) / 30), 1e-5)
    assert (x == before).all()


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("experts_per_token", [1, 2, 4])
def test_moe(experts_per_token, normalize):
    x, router = random(9, 6), random(4, 6, seed=1)
    gate_up, down = random(4, 10, 6, seed=2), random(4, 6, 5, seed=3)
    expected = np.zeros((9, 6))
    for t, token in enumerate(x.astype(np.float64)):
        probabilities = np.exp(router @ token)
        probabilities /= probabilities.sum()
        best = sorted(range(4), key=lambda e: -probabilities[e])[:experts_per_token]
        total = sum(probabilities[e] for e in best) if normalize else 1.0
        for e in best:
            hidden = gate_up[e] @ token
            hidden = [SCALAR_ACTIVATIONS["silu"](hidden[j]) * hidden[j + 5] for j in range(5)]
            expected[t] += probabilities[e] / total * (down[e] @ hidden)
    assert_close(ops.moe(x, router, gate_up, down, experts_per_token, normalize, "silu"), expected, 1e-5)


def test_moe_tie_goes_to_the_lower_index():
    x, gate_up, down = random(2, 6), random(3, 10, 6, seed=2), random(3, 6, 5, seed=3)
    tied = np.zeros((3, 6), np.float32)
    alone = ops.moe(x, tied[:1], gate_up[:1], down[:1], 1, True, "silu")
    assert_close(ops.moe(x, tied, gate_up, down, 1, True, "silu"), alone)


def test_moe_of_a_token_does_not_depend_on_company():
    x, router = random(9, 6), random(4, 6, seed=1)
    gate_up, down = random(4, 10, 6, seed=2), random(4, 6, 5, seed=3)
    together = ops.moe(x, router, gate_up, down, 2, True, "silu")
    alone = [ops.moe(row[None], router, gate_up, down, 2, True, "silu")[0] for row in x]
    assert_close(together, alone, 1e-5)


def test_moe_keeps_nan_to_its_own_row():
    x, router = random(9, 6), random(4, 6, seed=1)
    gate_up, down = random(4, 10, 6, seed=2), random(4, 6, 5, seed=3)
    clean = ops.moe(x, router, gate_up, down, 2, True, "silu")
    x[3] = np.nan
    y = ops.moe(x, router, gate_up, down, 2, True, "silu")
    assert np.isnan(y[3]).all()
    assert_close(np.delete(y, 3, axis=0), np.delete(clean, 3, axis=0), 1e-5)


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_write_kv(block_size):
    num_blocks = 32 // block_size
    k, v = random(5, 2, 3), random(5, 2, 3, seed=1)
    # Heads first in memory, as KVCache has it: the logical order is a view.
    caches = [np.full((2, num_blocks, block_size, 3), 7, np.float32).transpose(1, 2, 0, 3) for _ in range(2)]
    slots = np.array([31, 0, 17, 5, 6], np.int64)
    ops.write_kv(k, v, *caches, slots)
    for new, cache in zip((k, v), caches, strict=True):
        for slot in range(32):
            stored = cache[slot // block_size, slot % block_size]
            expected = new[slots.tolist().index(slot)] if slot in slots else np.full((2, 3), 7)
            assert (stored == expected).all()


def test_copy_blocks_reads_every_source_first():
    cache = random(2, 6, 4, 1, 3)
    before = cache.copy()
    copy_blocks(cache, [(0, 1), (1, 2), (5, 0), (1, 4)])
    for source, destination in [(0, 1), (1, 2), (5, 0), (1, 4), (3, 3), (5, 5)]:
        assert (cache[:, destination] == before[:, source]).all()
