"""What the sampling kernels do with a whole block of threads: sums, maxima and places in a list.

All are called by every thread of a block of ``argmax.THREADS``, with ``shared`` of ``argmax.WARPS`` elements, and
leave the same result in every thread. Sums have one fixed order.
"""

from __future__ import annotations

from numba import cuda

from cuda_kernels.argmax import WARPS, warp_argmax
from cuda_kernels.kernel import int32, uint32
from cuda_kernels.reductions import WARP
from cuda_kernels.warp import FULL


@cuda.jit(device=True)
def _sum_of_warps(value, shared):
    """The sum of one value of each warp, the warps in their order."""
    if cuda.threadIdx.x % WARP == 0:
        shared[cuda.threadIdx.x // WARP] = value
    cuda.syncthreads()
    total = shared[0]
    for warp in range(1, WARPS):
        total += shared[warp]
    cuda.syncthreads()
    return total


@cuda.jit(device=True)
def block_sum_f64(value, shared):
    """The sum of a float64: butterflies in the warps, then the warps in their order."""
    offset = 16
    while offset > 0:
        value += cuda.shfl_xor_sync(FULL, value, offset)
        offset //= 2
    return _sum_of_warps(value, shared)


@cuda.jit(device=True)
def block_count(condition, shared):
    """How many threads' ``condition`` holds."""
    count = int32(cuda.popc(uint32(cuda.ballot_sync(FULL, condition))))
    return _sum_of_warps(count, shared)


@cuda.jit(device=True)
def block_sum_i32(value, shared):
    """The sum of an int32."""
    offset = 16
    while offset > 0:
        value = int32(value + cuda.shfl_xor_sync(FULL, value, offset))
        offset //= 2
    return _sum_of_warps(value, shared)


@cuda.jit(device=True)
def block_place(condition, shared):
    """``(place, count)``: how many threads before this one have ``condition``, and how many of all."""
    lane, warp = cuda.threadIdx.x % WARP, cuda.threadIdx.x // WARP
    here = uint32(cuda.ballot_sync(FULL, condition))
    if lane == 0:
        shared[warp] = cuda.popc(here)
    cuda.syncthreads()
    place, count = int32(cuda.popc(here & uint32((1 << lane) - 1))), 0
    for other in range(WARPS):
        if other < warp:
            place += shared[other]
        count += shared[other]
    cuda.syncthreads()
    return place, count


@cuda.jit(device=True)
def block_max(value, shared):
    """The largest float32; no NaN."""
    offset = 16
    while offset > 0:
        value = max(value, cuda.shfl_xor_sync(FULL, value, offset))
        offset //= 2
    if cuda.threadIdx.x % WARP == 0:
        shared[cuda.threadIdx.x // WARP] = value
    cuda.syncthreads()
    value = shared[0]
    for warp in range(1, WARPS):
        value = max(value, shared[warp])
    cuda.syncthreads()
    return value


@cuda.jit(device=True)
def block_argmax(value, index, values, indices):
    """The largest float32 and its index, the lowest where several are equal; no NaN."""
    value, index = warp_argmax(value, index)
    if cuda.threadIdx.x % WARP == 0:
        values[cuda.threadIdx.x // WARP] = value
        indices[cuda.threadIdx.x // WARP] = index
    cuda.syncthreads()
    other = cuda.threadIdx.x % WARPS  # every group of so many lanes compares all of them
    value, index = warp_argmax(values[other], indices[other], WARPS)
    cuda.syncthreads()
    return value, index
