"""The readable product against the reference operator, in the interpreter."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("cuda.bindings", reason="the CUDA compiler's packages are not installed")

from cuda_kernels import packing, product_plain
from cuda_kernels.toolchain.interpreter import run
from minipaged.ops.reference.activations import ACTIVATIONS
from minipaged.ops.reference.linear import linear
from tests.support.cuda_cases import CARDS, assert_close

NOTHING = np.zeros(1, np.int32)


def as_float32(format, bits):
    """What stored elements stand for."""
    if format == "float32":
        return bits
    return (
        bits.view(np.float16).astype(np.float32)
        if format == "float16"
        else (bits.astype(np.uint32) << 16).view(np.float32)
    )


def dequantised(packed):
    """The float32 weight that a packed one in rows stands for."""
    if packed.format == "int8":
        return packed.data * packed.scales[:, None]
    if packed.format == "int4":
        q = np.stack([packed.data & 15, packed.data >> 4], axis=-1).reshape(packed.num_rows, -1, 32).astype(np.float32)
        scales = packed.scales.view(np.float16).astype(np.float32)
        return ((q - 8) * scales[..., None]).reshape(packed.num_rows, -1)[:, : packed.num_columns]
    return as_float32(packed.format, packed.data)


def product(
    x_bits,
    packed,
    *,
    x="float32",
    out="float32",
    tokens=1,
    bias=None,
    add_to=None,
    activation=None,
    gated=False,
    cc=(8, 0),
):
    num_tokens, width = x_bits.shape
    num_outputs = packed.num_rows // 2 if gated else packed.num_rows
    kernel = product_plain.build(
        x,
        packed.format,
        out,
        tokens=tokens,
        bias=bias is not None,
        add=add_to is not None,
        activation=activation,
        gated=gated,
    )
    result = np.zeros((num_tokens, num_outputs), np.float32 if out == "float32" else np.uint16)
    if add_to is not None:
        result[...] = add_to
    scales = packed.scales if packed.scales.size else np.zeros(1, np.float32)
    grid, _ = product_plain.launch_dims(num_tokens, num_outputs, tokens)
    arguments = (
        x_bits,
        packed.data,
        scales,
        np.zeros(1, np.float32) if bias is None else bias,
        NOTHING,
        NOTHING,
        result,
    )
    run(kernel, grid, (*arguments, num_tokens, num_outputs, width), cc=cc)
    return result


def check(got, want, tolerance):
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(1e-6, np.abs(want).max()))


QUICK = [
    ("float32", "float32", (8, 0)),
    ("float32", "float32", (7, 5)),
    ("float32", "int8", (8, 0)),
    ("float16", "float16", (8, 0)),
    ("float16", "int4", (7, 5)),
    ("bfloat16", "bfloat16", (7, 5)),
    ("bfloat16", "int8", (7, 5)),
    ("bfloat16", "int4", (8, 0)),
]
#: What an engine may ask for; a router's weight stays float32 beside any x.
EVERY = [
    (x, format, cc)
    for x in ("float32", "float16", "bfloat16")
    for format in dict.fromkeys([x, "float32", "int8", "int4"])
    for cc in CARDS
]
VARIANTS = QUICK + [pytest.param(*each, marks=pytest.mark.slow) for each in EVERY if each not in QUICK]


@pytest.mark.parametrize("x, format, cc", VARIANTS)
def test_agrees_with_the_reference(x, format, cc):
    rng = np.random.default_rng(1)
    for num_tokens, num_outputs, width, tokens in [(1, 1, 1, 2), (3, 7, 33, 2), (5, 30, 100, 2)]:
        x_bits = packing.to_bits(x, rng.standard_normal((num_tokens, width)).astype(np.float32))
        packed = packing.pack_rows(format, rng.standard_normal((num_outputs, width)).astype(np.float32))
        bias = rng.standard_normal(num_outputs).astype(np.float32)
        got = product(x_bits, packed, x=x, tokens=tokens, bias=bias, cc=cc)
        check(got, linear(as_float32(x, x_bits), dequantised(packed), bias), 1e-5)


@pytest.mark.parametrize("out", ["float32", "float16", "bfloat16"])
def test_a_gated_product_activates_one_half_and_multiplies_the_other(out):
    rng = np.random.default_rng(2)
    x = rng.standard_normal((3, 40)).astype(np.float32)
    packed = packing.pack_rows("float32", rng.standard_normal((18, 40)).astype(np.float32))
    bias = rng.standard_normal(18).astype(np.float32)
    for name, function in ACTIVATIONS.items():
        both = linear(x, packed.data, bias)
        got = product(x, packed, out=out, tokens=2, bias=bias, activation=name, gated=True)
        assert_close(got, function(both[:, :9]) * both[:, 9:], out, 1e-5)
        assert_close(product(x, packed, out=out, bias=bias, activation=name), function(both), out, 1e-5)


def test_the_residual_is_added_to():
    rng = np.random.default_rng(3)
    x, residual = rng.standard_normal((2, 64)).astype(np.float32), rng.standard_normal((2, 10)).astype(np.float32)
    packed = packing.pack_rows("float32", rng.standard_normal((10, 64)).astype(np.float32))
    check(product(x, packed, add_to=residual), residual + linear(x, packed.data), 1e-5)


@pytest.mark.parametrize("format", packing.FORMATS)
def test_a_row_has_the_same_bits_in_any_company(format):
    rng = np.random.default_rng(4)
    x = rng.standard_normal((9, 70)).astype(np.float32)
    packed = packing.pack_rows(format, rng.standard_normal((13, 70)).astype(np.float32))
    alone = np.concatenate([product(x[i : i + 1], packed) for i in range(len(x))])
    for tokens in (1, 2, 8):
        np.testing.assert_array_equal(product(x, packed, tokens=tokens), alone)
