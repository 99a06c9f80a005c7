"""Memory that is given out as it is written."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import numpy as np
import pytest

from minipaged.ops.cpu.kv import CpuKVCache, KVLayout
from minipaged.ops.cpu.pages import sparse_zeros


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_zeros_of_any_shape_that_can_be_written():
    for shape, dtype in [((3, 5), np.float32), ((2, 1, 7), np.uint8), ((0, 4), np.int8)]:
        array = sparse_zeros(shape, np.dtype(dtype))
        assert array.shape == shape and array.dtype == dtype
        assert array.flags.c_contiguous and array.flags.writeable and not array.any()
        array[...] = 1
        assert array.sum() == array.size


def test_more_than_there_can_be_is_refused():
    with pytest.raises(MemoryError):
        sparse_zeros((1 << 50,), np.dtype(np.uint8))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from Linux's /proc")
def test_a_block_costs_its_own_memory_only():
    """Whatever the system does with large pages: 32 layers of 2 MiB pages would be 64 MiB."""
    before = resident_bytes()
    cache = CpuKVCache(32, 700, KVLayout("bfloat16", 16, 3, 64))
    cache.data[:, 350] = 1
    assert cache.block_bytes == 384 << 10
    assert resident_bytes() - before < 8 << 20
