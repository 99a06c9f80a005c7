"""The KV cache on a device: NaN until written, blocks copied in every layer, sources before destinations."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.cuda_devices import each_device, make_device  # noqa: F401

# isort: split

from minipaged.errors import ConfigError
from minipaged.ops.cuda import kv
from minipaged.ops.cuda.kv import CudaKVCache, CudaKVLayout


@pytest.mark.parametrize("dtype, head_dim", [("float32", 10), ("bfloat16", 8), ("int8", 12)])
def test_copies_read_before_they_write(device, dtype, head_dim):
    cache = CudaKVCache(device, 2, 6, CudaKVLayout(dtype, 4, 2, head_dim))
    arrays = [array for array in (cache.data, cache.scales) if array is not None]
    assert all((array.to_host() == 0xFF).all() for array in arrays)  # NaN in every float format
    rng = np.random.default_rng(0)
    before = [rng.integers(0, 256, array.shape, np.uint8) for array in arrays]
    for array, values in zip(arrays, before, strict=True):
        array.fill(values)
    cache.copy_blocks([(1, 2), (0, 1), (0, 5), (2, 4)])
    for array, values in zip(arrays, before, strict=True):
        values[:, [2, 1, 5, 4]] = values[:, [1, 0, 0, 2]]
        np.testing.assert_array_equal(array.to_host(), values)
    cache.copy_blocks([])
    free = device.memory()[0]
    nbytes = cache.nbytes
    assert nbytes == 2 * 6 * cache.layout.block_bytes
    cache.free()
    assert device.memory()[0] >= free


@pytest.mark.parametrize("dtype, num_kv_heads, head_dim", [("float32", 2, 10), ("bfloat16", 2, 8), ("int8", 1, 11)])
def test_blocks_travel_to_the_host_and_back(device, monkeypatch, dtype, num_kv_heads, head_dim):
    """Two at a time, into other blocks of another cache; what is not named stays as it was."""
    layout = CudaKVLayout(dtype, 4, num_kv_heads, head_dim)
    caches = [CudaKVCache(device, 3, size, layout) for size in (6, 9)]
    monkeypatch.setattr(kv, "STAGING_BYTES", 2 * caches[0].block_bytes)
    rng, contents = np.random.default_rng(1), []
    for cache in caches:
        arrays = [array for array in (cache.data, cache.scales) if array is not None]
        contents.append([rng.integers(0, 256, array.shape, np.uint8) for array in arrays])
        for array, values in zip(arrays, contents[-1], strict=True):
            array.fill(values)
    content = caches[0].read_blocks([4, 0, 3])
    assert content.shape == (3, caches[0].block_bytes)
    wanted = [np.moveaxis(values[:, [4, 0, 3]], 1, 0).reshape(3, -1) for values in contents[0]]
    np.testing.assert_array_equal(content, np.concatenate(wanted, axis=1))
    caches[1].write_blocks([8, 2, 1], content)
    for array, there, here in zip((caches[1].data, caches[1].scales), contents[1], contents[0], strict=False):
        there[:, [8, 2, 1]] = here[:, [4, 0, 3]]
        np.testing.assert_array_equal(array.to_host(), there)


def test_a_ring_is_a_bug():
    cache = CudaKVCache(make_device("emulated"), 1, 4, CudaKVLayout("float32", 4, 1, 8))
    with pytest.raises(ValueError, match="ring"):
        cache.copy_blocks([(0, 1), (1, 0)])


def test_blocks_too_small_to_copy_are_refused():
    with pytest.raises(ConfigError, match="10 bytes .* block_size must be 4 or more"):
        CudaKVCache(make_device("emulated"), 1, 4, CudaKVLayout("int8", 1, 1, 10))
