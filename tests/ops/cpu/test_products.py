"""Products against their definition, and the law that a row's result is its own."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minipaged.errors import ConfigError
from minipaged.ops.cpu import features
from minipaged.ops.cpu.packing import INT8_GROUP, pack, padded_rows
from minipaged.ops.cpu.products import FORMATS, product_kernel
from tests.support.cpu_products import expected, quantised_rows, run_product, unpacked

pytestmark = pytest.mark.filterwarnings("error")


def weight_and_rows(N, K, M, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((N, K), np.float32), rng.standard_normal((M, K), np.float32)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("N,K", [(48, 32), (1, 1), (49, 33), (96, 7), (100, 258), (47, 64)])
@pytest.mark.parametrize("M", [1, 6, 11])
def test_equals_the_definition(format, N, K, M):
    weight, x = weight_and_rows(N, K, M)
    packed = pack(format, weight)
    out = run_product(product_kernel(format), packed, x)
    reference = expected(packed, x, rounds_x_to_bfloat16=features.current().has_bf16_dot)
    bound = 1e-5 * (np.abs(x) @ np.abs(weight).T + 1e-6)
    assert (np.abs(out[:, :N] - reference) <= bound).all()
    assert (out[:, N:] == 0).all(), "columns of the padding are zeros"


@pytest.mark.parametrize("K", [96, 17])
def test_the_sums_of_a_group_are_exact(K):
    """The integers are exact; then come a conversion, the scales' product, and a multiplication."""
    weight, x = weight_and_rows(48, K, 3)
    packed = pack("int8", weight)
    q, scale = quantised_rows(x, INT8_GROUP)
    words = packed.words[0, 0].transpose(1, 0, 2).reshape(48, -1).astype(np.int64) - 128
    exact = (q[:, 0] @ words.T).astype(np.float32) * (packed.scale[0, 0].astype(np.float32) * scale)
    assert np.array_equal(run_product(product_kernel("int8"), packed, x), exact)


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_one_large_value_costs_its_group_alone(format):
    """Activations of transformers have a few values that are hundreds of times larger than the rest."""
    weight, x = weight_and_rows(48, 640, 2)
    x[:, 70] = 1000.0
    packed = pack(format, weight)
    only = np.where(np.arange(640) < 96, x, np.float32(0))  # the group with the large value, or int4's three
    others = run_product(product_kernel(format), packed, x) - run_product(product_kernel(format), packed, only)
    exact = (x - only) @ unpacked(packed).T
    assert np.abs(others - exact).max() < 0.01 * np.abs(exact).max()


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_extreme_integers_do_not_saturate(format):
    """All products at their largest, with either sign: 16-bit sums would overflow first."""
    K = 256
    weight = np.full((48, K), -8.0, np.float32)
    weight[1::2] = 7.0
    weight[1::2, ::32] = -8.0  # so that int4 has both ends of its range
    x = np.full((2, K), 3.0, np.float32)
    x[1] *= -1
    packed = pack(format, weight)
    reference = expected(packed, x)
    assert np.allclose(run_product(product_kernel(format), packed, x), reference, rtol=1e-6)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("K", [576, 131])
def test_a_row_never_depends_on_the_number_of_rows(format, K):
    weight, x = weight_and_rows(144, K, 256)
    packed, kernel = pack(format, weight), product_kernel(format)
    together = run_product(kernel, packed, x)
    for M in (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 33, 128):
        assert np.array_equal(run_product(kernel, packed, x[:M]), together[:M]), M
        assert np.array_equal(run_product(kernel, packed, np.ascontiguousarray(x[-M:])), together[-M:]), M


@pytest.mark.parametrize("format", FORMATS)
def test_panels_may_be_shared_out(format):
    weight, x = weight_and_rows(240, 70, 7)
    packed, kernel = pack(format, weight), product_kernel(format)
    whole = run_product(kernel, packed, x)
    parts = run_product(kernel, packed, x, panels=[(3, 5), (0, 1), (1, 3), (2, 2)])
    assert np.array_equal(whole, parts)


@pytest.mark.parametrize("format", FORMATS)
def test_no_rows_write_nothing(format):
    """As in a step that computes a chunk of a prompt and nothing else: nobody wants its logits."""
    weight, x = weight_and_rows(60, 40, 1)
    out = np.full((1, padded_rows(60)), 7, np.float32)
    run_product(product_kernel(format), pack(format, weight), x[:0], out=out)
    assert (out == 7).all()


@pytest.mark.parametrize("format", FORMATS)
def test_accumulate_adds_the_product_to_what_is_there(format):
    weight, x = weight_and_rows(60, 40, 5)
    packed, kernel = pack(format, weight), product_kernel(format)
    product = run_product(kernel, packed, x)
    residual = np.random.default_rng(1).standard_normal(product.shape, np.float32)
    assert np.array_equal(run_product(kernel, packed, x, out=residual.copy(), accumulate=True), residual + product)
    poisoned = np.full_like(product, np.inf)
    assert np.array_equal(run_product(kernel, packed, x, out=poisoned), product), "what was there is not looked at"


@pytest.mark.parametrize("format", FORMATS)
def test_strides_and_addresses_need_no_alignment(format):
    weight, _ = weight_and_rows(48, 37, 1)
    packed, kernel = pack(format, weight), product_kernel(format)
    wide = np.random.default_rng(2).standard_normal((9, 41)).astype(np.float32)
    x = wide[:, 3:40]
    out = np.full((9, 53), 5, np.float32)
    run_product(kernel, packed, x, out=out[:, 5:])
    assert np.array_equal(out[:, 5:], run_product(kernel, packed, np.ascontiguousarray(x)))
    assert (out[:, :5] == 5).all(), "nothing is written before a row"


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_row_harms_no_other(format, bad):
    weight, x = weight_and_rows(48, 64, 8)
    packed, kernel = pack(format, weight), product_kernel(format)
    good = run_product(kernel, packed, x)
    x[3, 17] = bad
    out = run_product(kernel, packed, x)
    assert not np.isfinite(out[3]).any()
    assert np.array_equal(np.delete(out, 3, 0), np.delete(good, 3, 0))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("magnitude", [0.0, 1e-40, 1e-20, 1e30])
def test_rows_of_any_magnitude(format, magnitude):
    weight, x = weight_and_rows(48, 32, 3)
    packed, kernel = pack(format, weight), product_kernel(format)
    x[1] *= np.float32(magnitude)
    out = run_product(kernel, packed, x)
    assert np.isfinite(out).all()
    if magnitude >= 1e-20:
        reference = expected(packed, x)
        assert np.allclose(out[1], reference[1], rtol=1e-2, atol=np.abs(reference[1]).max() * 1e-2)


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_a_weight_of_zeros(format):
    packed = pack(format, np.zeros((50, 40), np.float32))
    out = run_product(product_kernel(format), packed, np.ones((2, 40), np.float32))
    assert (out == 0).all()


@settings(max_examples=25, deadline=None)
@given(
    format=st.sampled_from(FORMATS),
    N=st.integers(1, 130),
    K=st.integers(1, 140),
    M=st.integers(1, 20),
    seed=st.integers(0, 9),
)
def test_any_shape(format, N, K, M, seed):
    weight, x = weight_and_rows(N, K, M, seed)
    packed, kernel = pack(format, weight), product_kernel(format)
    out = run_product(kernel, packed, x)
    row = seed % M
    assert np.array_equal(out[row : row + 1], run_product(kernel, packed, x[row : row + 1]))
    reference = expected(packed, x[row : row + 1], rounds_x_to_bfloat16=features.current().has_bf16_dot)
    assert np.abs(out[row, :N] - reference[0]).max() <= 1e-5 * (np.abs(x[row]) @ np.abs(weight).T).max()
    assert out.shape[1] == padded_rows(N)


def test_unknown_format():
    with pytest.raises(ConfigError, match="float32, bfloat16, int8, int4"):
        product_kernel("int2")


def test_the_reference_itself_restores_the_weight():
    weight, _ = weight_and_rows(50, 35, 1)
    for format, error in {"float32": 0, "bfloat16": 0.02, "int8": 0.02, "int4": 0.3}.items():
        assert np.abs(unpacked(pack(format, weight)) - weight).max() <= error
