"""RMSNorm of the residual stream, with the residual addition before it in the same pass.

    hidden        [T, H]   float32   the residual stream
    branch        [T, H]   float32   what attention or the feed-forward part computed (variants with residual)
    branch_weight [H]      float32   of the norm that ``branch`` passes first (residual "norm_add": Gemma)
    weight        [H]      float32
    out           [T, H]   dtype

    residual   what the kernel does
    none       out = norm(hidden, weight)
    add        hidden += branch;                        out = norm(hidden, weight)
    norm_add   hidden += norm(branch, branch_weight);   out = norm(hidden, weight)

with ``norm(x, w) = x / sqrt(mean(x^2) + eps) * w`` (Zhang and Sennrich, 2019).

One block of 256 threads a row. Thread ``i`` owns the columns ``i, i + 256, ...`` in every pass, so what it
wrote to ``hidden`` it can read again without a barrier; only the sum of squares is shared::

    column    0  1  2 ... 255 | 256 257 ...
    thread    0  1  2 ... 255 |   0   1 ...     -> partial sums -> block_sum -> one scale for all
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
def inverse_rms(x, first, width, eps, shared):
    """``1 / sqrt(mean(x[first : first + width]^2) + eps)``, in every thread of the block."""
    squares = float32(0)
    column = cuda.threadIdx.x
    while column < width:
        value = x[first + column]
        squares += value * value
        column += THREADS
    return float32(1) / math.sqrt(block_sum(squares, shared, WARPS) / float32(width) + eps)


@cache
def build(dtype: str = "float32", residual: str = "none") -> Kernel:
    """``rms_norm(hidden, [branch, [branch_weight,]] weight, out, width, eps)``."""
    store = storer(dtype)

    def rms_norm(hidden, weight, out, width, eps):
        shared = cuda.shared.array(WARPS, float32)
        first = cuda.blockIdx.x * width
        scale = inverse_rms(hidden, first, width, eps, shared)
        column = cuda.threadIdx.x
        while column < width:
            out[first + column] = store(hidden[first + column] * scale * weight[column])
            column += THREADS

    def add_rms_norm(hidden, branch, weight, out, width, eps):
        shared = cuda.shared.array(WARPS, float32)
        first = cuda.blockIdx.x * width
        column = cuda.threadIdx.x
        while column < width:
            hidden[first + column] += branch[first + column]
            column += THREADS
        scale = inverse_rms(hidden, first, width, eps, shared)
        column = cuda.threadIdx.x
        while column < width:
            out[first + column] = store(hidden[first + column] * scale * weight[column])
            column += THREADS

    def norm_add_rms_norm(hidden, branch, branch_weight, weight, out, width, eps):
        shared = cuda.shared.array(WARPS, float32)
        first = cuda.blockIdx.x * width
        branch_scale = inverse_rms(branch, first, width, eps, shared)
        column = cuda.threadIdx.x
        while column < width:
            hidden[first + column] += branch[first + column] * branch_scale * branch_weight[column]
            column += THREADS
        scale = inverse_rms(hidden, first, width, eps, shared)
        column = cuda.threadIdx.x
        while column < width:
            out[first + column] = store(hidden[first + column] * scale * weight[column])
            column += THREADS

    floats = pointer(float32)
    body, inputs = {
        "none": (rms_norm, 2),
        "add": (add_rms_norm, 3),
        "norm_add": (norm_add_rms_norm, 4),
    }[residual]
    return Kernel(
        name="rms_norm",
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
