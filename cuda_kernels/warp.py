"""Sums and maxima over a warp, in one fixed order: after it every lane holds the same bits."""

from __future__ import annotations

from numba import cuda

FULL = 0xFFFFFFFF


@cuda.jit(device=True)
def warp_sum(value):
    """The sum of a float32 over the 32 lanes; partners 16, 8, 4, 2 and 1 apart are added in turn."""
    value += cuda.shfl_xor_sync(FULL, value, 16)
    value += cuda.shfl_xor_sync(FULL, value, 8)
    value += cuda.shfl_xor_sync(FULL, value, 4)
    value += cuda.shfl_xor_sync(FULL, value, 2)
    value += cuda.shfl_xor_sync(FULL, value, 1)
    return value


@cuda.jit(device=True)
def warp_max(value):
    """The largest float32 of the 32 lanes."""
    value = max(value, cuda.shfl_xor_sync(FULL, value, 16))
    value = max(value, cuda.shfl_xor_sync(FULL, value, 8))
    value = max(value, cuda.shfl_xor_sync(FULL, value, 4))
    value = max(value, cuda.shfl_xor_sync(FULL, value, 2))
    value = max(value, cuda.shfl_xor_sync(FULL, value, 1))
    return value
