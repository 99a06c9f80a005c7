"""One token for each row of logits: temperature, top_k, min_p, top_p and the draw, without sorting anything.

    raw         [L, V]   float32   the model's logits
    processed   [A, V]   float32   after bias, masks and penalties, row a for draw a, where it has any
    reals       [A, 3]   float64   temperature (0: greedy), top_p (1: off), min_p (0: off)
    integers    [A, 5]   int64     seed, position, top_k (0: off), the row of ``raw`` (-1: there is nothing to draw),
                                   whether to draw from ``processed``
    ids         [G, V]   int32     room to work in
    weights     [G, V]   float64   room to work in
    token       [A, 2]   int32     the token, or NOT_FINITE, ALL_MASKED, OVERFLOWED; the likeliest of the raw row

A block takes the draws b, b + G, ... . It keeps the candidates of one as a list in the order of their ids,
with weights exp((logit - largest) / temperature) in float64, and drops entries in place::

    512 entries at a time:   ids      3   9  12  40  41  77 ...       every thread says whether its entry stays,
                             stays    -   x   x   -   x   -           learns its place from the ballots of all
                             list     9  12  41                       warps, and writes it there

How far to drop is found by bisection on the bits of the numbers, which are ordered like the numbers: "how many
logits are at least x" finds the k-th largest, "how much do the weights of at least x weigh" the end of top_p.
Two shortcuts make the lists short first. The k-th largest of the threads' own maxima is a floor that k logits
reach. Entries below their even share of what top_p may leave out are never needed to reach it.

The draw is the first entry at which the weights' sum, in the order of ids, exceeds ``uniform`` times their
total: over chunks first, then inside of one. Semantics and ties are those of the host's sampler; sums are made
in another order, which moves a boundary by 1e-16 of the total.
"""

from __future__ import annotations

import math
from functools import cache

from numba import cuda

from cuda_kernels.argmax import INFINITY, NOT_FINITE, THREADS, WARPS, is_finite
from cuda_kernels.block import block_argmax, block_count, block_place, block_sum_f64, block_sum_i32
from cuda_kernels.intrinsics import f32_to_bits
from cuda_kernels.kernel import Kernel, float32, float64, int32, int64, pointer, uint32
from cuda_kernels.philox import uniform
from cuda_kernels.reductions import WARP
from cuda_kernels.warp import FULL

ALL_MASKED = -2
OVERFLOWED = -3
CHUNKS = 512  # of the draw, at most
CHUNK = 256  # entries of one, at least


@cuda.jit(device=True)
def ordered(x):
    """An integer, at least 0, that is ordered like the float32 ``x``."""
    bits = f32_to_bits(x)
    if bits >> uint32(31):
        return int64(~bits & uint32(0xFFFFFFFF))
    return int64(bits) + int64(0x80000000)


@cuda.jit(device=True)
def bits_of(weight):
    """An integer that is ordered like the float64 ``weight``, which is not negative."""
    return cuda.libdevice.double_as_longlong(weight)


@cuda.jit(device=True)
def likeliest(logits, offset, vocab_size, values, indices):
    """``(largest, its index, the thread's own largest, whether it met any not finite)``; NaN counts as infinity."""
    best, best_index, bad = float32(-INFINITY), int32(vocab_size), False
    i = int32(cuda.threadIdx.x)
    while i < vocab_size:
        value = logits[offset + i]
        if not is_finite(value):
            bad = True
        if value != value:
            value = float32(INFINITY)
        if value > best:
            best, best_index = value, int32(i)
        i += int32(THREADS)
    largest, index = block_argmax(best, best_index, values, indices)
    return largest, index, best, bad


@cuda.jit(device=True)
def kth_of_threads(own, k, counts):
    """The k-th largest of one number for each thread, ``ordered``."""
    low, high = int64(0), int64(1) << 32  # at least k reach low, fewer reach high
    while high - low > 1:
        middle = (low + high) // 2
        if block_count(own >= middle, counts) >= k:
            low = middle
        else:
            high = middle
    return low


@cuda.jit(device=True)
def kth_largest(logits, offset, ids, base, size, k, floor, counts):
    """The k-th largest logit of a list, ``ordered``; at least ``floor``."""
    low, high = floor, int64(1) << 32
    while high - low > 1:
        middle = (low + high) // 2
        reach = int32(0)
        i = cuda.threadIdx.x
        while i < size:
            if ordered(logits[offset + ids[base + i]]) >= middle:
                reach += int32(1)
            i += THREADS
        if block_sum_i32(reach, counts) >= k:
            low = middle
        else:
            high = middle
    return low


@cuda.jit(device=True)
def list_logits(logits, offset, vocab_size, floor, ids, base, counts):
    """Start a list: the ids whose logit reaches ``floor``; returns its size."""
    size = 0
    first = 0
    while first < vocab_size:
        i = first + cuda.threadIdx.x
        stays = i < vocab_size and ordered(logits[offset + min(i, vocab_size - 1)]) >= floor
        place, count = block_place(stays, counts)
        if stays:
            ids[base + size + place] = i
        size += count
        first += THREADS
    cuda.syncthreads()
    return size


@cuda.jit(device=True)
def list_weights(logits, offset, ids, base, size, kth, largest, temperature, min_p, weights, counts):
    """Keep the entries that reach ``kth`` and ``min_p``, and set their weights; returns how many stay."""
    kept = 0
    first = 0
    while first < size:
        i = first + cuda.threadIdx.x
        id, weight, stays = int32(0), float64(0), False
        if i < size:
            id = ids[base + i]
            logit = logits[offset + id]
            weight = math.exp((float64(logit) - float64(largest)) / temperature)
            stays = ordered(logit) >= kth and weight >= min_p
        place, count = block_place(stays, counts)
        if stays:
            ids[base + kept + place] = id
            weights[base + kept + place] = weight
        kept += count
        first += THREADS
    cuda.syncthreads()
    return kept


@cuda.jit(device=True)
def keep(ids, weights, base, size, smallest, last_tie, counts):
    """Keep weights above ``smallest`` (as bits), and those equal to it up to place ``last_tie``."""
    kept = 0
    first = 0
    while first < size:
        i = first + cuda.threadIdx.x
        id, weight, stays = int32(0), float64(0), False
        if i < size:
            id, weight = ids[base + i], weights[base + i]
            stays = bits_of(weight) > smallest or (bits_of(weight) == smallest and i <= last_tie)
        place, count = block_place(stays, counts)
        if stays:
            ids[base + kept + place] = id
            weights[base + kept + place] = weight
        kept += count
        first += THREADS
    cuda.syncthreads()
    return kept


@cuda.jit(device=True)
def mass(weights, base, size, smallest, sums):
    """The sum of the weights whose bits are at least ``smallest``."""
    total = float64(0)
    i = cuda.threadIdx.x
    while i < size:
        weight = weights[base + i]
        if bits_of(weight) >= smallest:
            total += weight
        i += THREADS
    return block_sum_f64(total, sums)


@cuda.jit(device=True)
def ties(weights, base, size, smallest, counts):
    """How many of the first ``size`` weights have exactly these bits."""
    equal = int32(0)
    i = cuda.threadIdx.x
    while i < size:
        if bits_of(weights[base + i]) == smallest:
            equal += int32(1)
        i += THREADS
    return block_sum_i32(equal, counts)


@cuda.jit(device=True)
def nucleus(ids, weights, base, size, top_p, sums, counts):
    """Keep the fewest heaviest entries that hold ``top_p`` of the weight, equal ones by id; returns how many."""
    total = mass(weights, base, size, int64(0), sums)
    size = keep(ids, weights, base, size, bits_of((1 - top_p) * total / size) - 1, size, counts)
    goal = top_p * total
    low, high = int64(0), bits_of(float64(1)) + 1  # weights that reach low hold the goal, as far as any do
    while high - low > 1:
        middle = (low + high) // 2
        if mass(weights, base, size, middle, sums) >= goal:
            low = middle
        else:
            high = middle
    above = mass(weights, base, size, low + 1, sums)
    equal = ties(weights, base, size, low, counts)
    last_tie = size
    wanted = max(1.0, math.ceil((goal - above) / cuda.libdevice.longlong_as_double(low)))
    if wanted < equal:  # the place of the last that is wanted
        below, last_tie = -1, size - 1
        while last_tie - below > 1:
            middle = (below + last_tie) // 2
            if ties(weights, base, middle + 1, low, counts) >= wanted:
                last_tie = middle
            else:
                below = middle
    return keep(ids, weights, base, size, low, last_tie, counts)


@cuda.jit(device=True)
def chunk_sums(weights, base, size, chunk, sums):
    """The sum of each chunk of weights into ``sums``; each by one warp."""
    lane = cuda.threadIdx.x % WARP
    number = cuda.threadIdx.x // WARP
    while number * chunk < size:
        total = float64(0)
        i = number * chunk + lane
        while i < min(size, (number + 1) * chunk):
            total += weights[base + i]
            i += WARP
        offset = 16
        while offset > 0:
            total += cuda.shfl_xor_sync(FULL, total, offset)
            offset //= 2
        if lane == 0:
            sums[number] = total
        number += WARPS
    cuda.syncthreads()


@cuda.jit(device=True)
def find_chunk(sums, size, chunk, u):
    """``(chunk, its sum's beginning, target)`` of the draw ``u``; by one thread."""
    total, number = float64(0), 0
    while number * chunk < size:
        total += sums[number]
        number += 1
    target = u * total
    # Rounding may lift the target to the total: then it belongs to the last chunk that has weight.
    chosen, before, after = 0, float64(0), sums[0]
    while after <= target and after < total:
        chosen += 1
        before, after = after, after + sums[chosen]
    return chosen, before, target


@cuda.jit(device=True)
def find_entry(weights, base, first, end, before, target):
    """The first entry from ``first`` on at which the sum exceeds ``target``, else the last with weight; by a warp."""
    lane = cuda.threadIdx.x % WARP
    last = first
    while first < end:
        i = first + lane
        weight = weights[base + i] if i < end else float64(0)
        total = weight
        offset = 1
        while offset < WARP:
            other = cuda.shfl_up_sync(FULL, total, offset)
            if lane >= offset:
                total += other
            offset *= 2
        beyond = uint32(cuda.ballot_sync(FULL, weight > 0 and before + total > target))
        if beyond:
            return first + int32(cuda.ffs(beyond)) - 1
        heavy = uint32(cuda.ballot_sync(FULL, weight > 0))
        if heavy:
            last = first + 31 - int32(cuda.clz(heavy))
        before += cuda.shfl_sync(FULL, total, WARP - 1)
        first += WARP
    return last


@cache
def build() -> Kernel:
    """``sample(raw, processed, reals, integers, ids, weights, token, num_draws, vocab_size)``."""

    def sample(raw, processed, reals, integers, ids, weights, token, num_draws, vocab_size):
        values, indices = cuda.shared.array(WARPS, float32), cuda.shared.array(WARPS, int32)
        counts, sums = cuda.shared.array(WARPS, int32), cuda.shared.array(CHUNKS, float64)
        base = cuda.blockIdx.x * vocab_size
        draw = cuda.blockIdx.x
        while draw < num_draws:
            row = int32(integers[draw * 5 + 3])
            if row < 0:
                draw += cuda.gridDim.x
                continue
            logits, offset = raw, row * vocab_size
            largest, choice, own, bad = likeliest(logits, offset, vocab_size, values, indices)
            finite = block_count(bad, counts) == 0
            if cuda.threadIdx.x == 0:
                token[draw * 2 + 1] = choice
            if integers[draw * 5 + 4]:
                logits, offset = processed, int32(draw) * vocab_size
                largest, choice, own, _ = likeliest(logits, offset, vocab_size, values, indices)
            if not finite:
                choice = int32(NOT_FINITE)
            elif largest == float32(-INFINITY):
                choice = int32(ALL_MASKED)
            elif largest == float32(INFINITY):
                choice = int32(OVERFLOWED)
            elif reals[draw * 3] > 0:
                top_k, floor, kth = int32(min(integers[draw * 5 + 2], vocab_size)), int64(0), int64(0)
                if 0 < top_k < vocab_size and top_k <= THREADS:
                    floor = kth_of_threads(ordered(own), top_k, counts)
                size = list_logits(logits, offset, vocab_size, floor, ids, base, counts)
                if 0 < top_k < vocab_size:
                    kth = kth_largest(logits, offset, ids, base, size, top_k, floor, counts)
                temperature, min_p = reals[draw * 3], reals[draw * 3 + 2]
                size = list_weights(logits, offset, ids, base, size, kth, largest, temperature, min_p, weights, counts)
                if reals[draw * 3 + 1] < 1:
                    size = nucleus(ids, weights, base, size, reals[draw * 3 + 1], sums, counts)
                chunk = max(CHUNK, (size + CHUNKS - 1) // CHUNKS)
                chunk_sums(weights, base, size, chunk, sums)
                if cuda.threadIdx.x < WARP:
                    u = uniform(integers[draw * 5], integers[draw * 5 + 1])
                    number, before, target = find_chunk(sums, size, chunk, u)
                    end = min(size, (number + 1) * chunk)
                    entry = find_entry(weights, base, number * chunk, end, before, target)
                    choice = ids[base + entry]
            if cuda.threadIdx.x == 0:
                token[draw * 2] = choice
            cuda.syncthreads()
            draw += cuda.gridDim.x

    return Kernel(
        name="sample",
        body=sample,
        signature=(
            pointer(float32),
            pointer(float32),
            pointer(float64),
            pointer(int64),
            pointer(int32),
            pointer(float64),
            pointer(int32),
            int32,
            int32,
        ),
        block=THREADS,
        registers_at_most=128,
        blocks_per_sm=1,
    )


def launch_dims(num_draws: int, num_lists: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Grid and block, with ``num_lists`` (G) rows of room to work in."""
    return (min(num_draws, num_lists), 1, 1), (THREADS, 1, 1)
