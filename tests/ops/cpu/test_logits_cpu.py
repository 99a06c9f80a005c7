"""What the compiled pass over logits says is what NumPy says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numba import njit

from minipaged.ops.cpu.logits import examine_row, findings
from minipaged.sampling.sampler import examine as examine_in_numpy


@njit
def run_examine(logits, stride, num_rows, count, indices, magnitudes):
    for row in range(num_rows):
        examine_row(logits + row * stride, count, indices + 4 * row, magnitudes + 4 * row)


def examine(logits: np.ndarray) -> tuple[list[int], list[bool]]:
    found = np.empty((2, len(logits)), np.int32)
    run_examine(logits.ctypes.data, logits.strides[0], *logits.shape, found[0].ctypes.data, found[1].ctypes.data)
    return findings(found)


@settings(max_examples=60, deadline=None)
@given(st.tuples(st.integers(1, 3), st.integers(1, 70)).flatmap(lambda shape: arrays(np.float32, shape)))
def test_any_logits(logits):
    with np.errstate(over="ignore", invalid="ignore"):
        wanted, wanted_damaged = examine_in_numpy(logits)
    likeliest, damaged = examine(logits)
    assert damaged == wanted_damaged
    for found, right, row in zip(likeliest, wanted, logits, strict=True):
        assert found == right or np.isnan(row).any()


@pytest.mark.parametrize("count", [1, 15, 16, 17, 49152, 50257])
def test_the_first_of_several_largest(count):
    logits = np.random.default_rng(count).integers(-3, 3, (4, count)).astype(np.float32)
    assert examine(logits) == (logits.argmax(axis=1).tolist(), [False] * 4)


def test_rows_of_a_wider_array_and_values_at_the_limits():
    wide = np.full((2, 40), np.inf, np.float32)
    logits = wide[:, :33]
    logits[:] = np.finfo(np.float32).min
    logits[0, 32], logits[1, 5] = -0.0, np.finfo(np.float32).max
    assert examine(logits) == ([32, 5], [False, False])
    logits[1, 32] = -np.inf
    assert examine(logits)[1] == [False, True]
