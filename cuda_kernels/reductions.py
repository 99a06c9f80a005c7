"""The sum over a block's threads, always in the same order.

Each warp adds its 32 values, leaves the sum in shared memory, and then every warp adds these sums::

    warp 0   x0 x1 ... x31  -> s0 \\
    warp 1   ...            -> s1  |  shared [num_warps]  -> every warp: s0 + s1 + ... -> every thread
    ...                           /
"""

from __future__ import annotations

from numba import cuda

from cuda_kernels.kernel import float32
from cuda_kernels.warp import warp_sum

WARP = 32


@cuda.jit(device=True)
def block_sum(value, shared, num_warps):
    """The sum of a float32 over the block, in every thread.

    ``shared``: ``num_warps`` floats (at most 32), free again when the function returns.
    """
    thread = cuda.threadIdx.x
    lane = thread % WARP
    value = warp_sum(value)
    if lane == 0:
        shared[thread // WARP] = value
    cuda.syncthreads()
    partial = float32(0)
    if lane < num_warps:
        partial = shared[lane]
    cuda.syncthreads()
    return warp_sum(partial)
