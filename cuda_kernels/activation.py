"""The pointwise part of the feed-forward network, and the soft cap of logits.

    gate_up    [T, 2 I]   float32   gated: the gate's half first   -> out[t, i] = act(gate_up[t, i]) * gate_up[t, I + i]
    x          [T, I]     float32   otherwise                      -> out[t, i] = act(x[t, i])
    out        [T, I]     dtype

``act`` is ``silu``, ``gelu`` (exact, erf) or ``gelu_tanh``. One thread a value; a block takes 256
neighbouring columns of one row::

    grid (T, ceil(I / 256))        block (t, c): columns 256 c to 256 c + 255 of row t
"""

from __future__ import annotations

import math
from functools import cache

from numba import cuda

from cuda_kernels.dtypes import ELEMENTS, storer
from cuda_kernels.kernel import Kernel, float32, int32, pointer

THREADS = 256


@cuda.jit(device=True)
def silu(x):
    """``x * sigmoid(x)``; exp overflows to infinity below -88, which gives the right 0."""
    return x / (float32(1) + math.exp(-x))


@cuda.jit(device=True)
def gelu(x):
    """``x`` times the normal distribution function (Hendrycks and Gimpel, 2016)."""
    return float32(0.5) * x * (float32(1) + math.erf(x * float32(0.7071067811865476)))


@cuda.jit(device=True)
def gelu_tanh(x):
    """The tanh approximation of gelu, which GPT-2 and Gemma were trained with."""
    inner = float32(0.7978845608028654) * x * (float32(1) + float32(0.044715) * x * x)
    return float32(0.5) * x * (float32(1) + math.tanh(inner))


ACTIVATIONS = {"silu": silu, "gelu": gelu, "gelu_tanh": gelu_tanh}


@cache
def build(activation: str, gated: bool, dtype: str = "float32") -> Kernel:
    """``activation(x, out, width)`` with ``width`` the columns of ``out``."""
    act, store = ACTIVATIONS[activation], storer(dtype)

    def gated_activation(x, out, width):
        row = cuda.blockIdx.x
        column = cuda.blockIdx.y * THREADS + cuda.threadIdx.x
        if column < width:
            gate = row * width * 2 + column
            out[row * width + column] = store(act(x[gate]) * x[gate + width])

    def plain_activation(x, out, width):
        row = cuda.blockIdx.x
        column = cuda.blockIdx.y * THREADS + cuda.threadIdx.x
        if column < width:
            out[row * width + column] = store(act(x[row * width + column]))

    return Kernel(
        name="activation",
        body=gated_activation if gated else plain_activation,
        signature=(pointer(float32), pointer(ELEMENTS[dtype]), int32),
        variant={"activation": activation, "gated": gated, "dtype": dtype},
        block=THREADS,
        registers_at_most=40,
        blocks_per_sm=6,
    )


@cache
def build_soft_cap() -> Kernel:
    """``soft_cap(x, width, cap)``: ``x[row, :] = cap * tanh(x / cap)`` in place, float32, with the same grid."""

    def soft_cap(x, width, cap):
        row = cuda.blockIdx.x
        column = cuda.blockIdx.y * THREADS + cuda.threadIdx.x
        if column < width:
            i = row * width + column
            x[i] = cap * math.tanh(x[i] / cap)

    return Kernel(
        name="soft_cap",
        body=soft_cap,
        signature=(pointer(float32), int32, float32),
        block=THREADS,
        registers_at_most=40,
        blocks_per_sm=6,
    )


def launch_dims(num_rows: int, width: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Grid and block for an output of ``num_rows`` rows of ``width`` columns."""
    return (num_rows, -(-width // THREADS), 1), (THREADS, 1, 1)
