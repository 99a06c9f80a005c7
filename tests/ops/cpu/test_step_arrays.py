"""What the compiled step is told of a batch, through memory that steps share."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from minipaged.ops.cpu.arrays import StepArrays
from minipaged.ops.cpu.tables import MODEL
from minipaged.ops.interface import Batch

WIDTH = 48


class Reader:
    """Reads what a MODEL record points to, as the compiled step does."""

    def __init__(self, max_num_tokens: int = 64, queries_per_tile: int = 3, num_threads: int = 1):
        self.model = np.zeros(1, MODEL)
        self.arrays = StepArrays(self.model, max_num_tokens, queries_per_tile, WIDTH, num_threads)

    def number(self, name: str) -> int:
        return int(self.model[name][0])

    def read(self, name: str, shape: tuple[int, ...], dtype) -> np.ndarray:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return np.frombuffer(ctypes.string_at(self.number(name), size), dtype).reshape(shape)


def random_batch(rng, lengths: list[int]) -> Batch:
    starts = rng.integers(0, 50, len(lengths))
    loc = np.cumsum([0, *lengths]).astype(np.int32)
    total = int(loc[-1])
    positions = np.concatenate([start + np.arange(n) for start, n in zip(starts, lengths, strict=True)])
    return Batch(
        input_ids=rng.integers(0, 1000, total).astype(np.int32),
        positions=positions.astype(np.int32),
        slot_mapping=rng.permutation(10_000)[:total].astype(np.int64),
        query_start_loc=loc,
        context_lens=(starts + lengths).astype(np.int32),
        block_tables=rng.integers(0, 100, (len(lengths), 7)).astype(np.int32),
        logits_indices=(loc[1:] - 1)[: rng.integers(0, len(lengths) + 1)],
    )


@pytest.mark.parametrize("decoding", [True, False])
def test_each_of_many_steps_finds_its_own_batch(decoding):
    rng, reader = np.random.default_rng(3), Reader()
    for step in range(200):
        count = int(rng.integers(1, 6))
        lengths = [1] * count if decoding or step % 3 else rng.integers(1, 9, count).tolist()
        batch = random_batch(rng, lengths)
        num_logits = len(batch.logits_indices)
        logits = reader.arrays.fill(batch)
        assert logits.shape == (num_logits, WIDTH) and logits.dtype == np.float32
        assert not num_logits or reader.number("logits") == logits.ctypes.data
        assert reader.number("num_logits") == num_logits and reader.number("num_tokens") == sum(lengths)
        for name, dtype in (("input_ids", np.int32), ("positions", np.int32), ("slot_mapping", np.int64)):
            assert np.array_equal(reader.read(name, (sum(lengths),), dtype), getattr(batch, name)), name
        assert np.array_equal(reader.read("logits_indices", (num_logits,), np.int32), batch.logits_indices)
        assert reader.number("block_table_stride") == 4 * 7
        assert np.array_equal(reader.read("block_tables", (count, 7), np.int32), batch.block_tables)
        tiles = reader.read("tiles", (reader.number("num_tiles"), 4), np.int32)
        rows = []
        for sequence, first, queries, position in tiles.tolist():
            assert batch.query_start_loc[sequence] <= first < first + queries <= batch.query_start_loc[sequence + 1]
            assert batch.positions[first] == position
            rows += range(first, first + queries)
        assert sorted(rows) == list(range(sum(lengths))), "each query is in one tile"


def test_longest_contexts_come_first():
    rng, reader = np.random.default_rng(4), Reader()
    for lengths in ([1] * 6, [5, 1, 9, 2]):
        reader.arrays.fill(random_batch(rng, lengths))
        positions = reader.read("tiles", (reader.number("num_tiles"), 4), np.int32)[:, 3]
        assert (np.diff(positions) <= 0).all()


def test_a_thread_begins_with_the_longest_of_the_sequences_whose_rows_it_has():
    rng, reader = np.random.default_rng(4), Reader(num_threads=3)
    for count in (1, 2, 7, 8):
        reader.arrays.fill(random_batch(rng, [1] * count))
        sequence, _, _, positions = reader.read("tiles", (count, 4), np.int32).T
        for thread in range(3):
            share = slice(count * thread // 3, count * (thread + 1) // 3)
            assert sorted(sequence[share]) == list(range(share.start, share.stop))
            assert (np.diff(positions[share]) <= 0).all()


def test_logits_that_somebody_holds_are_not_written_again():
    rng, reader = np.random.default_rng(5), Reader()
    batch = random_batch(rng, [1, 1, 1])
    batch.logits_indices = np.arange(3, dtype=np.int32)
    logits = reader.arrays.fill(batch)
    address = logits.ctypes.data
    view = logits[:, :5]
    del logits
    another = reader.arrays.fill(batch)
    assert another.ctypes.data != address == view.ctypes.data
    address = another.ctypes.data
    del another
    assert reader.arrays.fill(batch).ctypes.data == address, "what nobody holds is used again"


def test_the_logits_of_a_whole_prompt_are_not_kept():
    rng, reader = np.random.default_rng(6), Reader()
    batch = random_batch(rng, [40])
    batch.logits_indices = np.arange(40, dtype=np.int32)
    assert reader.arrays.fill(batch).shape == (40, WIDTH)
    held = [value for value in vars(reader.arrays).values() if isinstance(value, np.ndarray) and value.ndim == 2]
    assert all(array.shape != (40, WIDTH) for array in held)
