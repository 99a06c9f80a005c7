"""Mixture of experts: which experts a token goes to, and what comes back from them.

A token and one of its experts are an *assignment*, numbered ``token * k + j``. Sorted by expert they have
*slots*, so that every expert multiplies neighbouring rows::

    router product  ->  route  ->  sort  ->  product (gate_up, "gather")  ->  product (down, "slots")  ->  combine
    [T, E]              [T, k]     slots     [T k, I]                         [T k, H]                     [T, H]

    router_logits   [T, E]     float32
    expert_ids      [T, k]     int32     ascending in a row; the likeliest experts, the lower index wins a tie
    expert_weights  [T, k]     float32   their probabilities, ``normalize``: divided by their sum
    expert_starts   [E + 1]    int32     the first slot of each expert
    slots           [T, k]     int32     of each assignment; inside an expert in order of the assignments
    rows            [T k]      int32     the token of each slot
    y               [T k, H]   float32   what the experts returned, by slot
    out             [T, H]     float32   = sum over j of weight * y[slot], in the order of the experts' indices

A token's results depend on its own row alone: where its slots lie only says where rows are stored.

    route    one warp a token; lane ``l`` holds the experts l, l + 32, ...
    sort     one block; a warp counts one expert's assignments, 32 at a time
    combine  one block a token; neighbouring threads add neighbouring columns
"""

from __future__ import annotations

import math
from functools import cache

from numba import cuda

from cuda_kernels.argmax import warp_argmax
from cuda_kernels.intrinsics import fma_f32
from cuda_kernels.kernel import Kernel, float32, int32, pointer, uint32
from cuda_kernels.reductions import WARP
from cuda_kernels.warp import FULL, warp_max, warp_sum

ROUTE_WARPS = 4
SORT_THREADS = 512
COMBINE_THREADS = 128
TAKEN = -1.0  # less than any probability


@cache
def build_route(num_experts: int, per_token: int, normalize: bool) -> Kernel:
    """``moe_route(router_logits, expert_ids, expert_weights, num_tokens)``; ``per_token`` is at most 32."""
    per_lane = -(-num_experts // WARP)

    def moe_route(router_logits, expert_ids, expert_weights, num_tokens):
        token = cuda.blockIdx.x * ROUTE_WARPS + cuda.threadIdx.x // WARP
        lane = cuda.threadIdx.x % WARP
        if token >= num_tokens:
            return
        shares = cuda.local.array(per_lane, float32)
        largest = float32(-math.inf)
        for i in range(per_lane):
            expert = i * WARP + lane
            shares[i] = router_logits[token * num_experts + expert] if expert < num_experts else float32(-math.inf)
            largest = max(largest, shares[i])
        largest = warp_max(largest)
        total = float32(0)
        for i in range(per_lane):
            shares[i] = math.exp(shares[i] - largest)
            total += shares[i]
        total = warp_sum(total)
        for i in range(per_lane):
            shares[i] /= total

        mine, my_share = int32(num_experts), float32(0)  # lane j keeps the j-th choice
        for j in range(per_token):
            best, best_expert = float32(TAKEN), int32(num_experts)
            for i in range(per_lane):
                expert = i * WARP + lane
                if expert < num_experts and shares[i] > best:
                    best, best_expert = shares[i], int32(expert)
            best, best_expert = warp_argmax(best, best_expert)
            for i in range(per_lane):
                if i * WARP + lane == best_expert:
                    shares[i] = float32(TAKEN)
            if lane == j:
                mine, my_share = best_expert, best
        if normalize:
            my_share /= warp_sum(my_share)
        place = 0
        for j in range(per_token):
            if cuda.shfl_sync(FULL, mine, j) < mine:
                place += 1
        if lane < per_token:
            expert_ids[token * per_token + place] = mine
            expert_weights[token * per_token + place] = my_share

    return Kernel(
        name="moe_route",
        body=moe_route,
        signature=(pointer(float32), pointer(int32), pointer(float32), int32),
        variant={"experts": num_experts, "per_token": per_token, "normalize": normalize},
        block=ROUTE_WARPS * WARP,
        registers_at_most=64,
        blocks_per_sm=8,
    )


def route_dims(num_tokens: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Grid and block of ``moe_route``."""
    return (-(-num_tokens // ROUTE_WARPS), 1, 1), (ROUTE_WARPS * WARP, 1, 1)


@cache
def build_sort(num_experts: int, per_token: int) -> Kernel:
    """``moe_sort(expert_ids, expert_starts, slots, rows, num_tokens)``."""
    warps = SORT_THREADS // WARP

    def moe_sort(expert_ids, expert_starts, slots, rows, num_tokens):
        ends = cuda.shared.array(num_experts, int32)
        warp, lane = cuda.threadIdx.x // WARP, cuda.threadIdx.x % WARP
        count = num_tokens * per_token
        expert = warp
        while expert < num_experts:
            found, first = 0, 0
            while first < count:
                i = first + lane
                here = cuda.ballot_sync(FULL, i < count and expert_ids[min(i, count - 1)] == expert)
                found += cuda.popc(uint32(here))
                first += WARP
            if lane == 0:
                ends[expert] = found
            expert += warps
        cuda.syncthreads()
        if cuda.threadIdx.x == 0:
            total = int32(0)
            expert_starts[0] = total
            for e in range(num_experts):
                total += ends[e]
                ends[e] = total
                expert_starts[e + 1] = total
        cuda.syncthreads()
        before_me = uint32((1 << lane) - 1)
        expert = warp
        while expert < num_experts:
            slot, first = ends[expert - 1] if expert > 0 else int32(0), 0
            while first < count:
                i = first + lane
                mine = i < count and expert_ids[min(i, count - 1)] == expert
                here = uint32(cuda.ballot_sync(FULL, mine))
                if mine:
                    place = slot + cuda.popc(here & before_me)
                    slots[i] = place
                    rows[place] = i // per_token
                slot += cuda.popc(here)
                first += WARP
            expert += warps

    return Kernel(
        name="moe_sort",
        body=moe_sort,
        signature=(pointer(int32), pointer(int32), pointer(int32), pointer(int32), int32),
        variant={"experts": num_experts, "per_token": per_token},
        block=SORT_THREADS,
        registers_at_most=56,
        blocks_per_sm=1,
    )


def sort_dims() -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Grid and block of ``moe_sort``."""
    return (1, 1, 1), (SORT_THREADS, 1, 1)


@cache
def build_combine(per_token: int, add: bool) -> Kernel:
    """``moe_combine(y, slots, expert_weights, out, width)``; ``add``: onto what ``out`` holds."""

    def moe_combine(y, slots, expert_weights, out, width):
        token = cuda.blockIdx.x
        column = cuda.threadIdx.x
        while column < width:
            total = float32(0)
            for j in range(per_token):
                assignment = token * per_token + j
                total = fma_f32(expert_weights[assignment], y[slots[assignment] * width + column], total)
            if add:
                total += out[token * width + column]
            out[token * width + column] = total
            column += COMBINE_THREADS

    return Kernel(
        name="moe_combine",
        body=moe_combine,
        signature=(pointer(float32), pointer(int32), pointer(float32), pointer(float32), int32),
        variant={"per_token": per_token, "add": add},
        block=COMBINE_THREADS,
        registers_at_most=48,
        blocks_per_sm=10,
    )


def combine_dims(num_tokens: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Grid and block of ``moe_combine``."""
    return (num_tokens, 1, 1), (COMBINE_THREADS, 1, 1)
