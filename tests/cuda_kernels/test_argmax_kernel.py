"""Argmax and row gather against NumPy, in the interpreter."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("cuda.bindings", reason="the CUDA compiler's packages are not installed")

from cuda_kernels import argmax, row_gather
from cuda_kernels.toolchain.interpreter import run


@pytest.mark.parametrize("cc", [(7, 5), (8, 0)])
@pytest.mark.parametrize("num_rows, vocab_size", [(1, 1), (3, 31), (2, 512), (4, 1999)])
def test_argmax_is_the_lowest_index_of_the_largest(num_rows, vocab_size, cc):
    rng = np.random.default_rng(8)
    logits = rng.integers(-9, 9, (num_rows, vocab_size)).astype(np.float32)  # many are equal
    token = np.full(num_rows, -7, np.int32)
    run(argmax.build(), argmax.launch_dims(num_rows)[0], (logits, token, vocab_size), cc=cc)
    np.testing.assert_array_equal(token, logits.argmax(axis=1))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_is_marked_and_no_other(value):
    logits = np.random.default_rng(9).standard_normal((3, 700)).astype(np.float32)
    logits[1, 600] = value
    token = np.zeros(3, np.int32)
    run(argmax.build(), argmax.launch_dims(3)[0], (logits, token, 700))
    np.testing.assert_array_equal(token, [logits[0].argmax(), argmax.NOT_FINITE, logits[2].argmax()])


def test_rows_are_gathered():
    x = np.random.default_rng(10).standard_normal((5, 300)).astype(np.float32)
    indices, out = np.array([4, 0, 3], np.int32), np.zeros((3, 300), np.float32)
    run(row_gather.build(), row_gather.launch_dims(3)[0], (x, indices, out, 300))
    np.testing.assert_array_equal(out, x[indices])
