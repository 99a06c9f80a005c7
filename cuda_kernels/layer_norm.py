"""LayerNorm of the residual stream, with the residual addition before it in the same pass.

    hidden   [T, H]   float32   the residual stream
    branch   [T, H]   float32   what attention or the feed-forward part computed (residual "add")
    weight   [H]      float32
    bias     [H]      float32   zeros for a model without
    out      [T, H]   dtype

    residual "none":  out = norm(hidden)
    residual "add":   hidden += branch;   out = norm(hidden)

with ``norm(x) = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias`` (Ba et al., 2016). One block of 256
threads a row, drawn as in ``rms_norm.py``. The mean is taken first and the variance from centred values:
a difference of large sums would lose the small variance of a row with a large mean.
"""

from __future__ import annotations

import math
from functools import cache

from numba import cuda

from cuda_kernels.dtypes import ELEMENTS, storer
from cuda_kernels.kernel import Kernel, float32, int32, pointer
from cuda_kernels.reductions import block_sum

THREADS = 256
WARPS = THREADS // 32


@cuda.jit(device=True)
def mean(x, first, width, shared):
    """The mean of ``x[first : first + width]``, in every thread of the block."""
    total = float32(0)
    column = cuda.threadIdx.x
    while column < width:
        total += x[first + column]
        column += THREADS
    return block_sum(total, shared, WARPS) / float32(width)


@cuda.jit(device=True)
def inverse_deviation(x, first, width, centre, eps, shared):
    """``1 / sqrt(mean((x - centre)^2) + eps)`` of ``x[first : first + width]``, in every thread of the block."""
    squares = float32(0)
    column = cuda.threadIdx.x
    while column < width:
        value = x[first + column] - centre
        squares += value * value
        column += THREADS
    return float32(1) / math.sqrt(block_sum(squares, shared, WARPS) / float32(width) + eps)


@cache
def build(dtype: str = "float32", residual: str = "none") -> Kernel:
    """``layer_norm(hidden, [branch,] weight, bias, out, width, eps)``."""
    store = storer(dtype)

    def layer_norm(hidden, weight, bias, out, width, eps):
        shared = cuda.shared.array(WARPS, float32)
        first = cuda.blockIdx.x * width
        centre = mean(hidden, first, width, shared)
        scale = inverse_deviation(hidden, first, width, centre, eps, shared)
        column = cuda.threadIdx.x
        while column < width:
            value = (hidden[first + column] - centre) * scale
            out[first + column] = store(value * weight[column] + bias[column])
            column += THREADS

    def add_layer_norm(hidden, branch, weight, bias, out, width, eps):
        shared = cuda.shared.array(WARPS, float32)
        first = cuda.blockIdx.x * width
        column = cuda.threadIdx.x
        while column < width:
            hidden[first + column] += branch[first + column]
            column += THREADS
        centre = mean(hidden, first, width, shared)
        scale = inverse_deviation(hidden, first, width, centre, eps, shared)
        column = cuda.threadIdx.x
        while column < width:
            value = (hidden[first + column] - centre) * scale
            out[first + column] = store(value * weight[column] + bias[column])
            column += THREADS

    floats = pointer(float32)
    body, inputs = (layer_norm, 3) if residual == "none" else (add_layer_norm, 4)
    return Kernel(
        name="layer_norm",
        body=body,
        signature=(*[floats] * inputs, pointer(ELEMENTS[dtype]), int32, float32),
        variant={"dtype": dtype, "residual": residual},
        block=THREADS,
        registers_at_most=64,
        blocks_per_sm=4,
    )


def launch_dims(num_rows: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Grid and block for ``num_rows`` rows."""
    return (num_rows, 1, 1), (THREADS, 1, 1)
