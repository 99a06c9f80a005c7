"""The products on tensor cores against the reference operator, in the interpreter."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("cuda.bindings", reason="the CUDA compiler's packages are not installed")

from cuda_kernels import packing, product
from cuda_kernels.toolchain.interpreter import run
from minipaged.ops.reference.activations import ACTIVATIONS
from minipaged.ops.reference.linear import linear

TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
VARIANTS = [
    ("float16", "float16", (8, 0)),
    ("float16", "float16", (7, 5)),
    ("float16", "int8", (8, 0)),
    ("float16", "int8", (7, 5)),
    ("float16", "int4", (8, 0)),
    ("float16", "int4", (7, 5)),
    ("bfloat16", "bfloat16", (8, 0)),
    ("bfloat16", "int8", (8, 0)),
    ("bfloat16", "int4", (8, 0)),
]
NONE = np.zeros(1, np.float32)
NOTHING = np.zeros(1, np.int32)


def as_float32(format, bits):
    """What stored elements stand for."""
    if format == "float32":
        return bits
    if format == "float16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)


def as_stored(format, weight):
    """float32 ``weight`` after the rounding of ``format``."""
    if format == "int8":
        q, scale = packing.quantise_int8(weight)
        return q * scale[:, None]
    if format == "int4":
        q, scale = packing.quantise_int4(weight)
        values = (q.reshape(*scale.shape, 32).astype(np.float32) - 8) * scale.astype(np.float32)[..., None]
        return values.reshape(len(weight), -1)[:, : weight.shape[1]]
    return as_float32(format, packing.to_bits(format, weight))


def multiply(
    x, weight, x_bits, packed, num_outputs, *, cc, out="float32", bias=None, add_to=None, tiles=(2, 1), **options
):
    """``product`` of ``x_bits`` in format ``x`` with a weight packed as ``weight``."""
    num_tokens, width = x_bits.shape
    row_tiles, token_tiles = tiles
    kernel = product.build(
        x,
        weight,
        out,
        cc=cc,
        row_tiles=row_tiles,
        token_tiles=token_tiles,
        bias=bias is not None,
        add=add_to is not None,
        **options,
    )
    result = np.zeros((num_tokens, num_outputs), np.float32 if out == "float32" else np.uint16)
    if add_to is not None:
        result[...] = add_to
    scales = packed.scales if packed.scales.size else NONE
    grid, _ = product.launch_dims(num_tokens, num_outputs, tiles, gated=options.get("gated", False))
    arguments = (x_bits, packed.data, scales, NONE if bias is None else bias, NOTHING, NOTHING, result)
    run(kernel, grid, (*arguments, num_tokens, num_outputs, width), cc=cc)
    return result


def random_case(rng, x, weight, num_tokens, num_outputs, width):
    x_bits = packing.to_bits(x, rng.standard_normal((num_tokens, width)).astype(np.float32))
    values = rng.standard_normal((num_outputs, width)).astype(np.float32)
    return x_bits, packing.pack_fragments(weight, values), as_stored(weight, values)


def check(got, want, tolerance):
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


@pytest.mark.parametrize("x, weight, cc", VARIANTS)
def test_agrees_with_the_reference(x, weight, cc):
    rng = np.random.default_rng(20)
    for num_tokens, num_outputs, width in [(1, 1, 8), (3, 70, 200), (9, 64, 544)]:
        x_bits, packed, values = random_case(rng, x, weight, num_tokens, num_outputs, width)
        bias = np.resize(rng.standard_normal(num_outputs), packed.data.shape[0] * 64).astype(np.float32)
        got = multiply(x, weight, x_bits, packed, num_outputs, cc=cc, bias=bias)
        check(got, linear(as_float32(x, x_bits), values, bias[:num_outputs]), 1e-5)


@pytest.mark.parametrize("weight", ["float16", "int8", "int4"])
def test_a_row_has_the_same_bits_with_any_tiles_and_company(weight):
    x_bits, packed, _ = random_case(np.random.default_rng(21), "float16", weight, 37, 96, 200)
    alone = np.concatenate([multiply("float16", weight, x_bits[i : i + 1], packed, 96, cc=(8, 0)) for i in (0, 17, 36)])
    for tiles in [(2, 1), (2, 2), (4, 4)]:
        together = multiply("float16", weight, x_bits, packed, 96, cc=(8, 0), tiles=tiles)
        np.testing.assert_array_equal(together[[0, 17, 36]], alone)
