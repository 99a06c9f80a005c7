"""The product of activations and a weight, to be read first; it serves float32, and any width.

    x        [M, K]        dtype ``x``
    weight   [N, K]        float32, float16, bfloat16 or int8; int4: [N, ceil(K / 32) * 16] bytes
    scales   [N]           float32, int8 weights only: weight = scale * q
             [N, ceil(K / 32)]  float16, int4 weights only: weight = scale * (q - 8)
    bias     [N]           float32, variant ``bias`` only
    out      [M, N]        float32, float16 or bfloat16;  out = x weight^T (+ bias), ``add``: out += it
             [M, N / 2]    with ``gated``: act(first half of the columns) * second half

Byte ``i`` of a row of int4 weights holds ``q`` of columns 2i (low nibble) and 2i + 1. A pointer that a
variant does not use may be any address.

One warp computes one column of ``out`` for ``tokens`` rows. Its lanes walk along K side by side, so each
load of the weight is one row of 32 neighbouring values, and at the end they add what they have::

    k            0    1   ...  31 | 32   33  ...  63 | 64 ...
    lane         0    1   ...  31 |  0    1  ...  31 |  0 ...      sum over lanes by butterfly

So an output is a sum in one order, whatever M and ``tokens`` are: its bits depend on its own row alone.
``tokens`` only says how many rows share a load of the weight.

``experts`` makes it the product of a mixture of experts, whose weights lie one after the other: [E, N, K].
The third dimension of the grid counts experts; expert ``e`` computes the rows ``expert_starts[e]`` to
``expert_starts[e + 1]`` of ``out`` from the rows of x that ``rows`` names ("gather") or that have the same
numbers ("slots").
"""

from __future__ import annotations

from functools import cache

from numba import cuda

from cuda_kernels.activation import ACTIVATIONS
from cuda_kernels.dtypes import ELEMENTS, loader, storer
from cuda_kernels.intrinsics import fma_f32, half_to_f32
from cuda_kernels.kernel import Kernel, float32, int32, pointer, uint8, uint16
from cuda_kernels.reductions import WARP
from cuda_kernels.warp import warp_sum

WARPS = 4  # of a block: that many columns
GROUP = 32  # columns of an int4 weight that share a scale


@cache
def weight_reader(format: str):
    """``read(weight, scales, row, k, width)``: one value, without an int8 row's scale."""
    if format != "int4":
        load = loader(format)

        @cuda.jit(device=True)
        def read(weight, scales, row, k, width):
            return load(weight[row * width + k])

        return read

    @cuda.jit(device=True)
    def read_int4(weight, scales, row, k, width):
        groups = (width + GROUP - 1) // GROUP
        byte = weight[row * groups * (GROUP // 2) + k // 2]
        q = (byte >> 4) if k % 2 else (byte & 15)
        return half_to_f32(scales[row * groups + k // GROUP]) * (float32(q) - float32(8))

    return read_int4


@cache
def build(
    x: str = "float32",
    weight: str = "float32",
    out: str = "float32",
    *,
    tokens: int = 1,
    bias: bool = False,
    add: bool = False,
    activation: str | None = None,
    gated: bool = False,
    experts: str | None = None,
) -> Kernel:
    """``product(x, weight, scales, bias, expert_starts, rows, out, num_tokens, num_outputs, width)``.

    ``num_outputs`` counts the columns of ``out``: with ``gated`` the weight has twice as many rows.
    """
    load, read, store = loader(x), weight_reader(weight), storer(out)
    scaled, with_bias, adds = weight == "int8", bias, add
    activated = activation is not None
    act = ACTIVATIONS[activation or "silu"]
    grouped, gathers = experts is not None, experts == "gather"
    halves = 2 if gated else 1

    @cuda.jit(device=True)
    def multiply(x, weight, scales, bias, row, source, width, results):
        """``results[j]``: row ``row`` of the weight times row ``source[j]`` of x; the same in every lane."""
        for j in range(tokens):
            results[j] = float32(0)
        k = cuda.threadIdx.x % WARP
        while k < width:
            w = read(weight, scales, row, k, width)
            for j in range(tokens):
                results[j] = fma_f32(load(x[source[j] * width + k]), w, results[j])
            k += WARP
        for j in range(tokens):
            total = warp_sum(results[j])
            if scaled:
                total *= scales[row]
            if with_bias:
                total += bias[row]
            results[j] = total

    def product(x, weight, scales, bias, expert_starts, rows, out, num_tokens, num_outputs, width):
        column = cuda.blockIdx.x * WARPS + cuda.threadIdx.x // WARP
        first, end, weight_row = cuda.blockIdx.y * tokens, num_tokens, column
        if grouped:
            expert = cuda.blockIdx.z
            first, end = first + expert_starts[expert], expert_starts[expert + 1]
            weight_row += expert * num_outputs * halves
        if column >= num_outputs or first >= end:
            return
        source = cuda.local.array(tokens, int32)
        for j in range(tokens):
            row = min(first + j, end - 1)
            source[j] = rows[row] if gathers else row
        results = cuda.local.array(tokens, float32)
        multiply(x, weight, scales, bias, weight_row, source, width, results)
        if gated:
            ups = cuda.local.array(tokens, float32)
            multiply(x, weight, scales, bias, weight_row + num_outputs, source, width, ups)
        for j in range(tokens):
            row = first + j
            if cuda.threadIdx.x % WARP == j and row < end:
                value = results[j]
                if activated:
                    value = act(value)
                if gated:
                    value *= ups[j]
                if adds:
                    value += out[row * num_outputs + column]
                out[row * num_outputs + column] = store(value)

    return Kernel(
        name="product_plain",
        body=product,
        signature=(
            pointer(ELEMENTS[x]),
            pointer(uint8 if weight == "int4" else ELEMENTS[weight]),
            pointer(uint16 if weight == "int4" else float32),
            pointer(float32),
            pointer(int32),
            pointer(int32),
            pointer(ELEMENTS[out]),
            int32,
            int32,
            int32,
        ),
        variant={
            "x": x,
            "weight": weight,
            "out": out,
            "tokens": tokens,
            "bias": bias,
            "add": add,
            "activation": activation,
            "gated": gated,
            "experts": experts,
        },
        block=WARPS * WARP,
        registers_at_most=64,
        blocks_per_sm=8,
    )


def launch_dims(
    num_tokens: int, num_outputs: int, tokens: int, num_experts: int = 1
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Grid and block for ``num_tokens`` rows of x and ``num_outputs`` columns of ``out``.

    An expert has at most ``num_tokens`` rows, since no token goes to it twice.
    """
    return (-(-num_outputs // WARPS), -(-num_tokens // tokens), num_experts), (WARPS * WARP, 1, 1)
