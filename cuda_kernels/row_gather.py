"""Rows of a float32 matrix by their numbers: after the last layer only those whose logits are wanted go on.

    x         [T, W]   float32
    indices   [L]      int32
    out       [L, W]   float32   = x[indices]

One block a row of ``out``; neighbouring threads copy neighbouring values.
"""

from __future__ import annotations

from functools import cache

from numba import cuda

from cuda_kernels.kernel import Kernel, float32, int32, pointer

THREADS = 128


@cache
def build() -> Kernel:
    """``row_gather(x, indices, out, width)``."""

    def row_gather(x, indices, out, width):
        row = cuda.blockIdx.x
        source = indices[row]
        column = cuda.threadIdx.x
        while column < width:
            out[row * width + column] = x[source * width + column]
            column += THREADS

    return Kernel(
        name="row_gather",
        body=row_gather,
        signature=(pointer(float32), pointer(int32), pointer(float32), int32),
        block=THREADS,
        registers_at_most=32,
        blocks_per_sm=12,
    )


def launch_dims(num_rows: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Grid and block for ``num_rows`` rows of ``out``."""
    return (num_rows, 1, 1), (THREADS, 1, 1)
