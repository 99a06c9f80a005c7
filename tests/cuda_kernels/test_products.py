"""The products on tensor cores against the reference operator, in the interpreter."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("cuda.bindings", reason="the CUDA compiler's packages are not installed")

from cuda_kernels import packing, product
from cuda_kernels.toolchain.interpreter import run
from minipaged.ops.reference.activations import ACTIVATIONS
from minipaged.ops.reference.linear import linear
from tests.support.cuda_cases import assert_close

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


@pytest.mark.parametrize(
    "weight", ["int4", *(pytest.param(name, marks=pytest.mark.slow) for name in ("float16", "int8"))]
)
def test_a_row_has_the_same_bits_with_any_tiles_and_company(weight):
    x_bits, packed, _ = random_case(np.random.default_rng(21), "float16", weight, 37, 130, 200)
    alone = [multiply("float16", weight, x_bits[i : i + 1], packed, 130, cc=(8, 0))[0] for i in (0, 17, 36)]
    for tiles in [(2, 2), (4, 4), (8, 1)]:
        together = multiply("float16", weight, x_bits, packed, 130, cc=(8, 0), tiles=tiles)
        np.testing.assert_array_equal(together[[0, 17, 36]], alone)


@pytest.mark.parametrize(
    "x, weight, name", [("float16", "float16", "silu"), ("bfloat16", "int8", "gelu_tanh"), ("float16", "int4", "gelu")]
)
def test_a_gated_product_activates_one_half_and_multiplies_the_other(x, weight, name):
    rng = np.random.default_rng(22)
    inner, width = 40, 64
    x_bits = packing.to_bits(x, rng.standard_normal((3, width)).astype(np.float32))
    values, bias = (
        rng.standard_normal((2 * inner, width)).astype(np.float32),
        rng.standard_normal(2 * inner).astype(np.float32),
    )
    packed = packing.pack_fragments(weight, packing.interleave_gated(values))
    ordered = packing.interleave_gated(bias[:, None]).reshape(-1)
    got = multiply(x, weight, x_bits, packed, inner, cc=(8, 0), out=x, bias=ordered, activation=name, gated=True)
    both = linear(as_float32(x, x_bits), as_stored(weight, values), bias)
    assert_close(got, ACTIVATIONS[name](both[:, :inner]) * both[:, inner:], x, 1e-5)


def test_the_residual_is_added_to():
    rng = np.random.default_rng(23)
    x_bits, packed, values = random_case(rng, "float16", "float16", 5, 33, 40)
    residual = rng.standard_normal((5, 33)).astype(np.float32)
    got = multiply("float16", "float16", x_bits, packed, 33, cc=(7, 5), add_to=residual, activation="silu")
    check(got, residual + ACTIVATIONS["silu"](linear(as_float32("float16", x_bits), values)), 1e-5)


@pytest.mark.parametrize("weight, gated", [("float16", False), ("int4", True)])
def test_experts_multiply_their_own_rows(weight, gated):
    rng = np.random.default_rng(24)
    num_tokens, width, columns = 11, 48, 24
    starts = np.array([0, 9, 9, 13], np.int32)  # of three experts, one without rows
    rows = rng.integers(0, num_tokens, 13).astype(np.int32)
    x_bits = packing.to_bits("float16", rng.standard_normal((num_tokens, width)).astype(np.float32))
    weights = rng.standard_normal((3, columns * (2 if gated else 1), width)).astype(np.float32)
    packed = [packing.pack_fragments(weight, packing.interleave_gated(each) if gated else each) for each in weights]
    data, scales = (np.stack([getattr(each, name) for each in packed]) for name in ("data", "scales"))
    want = np.zeros((13, columns), np.float32)
    for expert in range(3):
        own = slice(starts[expert], starts[expert + 1])
        both = linear(as_float32("float16", x_bits[rows[own]]), as_stored(weight, weights[expert]))
        want[own] = ACTIVATIONS["silu"](both[:, :columns]) * both[:, columns:] if gated else both
    options = {"activation": "silu", "gated": True} if gated else {}
    kernel = product.build("float16", weight, experts="gather", **options)
    grid, _ = product.launch_dims(num_tokens, columns, (2, 1), 3, gated)
    got = np.zeros((13, columns), np.float32)
    run(
        kernel,
        grid,
        (x_bits, data, scales if scales.size else NONE, NONE, starts, rows, got, num_tokens, columns, width),
    )
    check(got, want, 1e-5)


@pytest.mark.parametrize("weight, bits, row_tiles", [("float16", 16, 2), ("int8", 8, 4), ("int4", 4.5, 8)])
def test_one_token_moves_hardly_more_than_the_weight(weight, bits, row_tiles):
    num_outputs, width = 256, 1024
    x_bits, packed, _ = random_case(np.random.default_rng(25), "float16", weight, 1, num_outputs, width)
    result = np.zeros((1, num_outputs), np.float32)
    scales = packed.scales if packed.scales.size else NONE
    kernel = product.build("float16", weight, row_tiles=row_tiles)
    grid, _ = product.launch_dims(1, num_outputs, (row_tiles, 1))
    counters = run(kernel, grid, (x_bits, packed.data, scales, NONE, NOTHING, NOTHING, result, 1, num_outputs, width))
    needed = num_outputs * width * bits / 8 + x_bits.nbytes + (scales.nbytes if weight == "int8" else 0)
    assert needed <= counters.load.sector_bytes <= 1.05 * needed  # x is read once by every block
    assert counters.store.sector_bytes == result.nbytes
    assert counters.bank_conflicts == 0


@pytest.mark.parametrize("weight, cc", [("float16", (8, 0)), ("int4", (7, 5))])
def test_the_main_loop_has_no_bank_conflicts(weight, cc):
    """Many tokens and few columns of K: everything before the warps' sums are added."""
    x_bits, packed, _ = random_case(np.random.default_rng(26), "float16", weight, 32, 64, 256)
    kernel = product.build("float16", weight, cc=cc, row_tiles=4, token_tiles=4)
    scales = packed.scales if packed.scales.size else NONE
    out = np.zeros((32, 64), np.float32)
    grid, _ = product.launch_dims(32, 64, (4, 4))
    counters = run(kernel, grid, (x_bits, packed.data, scales, NONE, NOTHING, NOTHING, out, 32, 64, 256), cc=cc)
    assert counters.wavefronts.any() and counters.bank_conflicts == 0
