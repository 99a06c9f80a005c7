"""The arrays of a decode step are those that the general way makes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from minipaged import runner
from minipaged.core.scheduler_output import ScheduledSequence


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_a_decode_step_is_a_case_of_any_step(block_size):
    rng = np.random.default_rng(block_size)
    scheduled = []
    for i, position in enumerate([0, 1, 15, 16, 17, 100]):
        blocks = rng.permutation(1000)[: position // block_size + 1 + i % 2].tolist()  # some have a block in reserve
        scheduled.append(ScheduledSequence(str(i), [int(rng.integers(500))], position, blocks, True))
    rows = np.arange(len(scheduled), dtype=np.int32)
    fast = runner.build_batch(scheduled, rows, block_size)
    # A longer sequence at the end leads through the general way; it is cut off again.
    longer = ScheduledSequence("longer", [1, 2], 0, list(range(2)), True)
    general = runner.build_batch([*scheduled, longer], rows, block_size)
    count = len(scheduled)
    for field in dataclasses.fields(fast):
        one, other = getattr(fast, field.name), getattr(general, field.name)
        assert one.dtype == other.dtype, field.name
        if field.name == "block_tables":
            assert np.array_equal(one, other[:count, : one.shape[1]])
        else:
            assert np.array_equal(one, other[: len(one)]), field.name


def test_what_is_kept_from_one_step_to_the_next_changes_nothing():
    rng = np.random.default_rng(7)
    memory = runner.BatchMemory(max_blocks=12, max_num_tokens=64)

    def sequence(i, position, block_ids):
        return ScheduledSequence(str(i), [int(rng.integers(500))], position, block_ids, True)

    def some_blocks():
        return rng.permutation(1000)[: rng.integers(1, 13)].tolist()

    tables = {i: some_blocks() for i in range(9)}
    for _ in range(300):
        changed = int(rng.integers(9))
        known = tables[changed]
        tables[changed] = [known[:-1] or [3], (known + [5])[:12], some_blocks()][rng.integers(3)]
        running = rng.permutation(9)[: rng.integers(1, 10)].tolist()  # they come, go and change places
        scheduled = [sequence(i, int(rng.integers(4 * len(tables[i]))), tables[i]) for i in running]
        rows = np.arange(len(scheduled), dtype=np.int32)
        kept, fresh = (runner.build_batch(scheduled, rows, 4, m) for m in (memory, None))
        for field in dataclasses.fields(kept):
            one, other = getattr(kept, field.name), getattr(fresh, field.name)
            if field.name == "block_tables":
                width = other.shape[1]
                assert not one[:, width:].any(), "what is not used is 0"
                one = one[:, :width]
            assert one.dtype == other.dtype and np.array_equal(one, other), field.name
