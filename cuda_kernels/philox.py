"""Philox4x32-10 on the device: the random number of a seed and a position, equal to the host's bit for bit.

Source: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011
(https://doi.org/10.1145/2063384.2063405). The key is the seed, the counter is the position, low words first.
"""

from __future__ import annotations

from numba import cuda

from cuda_kernels.intrinsics import mulhi_u32, mullo_u32
from cuda_kernels.kernel import float64, uint32

ROUNDS = 10


@cuda.jit(device=True)
def uniform(seed, position):
    """A float64 in [0, 1) with 53 random bits: of the words w, ``((w0 >> 5) * 2^26 + (w1 >> 6)) / 2^53``."""
    c0, c1, c2, c3 = uint32(position), uint32(position >> 32), uint32(0), uint32(0)
    k0, k1 = uint32(seed), uint32(seed >> 32)
    for _ in range(ROUNDS):
        high0, low0 = mulhi_u32(c0, uint32(0xD2511F53)), mullo_u32(c0, uint32(0xD2511F53))
        high1, low1 = mulhi_u32(c2, uint32(0xCD9E8D57)), mullo_u32(c2, uint32(0xCD9E8D57))
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = uint32(k0 + uint32(0x9E3779B9)), uint32(k1 + uint32(0xBB67AE85))
    return (float64(c0 >> uint32(5)) * 67108864.0 + float64(c1 >> uint32(6))) / 9007199254740992.0
