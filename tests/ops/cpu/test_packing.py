"""Packed weights: quality of the rounding, streaming, alignment."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minipaged.errors import ConfigError
from minipaged.ops.cpu import packing
from minipaged.ops.cpu.packing import INT8_GROUP, allocate, array_shape, pack, pack_rows, quantise_int4, to_bfloat16
from minipaged.ops.cpu.products import FORMATS
from tests.support.cpu_products import bfloat16_values, unpacked


def weights(N, K, seed=0):
    return np.random.default_rng(seed).standard_normal((N, K), np.float32)


@pytest.mark.parametrize("format", FORMATS)
def test_arrays_are_aligned_and_as_announced(format):
    packed = pack(format, weights(100, 70))
    assert (packed.data.shape, packed.data.dtype) == array_shape(format, 100, 70)
    assert packed.address == packed.data.ctypes.data and packed.address % 64 == 0
    assert packed.num_panels == 3
    assert packed.nbytes == packed.data.nbytes


@pytest.mark.parametrize(
    "format,nbytes,parts", [("int8", 4736, ("words", "scale")), ("int4", 960, ("words", "scale", "minimum"))]
)
def test_the_parts_of_a_record_are_views_that_do_not_overlap(format, nbytes, parts):
    packed = allocate(format, 50, 200)
    packed.data[...] = 0
    assert packed.data.shape[2] == nbytes and nbytes % 64 == 0
    for part in parts:
        getattr(packed, part).view(np.uint8)[...] += 1
    assert packed.data.max() == 1 and packed.data.sum() == sum(getattr(packed, part).nbytes for part in parts)


@settings(max_examples=30, deadline=None)
@given(
    format=st.sampled_from(FORMATS),
    N=st.integers(1, 120),
    K=st.integers(1, 70),
    cuts=st.lists(st.integers(0, 120), max_size=4),
)
def test_slabs_of_any_size_and_order_give_the_same(format, N, K, cuts):
    weight = weights(N, K)
    whole, parts = pack(format, weight), allocate(format, N, K)
    edges = sorted({0, N, *(cut for cut in cuts if cut < N)})
    for first, last in reversed(list(zip(edges, edges[1:], strict=False))):
        pack_rows(parts, weight[first:last], first)
    assert np.array_equal(whole.data, parts.data)


def test_int8_rounds_to_half_a_step():
    weight = weights(60, 50)
    packed = pack("int8", weight)
    groups = np.pad(weight, ((0, 0), (0, INT8_GROUP - 50))).reshape(60, -1, INT8_GROUP)
    scale = np.abs(groups).max(axis=2) / 127
    assert np.allclose(packed.scale.transpose(0, 2, 1).reshape(-1, scale.shape[1])[:60], scale, rtol=1e-3)
    steps = np.repeat(scale, INT8_GROUP, axis=1)[:, :50]
    assert (np.abs(unpacked(packed) - weight) <= 0.6 * steps).all()  # half a step, and the rounding of the scale
    assert np.abs(unpacked(packed) - weight).mean() < 0.26 * steps.mean()


def test_int4_keeps_the_least_value_and_rounds_the_rest():
    weight = weights(50, 96)
    groups = weight.reshape(50, 3, 32)
    least, step = groups.min(axis=2, keepdims=True), np.ptp(groups, axis=2, keepdims=True) / 15
    error = np.abs(unpacked(pack("int4", weight)).reshape(50, 3, 32) - groups)
    assert (error <= 0.51 * step).all()
    at_least = np.take_along_axis(error, groups.argmin(axis=2)[..., None], axis=2)
    assert (at_least <= np.abs(least) * 2**-11).all()


def test_values_that_int4_can_store_come_back_unchanged():
    q = np.random.default_rng(0).integers(0, 16, (4, 32))
    q[:, 0], q[:, 1] = 0, 15
    values = (q * np.float32(0.25) - np.float32(1.5)).astype(np.float32)
    nibbles, scale, minimum = quantise_int4(values)
    found = nibbles.astype(int) * scale[:, None].astype(np.float32) + minimum[:, None].astype(np.float32)
    assert np.array_equal(found, values)


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_values_beyond_the_scale_s_range_stay_finite(format):
    weight = weights(48, 64) * np.float32(1e30)
    packed = pack(format, weight)
    assert np.isfinite(packed.scale).all()
    assert format == "int8" or np.isfinite(packed.minimum).all()


def test_bfloat16_rounds_to_nearest_even():
    values = np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8, -3.1415927, 1e-40, np.inf, -np.inf, np.nan, 3.4e38], np.float32)
    rounded = bfloat16_values(to_bfloat16(values))
    assert rounded[1] == 1.0 and rounded[2] == 1 + 2**-6
    assert np.isnan(rounded[7]) and rounded[5] == np.inf and rounded[6] == -np.inf
    finite = np.isfinite(rounded) & (np.abs(values) > 1e-38)
    assert (np.abs(rounded[finite] - values[finite]) <= np.abs(values[finite]) * 2**-8).all()


def test_unknown_format():
    with pytest.raises(ConfigError, match="no weight format 'int3'"):
        allocate("int3", 4, 4)


def test_an_arena_gives_zeros_that_share_no_byte_and_begin_at_cache_lines():
    arena = packing.Arena()
    shapes = [(3, 5), (1,), (7, 11), (packing.Arena.PIECE // 4 - 8,), (packing.Arena.PIECE,), (2, 2)]
    arrays = [arena(shape, np.dtype(np.float32)) for shape in shapes]
    for i, (array, shape) in enumerate(zip(arrays, shapes, strict=True)):
        assert array.shape == shape and array.ctypes.data % packing.ALIGNMENT == 0 and not array.any()
        array.fill(i + 1)
    assert all((array == i + 1).all() for i, array in enumerate(arrays))
