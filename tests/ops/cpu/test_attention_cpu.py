"""Attention and the KV layout of the cpu backend against the definition in float64."""

from __future__ import annotations

import numpy as np
import pytest

from minipaged.ops.cpu import attention
from minipaged.ops.cpu.kv import CpuKVCache, KVLayout
from minipaged.ops.cpu.kv_writes import write_phase
from minipaged.ops.cpu.packing import aligned_zeros
from minipaged.ops.cpu.tables import LAYER, LINEAR, MODEL

TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2, "int8": 1.5e-2}


class Layer:
    """One layer's cache and tables, with random q, k and v for one sequence."""

    def __init__(self, dtype, length, *, heads=3, kv_heads=1, dim=16, block_size=16, window=0, soft_cap=0.0, seed=0):
        rng = np.random.default_rng(seed)
        self.length, self.heads, self.kv_heads, self.dim = length, heads, kv_heads, dim
        self.window, self.soft_cap, self.dtype = window, soft_cap, dtype
        self.qkv = rng.standard_normal((length, heads + 2 * kv_heads, dim)).astype(np.float32)
        self.layout = layout = KVLayout(dtype, block_size, kv_heads, dim)
        num_blocks = -(-length // block_size)
        self.cache = CpuKVCache(1, 2 * num_blocks, layout)
        self.cache.data[...] = 0xFF  # NaN, or -1 with NaN scales
        self.table = rng.permutation(2 * num_blocks)[:num_blocks].astype(np.int32)
        positions = np.arange(length)
        self.slots = self.table[positions // block_size].astype(np.int64) * block_size + positions % block_size
        self.positions = positions.astype(np.int32)
        self.attended = np.full((length, heads * dim), np.nan, np.float32)
        scratch_bytes = attention.scratch_bytes(heads // kv_heads, layout.padded_dim)
        self.scratch = aligned_zeros((scratch_bytes,), np.dtype(np.uint8))
        self.model, self.layers, self.linears = np.zeros(1, MODEL), np.zeros(1, LAYER), np.zeros(1, LINEAR)
        values = {
            "num_heads": heads, "num_kv_heads": kv_heads, "head_dim": dim, "attention_scale": dim**-0.5,
            "attention_soft_cap": soft_cap, "scratch": self.scratch.ctypes.data, "scratch_bytes": self.scratch.nbytes,
            "qkv": self.qkv.ctypes.data, "qkv_stride": self.qkv.strides[0], "positions": self.positions.ctypes.data,
            "attended": self.attended.ctypes.data, "attended_stride": self.attended.strides[0],
            "slot_mapping": self.slots.ctypes.data, "block_tables": self.table.ctypes.data,
        }  # fmt: skip
        values |= {name: getattr(layout, name) for name in ("padded_dim", "block_size", "block_bytes", "k_bytes")}
        for name, value in (values | {"v_bytes": layout.v_bytes}).items():
            self.model[name] = value
        self.layers["cache"], self.layers["window"] = self.cache.data.ctypes.data, window
        write = write_phase(dtype).ctypes
        for row in range(length):
            write(*self._addresses(), row, 0, 1)

    def _addresses(self):
        return self.model.ctypes.data, self.layers.ctypes.data, self.linears.ctypes.data

    def attend(self, tile_sizes: list[int], thread: int = 0, num_threads: int = 1) -> np.ndarray:
        """All rows, in tiles of these sizes; ``[length, heads, dim]``; other threads do nothing."""
        starts = np.cumsum([0, *tile_sizes[:-1]])
        tiles = np.array([(0, start, size, start) for start, size in zip(starts, tile_sizes, strict=True)], np.int32)
        self.model["tiles"], self.model["num_tiles"] = tiles.ctypes.data, len(tiles)
        self.attended[...] = np.nan
        counters = np.zeros((num_threads, attention.COUNTER_BYTES // 8), np.int64)
        phase = attention.attention_phase(self.dtype).ctypes
        self.model["scratch"] = self.scratch.ctypes.data - thread * self.scratch.nbytes
        phase(*self._addresses(), counters.ctypes.data, thread, num_threads)
        return self.attended.reshape(self.length, self.heads, self.dim).copy()

    def expected(self) -> np.ndarray:
        q, k, v = np.split(self.qkv.astype(np.float64), [self.heads, self.heads + self.kv_heads], axis=1)
        k, v = (np.repeat(x, self.heads // self.kv_heads, axis=1) for x in (k, v))
        scores = np.einsum("ihd,jhd->hij", q, k) * self.dim**-0.5
        if self.soft_cap:
            scores = self.soft_cap * np.tanh(scores / self.soft_cap)
        i, j = np.indices((self.length, self.length))
        scores[:, (j > i) | ((j <= i - self.window) if self.window else False)] = -np.inf
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        return np.einsum("hij,jhd->ihd", weights / weights.sum(axis=-1, keepdims=True), v)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    "length, options",
    [
        (1, {}),
        (40, {"block_size": 16}),
        (40, {"block_size": 1}),
        (40, {"block_size": 8, "heads": 4, "kv_heads": 4}),
        (40, {"block_size": 32, "dim": 20}),  # no multiple of 16, nor of 8
        (40, {"dim": 6, "heads": 7}),
        (90, {"window": 5}),
        (90, {"window": 33, "block_size": 4}),
        (40, {"soft_cap": 2.0, "heads": 8, "kv_heads": 2}),
        (300, {"heads": 5}),  # tiles of 9 queries: one lies in two chunks
        (300, {"heads": 7, "window": 20}),
        (700, {}),  # three chunks
        (700, {"window": 300, "soft_cap": 5.0, "block_size": 256}),
    ],
)
def test_against_the_definition(dtype, length, options):
    layer = Layer(dtype, length, **options)
    expected = layer.expected()
    whole = attention.queries_per_tile(layer.heads // layer.kv_heads)
    tiles = [whole] * (length // whole) + [length % whole] * (length % whole > 0)
    result = layer.attend(tiles)
    assert np.abs(result - expected).max() <= TOLERANCE[dtype] * np.abs(layer.qkv).max()
    np.testing.assert_array_equal(layer.attend([1] * length), result)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_the_block_size_changes_no_bit(dtype):
    results = [
        Layer(dtype, 300, block_size=size, seed=4).attend([1] * 300) for size in (1, 2, 4, 8, 16, 32, 64, 128, 256)
    ]
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("num_threads", [2, 3])
def test_a_thread_does_what_others_leave(dtype, num_threads):
    """Its own share first, then theirs; the same values whoever computes them."""
    layer = Layer(dtype, 20, kv_heads=3, heads=9)
    expected = layer.attend([7, 7, 6])
    for thread in range(num_threads):
        np.testing.assert_array_equal(layer.attend([7, 7, 6], thread, num_threads), expected)


@pytest.mark.parametrize("part, value", [("k", np.nan), ("v", np.nan), ("v", np.inf)])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_what_is_not_finite_is_not_lost(dtype, part, value):
    """A broken key or value shows in the rows that see it, quantised or not."""
    layer = Layer(dtype, 20)
    layer.qkv[10, layer.heads + (part == "v"), 3] = value
    write_phase(dtype).ctypes(*layer._addresses(), 10, 0, 1)
    rows = layer.attend([16, 4])
    assert not np.isfinite(rows[10:]).all(axis=(1, 2)).any()


def test_copies_of_blocks_read_before_they_write():
    cache = CpuKVCache(2, 4, KVLayout("int8", 16, 2, 16))
    cache.data[...] = np.arange(4, dtype=np.uint8)[None, :, None]
    cache.copy_blocks([(0, 1), (1, 2)])
    assert cache.data[:, :, 5].tolist() == [[0, 0, 1, 3]] * 2
    assert cache.nbytes == 2 * 4 * 2 * 2 * (16 * 16 + 4 * 16)


def test_symbols_of_formats_differ():
    """Functions of different formats are loaded beside each other from caches that other processes wrote."""
    for phase in (write_phase, attention.attention_phase):
        assert all(dtype in phase(dtype)._wrapper_name for dtype in TOLERANCE)
