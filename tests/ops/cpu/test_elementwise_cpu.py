"""The emitted row functions against NumPy, at lengths with and without a rest."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numba import njit

from minipaged.ops.cpu import elementwise, vector_math
from minipaged.ops.cpu.elementwise import for_values
from minipaged.ops.cpu.embedding import FORMATS, embed
from minipaged.ops.cpu.emit import kernel
from minipaged.ops.cpu.packing import pack, to_bfloat16
from minipaged.ops.reference import activations, norms
from minipaged.ops.reference.rope import rope as reference_rope

GUARD = 1e30
LENGTHS = [1, 7, 16, 33, 576]


def bits(value: float) -> int:
    return int(np.float32(value).view(np.uint32))


def row(length: int, seed: int = 0) -> np.ndarray:
    """Random values with a guard behind them that nothing may touch."""
    values = np.random.default_rng(seed).standard_normal(length + 1).astype(np.float32) * 3
    values[-1] = GUARD
    return values


def address(array: np.ndarray) -> int:
    return array.ctypes.data


@njit
def run_rms_norm(*args):
    elementwise.rms_norm(*args)


@njit
def run_layer_norm(*args):
    elementwise.layer_norm(*args)


@njit
def run_rope(*args):
    elementwise.rope(*args)


@njit
def run_activate(*args):
    elementwise.activate(*args)


@kernel(3)
def short_exp(e, x, out, count):
    for_values(
        e, count, lambda at, type_: e.store(vector_math.short_exp(e, e.load(e.add(x, at), type_)), e.add(out, at))
    )


@njit
def run_short_exp(*args):
    short_exp(*args)


@njit
def run_soft_cap(*args):
    elementwise.soft_cap(*args)


@njit
def run_embed(format, table, token, out, size):
    embed(format, table, token, out, size)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", ["rms_norm", "layer_norm"])
def test_norms(name, length):
    x, weight = row(length), row(length, 1)
    if name == "rms_norm":
        expected = norms.rms_norm(x[:-1], weight[:-1], 1e-5)
        run_rms_norm(address(x), address(weight), address(x), length, bits(1e-5))
    else:
        expected = norms.layer_norm(x[:-1], weight[:-1], None, 1e-5)
        run_layer_norm(address(x), address(weight), address(x), length, bits(1e-5))
    np.testing.assert_allclose(x[:-1], expected, rtol=1e-5, atol=1e-6)
    assert x[-1] == np.float32(GUARD)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("gated", [0, 1])
@pytest.mark.parametrize("name", list(elementwise.ACTIVATIONS))
def test_activations(name, gated, length):
    x, up = row(length), row(length, 1)
    x[:-1] *= 4
    expected = activations.activation(name, x[:-1].copy()) * (up[:-1] if gated else 1)
    run_activate(elementwise.ACTIVATIONS[name] + 3 * gated, address(x), address(up), length)
    np.testing.assert_allclose(x[:-1], expected, rtol=2e-6, atol=2e-6)
    assert x[-1] == np.float32(GUARD)


def test_activations_at_the_ends():
    x = np.array([-np.inf, -1e30, -200.0, 0.0, 200.0, np.nan], np.float32)
    run_activate(elementwise.ACTIVATIONS["silu"], address(x), 0, len(x))
    assert math.isnan(x[5])
    np.testing.assert_allclose(x[2:5], [0, 0, 200], atol=1e-30)


@pytest.mark.parametrize("length", LENGTHS)
def test_soft_cap(length):
    x = row(length)
    expected = activations.soft_cap(x[:-1].copy(), 2.5)
    run_soft_cap(address(x), bits(2.5), length)
    np.testing.assert_allclose(x[:-1], expected, atol=2e-6)


@pytest.mark.parametrize("half", [1, 4, 16, 20])
def test_rope(half):
    x, angles = row(2 * half), np.linspace(0, 7, half, dtype=np.float32)
    cos, sin = np.cos(angles), np.sin(angles)
    expected = x[:-1].copy()
    reference_rope(expected[None, None], cos[None], sin[None])
    run_rope(address(x), address(cos), address(sin), half)
    np.testing.assert_allclose(x[:-1], expected, atol=1e-6)
    assert x[-1] == np.float32(GUARD)


@pytest.mark.parametrize("name", list(FORMATS))
def test_embeddings(name):
    table = np.random.default_rng(0).standard_normal((100, 18)).astype(np.float32)
    out = np.empty(18, np.float32)
    tolerance = {"float32": 0, "bfloat16": 2**-8, "int8": 1 / 100}[name.split()[0]]
    for token in (0, 47, 48, 99):
        if name.endswith("rows"):
            rows = table if name == "float32 rows" else to_bfloat16(table)
            start = address(rows)
        else:
            packed = pack(name, table)
            start = packed.address
        run_embed(FORMATS[name], start, token, address(out), 18)
        np.testing.assert_allclose(out, table[token], atol=tolerance * np.abs(table[token]).max())


def test_short_exp():
    x = np.concatenate([-np.geomspace(1e-6, 87, 4000), [0.0, -200.0, -np.inf, np.nan]]).astype(np.float32)
    out = np.empty_like(x)
    run_short_exp(address(x), address(out), len(x))
    expected = np.exp(np.maximum(x.astype(np.float64), -87))
    np.testing.assert_allclose(out, expected, rtol=6e-6)
    assert out[4000] == 1
