"""The physical KV cache: order of its axes, size, block copies."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest

from minipaged.kv_cache import KVCache


def test_logical_order_and_size():
    cache = KVCache(num_layers=2, num_blocks=5, block_size=4, num_kv_heads=3, head_dim=8)
    assert cache.k.shape == cache.v.shape == (2, 5, 4, 3, 8)
    assert cache.nbytes == 2 * (2 * 5 * 4 * 3 * 8) * 4
    k, v = cache.layer(1)
    k[4, 3, 2, 7], v[0, 0, 0, 0] = 1, 2
    assert cache.k[1, 4, 3, 2, 7] == 1 and cache.v[1, 0, 0, 0, 0] == 2
    assert cache.k.sum() == 1 and cache.v.sum() == 2


def test_copy_blocks_copies_k_and_v_of_every_layer():
    rng = np.random.default_rng(0)
    cache = KVCache(3, 6, 4, 2, 8)
    cache.k[...], cache.v[...] = rng.random(cache.k.shape), rng.random(cache.v.shape)
    k, v = cache.k.copy(), cache.v.copy()
    cache.copy_blocks([(2, 0), (0, 5)])
    cache.copy_blocks([])
    for source, destination in [(2, 0), (0, 5), (1, 1), (2, 2), (3, 3), (4, 4)]:
        assert (cache.k[:, destination] == k[:, source]).all()
        assert (cache.v[:, destination] == v[:, source]).all()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from Linux's /proc")
def test_unused_blocks_cost_no_memory():
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    before = resident_bytes()
    cache = KVCache(num_layers=4, num_blocks=4096, block_size=16, num_kv_heads=4, head_dim=64)
    cache.k[:, 17] = 1
    assert cache.nbytes == 512 * 2**20
    assert resident_bytes() - before < 64 * 2**20


def test_blocks_are_read_and_written_whole():
    rng = np.random.default_rng(0)
    source, target = (KVCache(2, 5, 4, 3, 8) for _ in range(2))
    for cache in (source.k, source.v):
        cache[...] = rng.standard_normal(cache.shape)
    content = source.read_blocks([3, 1])
    assert content.shape == (2, source.block_bytes) and source.block_bytes * 5 == source.nbytes
    target.write_blocks([0, 4], content)
    for ours, theirs in ((target.k, source.k), (target.v, source.v)):
        np.testing.assert_array_equal(ours[:, [0, 4]], theirs[:, [3, 1]])
        assert not ours[:, 1:4].any()
