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
