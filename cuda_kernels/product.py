"""The product of activations and a weight on tensor cores, for one token and for thousands.

    x        [M, K]       float16 or bfloat16; K a multiple of 8
    weight   fragments of float16, bfloat16 (as x), int8 or int4, drawn in :mod:`~cuda_kernels.packing`
    scales   int8: [N] float32; int4: [N/32][K/32][32] float16
    bias     [N]          float32, variant ``bias`` only
    out      [M, N]       float32, float16 or bfloat16;  out = x weight^T (+ bias), ``add``: out += it
             [M, N / 2]   with ``gated``: act(gate) * up, rows in the order of ``packing.interleave_gated``;
                          bias and int8 scales in the same order

Other K, float32, and bfloat16 on sm_75 are served by :mod:`~cuda_kernels.product_plain`; the arguments, also
those of a mixture of experts, are the same. A pointer that a variant does not use may be any address.

The weight is the left factor of ``mma``: a fragment is 16 of its rows, so that 8 tokens are enough to fill the
right one. A block computes ``row_tiles`` x 16 columns of ``out`` for ``token_tiles`` x 8 tokens, and its four
warps share K, 32 columns in turn::

    k          0 .. 31 | 32 .. 63 | 64 .. 95 | 96 .. 127 | 128 .. 159 | ...
    warp           0   |     1    |     2    |      3    |      0     | ...

    one chunk of 32 columns in one warp (small fragments: up to four chunks in each turn of its loop):
      weight   global memory --(128 bits a lane, fragments)--> registers, one turn ahead
      x        global memory --(cp.async 16 bytes a lane)--> shared memory, two turns ahead
               shared memory --(ldmatrix.x4)--> the fragments of 8 tokens and 32 columns
      mma      columns 0..15, then 16..31, onto the same sums

    row r of x in shared memory:   piece 0 | piece 1 | piece 2 | piece 3     16 bytes each
      piece p lies at p ^ (r / 2 % 4), so the 8 rows of a matrix lie in 8 different groups of 4 banks

At the end the warps' sums are added in shared memory: warp 0's, then warp 1's, 2's and 3's. So an output is a
sum in one order, whatever M and the tiles are.

int8 and int4 become float16 or bfloat16 in registers, which holds them exactly; the scale multiplies sums:
int8 the last one, int4 that of each chunk.

On sm_75 there is no ``cp.async``, so x travels through registers, and ``mma`` is m16n8k8, twice.
"""

from __future__ import annotations

from functools import cache

from numba import cuda

from cuda_kernels.activation import ACTIVATIONS
from cuda_kernels.dtypes import ELEMENTS, storer
from cuda_kernels.intrinsics import (
    bits_to_f32,
    cp_async16_zfill,
    cp_async_commit,
    cp_async_wait0,
    cp_async_wait1,
    f32_to_bits,
    fma_f32,
    ldg128,
    ldmatrix_x4,
    lds32,
    mma_m16n8k8_f16,
    mma_m16n8k16_bf16,
    mma_m16n8k16_f16,
    sts32,
    sts128,
)
from cuda_kernels.kernel import Kernel, float32, int32, pointer, uint8, uint16, uint32
from cuda_kernels.packing import PANEL
from cuda_kernels.weight_fragments import fragment_reader

WARP = 32
WARPS = 4
CHUNK = 32  # columns of K that a warp takes at once
ROW_WORDS = CHUNK // 2  # 32-bit words of a chunk of one row of x
BLOCKS = 256  # about two for each multiprocessor of a large card
STAGES = 3  # turns' chunks of x in shared memory: one turn's in use, two on their way
WORDS_AHEAD = 32  # registers of a lane for the weight's next chunks, where few tokens leave room


@cache
def build(
    x: str = "float16",
    weight: str = "float16",
    out: str = "float32",
    *,
    cc: tuple[int, int] = (8, 0),
    row_tiles: int = 2,
    token_tiles: int = 1,
    bias: bool = False,
    add: bool = False,
    activation: str | None = None,
    gated: bool = False,
    experts: str | None = None,
) -> Kernel:
    """``product(x, weight, scales, bias, expert_starts, rows, out, num_tokens, num_outputs, width)``.

    ``num_outputs`` counts the columns of ``out``. ``cc``: of the card. ``row_tiles`` is 2, 4 or 8. ``experts``:
    see :mod:`~cuda_kernels.product_plain`; each expert's rows are padded by themselves.
    """
    reads = fragment_reader(weight, x, row_tiles)
    read, fragment, chunk_scale = reads.read, reads.fragment, reads.chunk_scale
    words = reads.words
    asynchronous = tuple(cc) >= (8, 0)
    mma = mma_m16n8k16_bf16 if x == "bfloat16" else mma_m16n8k16_f16
    store, with_bias, adds = storer(out), bias, add
    scaled, scaled_chunks = weight == "int8", weight == "int4"
    activated, grouped, gathers = activation is not None, experts is not None, experts == "gather"
    act = ACTIVATIONS[activation or "silu"]
    rows, tokens = 16 * row_tiles, 8 * token_tiles  # of a block's tile
    columns = rows // 2 if gated else rows
    halves = 2 if gated else 1
    pitch = rows + 4  # of the tile of sums: 4 lanes' tokens lie 8 banks apart
    depth = max(1, min(4, WORDS_AHEAD // words)) if token_tiles == 1 else 1
    words_ahead = depth * words
    stage_words = depth * tokens * ROW_WORDS
    shared_words = max(WARPS * STAGES * stage_words, tokens * pitch)
    num_sums = row_tiles * token_tiles * 4
    turn = depth * WARPS  # chunks that the block takes in one turn of its loop

    @cuda.jit(device=True)
    def copy_x(x, source, width, chunk, shared, stage):
        """Start copying a turn's chunks of the rows of x that begin at ``source``; what lies outside becomes zero."""
        lane = cuda.threadIdx.x % WARP
        row, piece = lane // 4, lane % 4
        for d in range(depth):
            column = (chunk + d * WARPS) * CHUNK + piece * 8
            place = stage * stage_words + (d * tokens + row) * ROW_WORDS + (piece ^ (row // 2 % 4)) * 4
            for j in range(token_tiles):
                inside = source[j] >= 0 and column < width
                index = int32(source[j] + column) if inside else int32(0)
                at = place + j * 8 * ROW_WORDS
                if asynchronous:
                    cp_async16_zfill(shared, at, x, index, uint32(16) if inside else uint32(0))
                else:
                    p0, p1, p2, p3 = uint32(0), uint32(0), uint32(0), uint32(0)
                    if inside:
                        p0, p1, p2, p3 = ldg128(x, index)
                    sts128(shared, at, p0, p1, p2, p3)

    @cuda.jit(device=True)
    def read_weight(weight, scales, tile, last, chunk, chunks, a):
        for d in range(depth):
            if chunk + d * WARPS < chunks:
                read(weight, scales, tile, last, chunk + d * WARPS, chunks, a, d * words)

    @cuda.jit(device=True)
    def multiply(a, start, step, m, b0, b1, c, at):
        """Add one fragment of the weight times one of x to ``c[at .. at + 3]``."""
        a0, a1, a2, a3 = fragment(a, start, m, step)
        if asynchronous:
            d0, d1, d2, d3 = mma(a0, a1, a2, a3, b0, b1, c[at], c[at + 1], c[at + 2], c[at + 3])
        else:
            d0, d1, d2, d3 = mma_m16n8k8_f16(a0, a1, b0, c[at], c[at + 1], c[at + 2], c[at + 3])
            d0, d1, d2, d3 = mma_m16n8k8_f16(a2, a3, b1, d0, d1, d2, d3)
        c[at], c[at + 1], c[at + 2], c[at + 3] = d0, d1, d2, d3

    @cuda.jit(device=True)
    def multiply_chunk(a, start, shared, x_rows, sums):
        lane = cuda.threadIdx.x % WARP
        row, piece = lane % 8, lane // 8
        place = (x_rows + row) * ROW_WORDS + (piece ^ (row // 2 % 4)) * 4
        for n in range(token_tiles):
            b0, b1, b2, b3 = ldmatrix_x4(shared, place + n * 8 * ROW_WORDS)
            for m in range(row_tiles):
                at = (m * token_tiles + n) * 4
                if scaled_chunks:
                    part = cuda.local.array(4, float32)
                    for i in range(4):
                        part[i] = float32(0)
                    multiply(a, start, 0, m, b0, b1, part, 0)
                    multiply(a, start, 1, m, b2, b3, part, 0)
                    low, high = chunk_scale(a, start, m)
                    sums[at] = fma_f32(low, part[0], sums[at])
                    sums[at + 1] = fma_f32(low, part[1], sums[at + 1])
                    sums[at + 2] = fma_f32(high, part[2], sums[at + 2])
                    sums[at + 3] = fma_f32(high, part[3], sums[at + 3])
                else:
                    multiply(a, start, 0, m, b0, b1, sums, at)
                    multiply(a, start, 1, m, b2, b3, sums, at)

    @cuda.jit(device=True)
    def add_to_tile(shared, place, value, first):
        if not first:
            value += bits_to_f32(lds32(shared, place))
        sts32(shared, place, f32_to_bits(value))

    @cuda.jit(device=True)
    def add_warps(sums, shared):
        """Leave the four warps' sums, added in order, in shared memory as ``[token][row]``."""
        lane, warp = cuda.threadIdx.x % WARP, cuda.threadIdx.x // WARP
        row, token = lane // 4, lane % 4 * 2
        for turn in range(WARPS):
            if warp == turn:
                for m in range(row_tiles):
                    for n in range(token_tiles):
                        at = (m * token_tiles + n) * 4
                        place = (n * 8 + token) * pitch + m * 16 + row
                        add_to_tile(shared, place, sums[at], turn == 0)
                        add_to_tile(shared, place + pitch, sums[at + 1], turn == 0)
                        add_to_tile(shared, place + 8, sums[at + 2], turn == 0)
                        add_to_tile(shared, place + pitch + 8, sums[at + 3], turn == 0)
            cuda.syncthreads()

    @cuda.jit(device=True)
    def finished(shared, place, scales, bias, row):
        value = bits_to_f32(lds32(shared, place))
        if scaled:
            value *= scales[row]
        if with_bias:
            value += bias[row]
        return value

    def product(x, weight, scales, bias, expert_starts, rows_of_x, out, num_tokens, num_outputs, width):
        shared = cuda.shared.array(shared_words, uint32, alignment=16)
        warp, lane = cuda.threadIdx.x // WARP, cuda.threadIdx.x % WARP
        chunks = (width + CHUNK - 1) // CHUNK
        first, end = cuda.blockIdx.y * tokens, num_tokens
        tile = cuda.blockIdx.x * row_tiles
        first_row = tile * 16
        panels = (num_outputs * halves + PANEL - 1) // PANEL
        last = panels - 1
        if grouped:
            expert = cuda.blockIdx.z
            first, end = first + expert_starts[expert], expert_starts[expert + 1]
            last += expert * panels
            first_row += expert * panels * PANEL
            tile += expert * panels * (PANEL // 16)
        if first >= end:
            return
        source = cuda.local.array(token_tiles, int32)
        for j in range(token_tiles):
            token = first + j * 8 + lane // 4
            source[j] = -1
            if token < end:
                source[j] = (rows_of_x[token] if gathers else token) * width
        sums = cuda.local.array(num_sums, float32)
        for i in range(num_sums):
            sums[i] = float32(0)

        a, ahead = cuda.local.array(words_ahead, uint32), cuda.local.array(words_ahead, uint32)
        read_weight(weight, scales, tile, last, warp, chunks, ahead)
        own = warp * STAGES
        for stage in range(STAGES - 1):
            copy_x(x, source, width, warp + stage * turn, shared, own + stage)
            if asynchronous:
                cp_async_commit()
        stage, free = 0, STAGES - 1
        for number in range((chunks + turn - 1) // turn):
            chunk = number * turn + warp
            if asynchronous:
                cp_async_wait1()
            cuda.syncthreads()  # the stage's chunks have come, and the free stage has been read, by all lanes
            copy_x(x, source, width, chunk + (STAGES - 1) * turn, shared, own + free)
            if asynchronous:
                cp_async_commit()
            for i in range(words_ahead):
                a[i] = ahead[i]
            read_weight(weight, scales, tile, last, chunk + turn, chunks, ahead)
            for d in range(depth):
                if chunk + d * WARPS < chunks:
                    multiply_chunk(a, d * words, shared, ((own + stage) * depth + d) * tokens, sums)
            free = stage
            stage = stage + 1 if stage + 1 < STAGES else 0
        if asynchronous:
            cp_async_wait0()
        cuda.syncthreads()  # x is no longer needed: its memory is the sums' now
        add_warps(sums, shared)

        i = cuda.threadIdx.x
        while i < tokens * columns:
            token, column = i // columns, i % columns
            output = cuda.blockIdx.x * columns + column
            if first + token < end and output < num_outputs:
                row = (column // 16 * 32 + column % 16) if gated else column
                value = finished(shared, token * pitch + row, scales, bias, first_row + row)
                if activated:
                    value = act(value)
                if gated:
                    value *= finished(shared, token * pitch + row + 16, scales, bias, first_row + row + 16)
                index = (first + token) * num_outputs + output
                if adds:
                    value += out[index]
                out[index] = store(value)
            i += WARPS * WARP

    return Kernel(
        name="product",
        body=product,
        signature=(
            pointer(ELEMENTS[x]),
            pointer(uint8 if weight in ("int4", "int8") else ELEMENTS[weight]),
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
            "cc": 80 if asynchronous else 75,
            "row_tiles": row_tiles,
            "token_tiles": token_tiles,
            "bias": bias,
            "add": add,
            "activation": activation,
            "gated": gated,
            "experts": experts,
        },
        min_cc=(8, 0) if asynchronous else (7, 5),
        block=WARPS * WARP,
        registers_at_most=255,
        blocks_per_sm=2,
    )


def launch_dims(
    num_tokens: int, num_outputs: int, tiles: tuple[int, int], num_experts: int = 1, gated: bool = False
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Grid and block for ``num_tokens`` rows of x and ``num_outputs`` columns of ``out``.

    ``tiles``: row_tiles and token_tiles. An expert has at most ``num_tokens`` rows: no token goes to it twice.
    """
    columns, tokens = tiles[0] * (8 if gated else 16), tiles[1] * 8
    return (-(-num_outputs // columns), -(-num_tokens // tokens), num_experts), (WARPS * WARP, 1, 1)


def choose_tiles(num_tokens: int, num_outputs: int, weight: str) -> tuple[int, int]:
    """row_tiles and token_tiles; whichever are chosen, the result has the same bits.

    Few tokens: the weight's bytes decide, and each block reads x besides, so a block takes as many rows as leave
    ``BLOCKS`` blocks, whose loads hide each other's latency. Many tokens: a bigger tile loads less for each
    multiplication.
    """
    if num_tokens > 16:
        return 4, 4
    token_tiles = 1 if num_tokens <= 8 else 2
    largest = {"int4": 8, "int8": 4}.get(weight, 2)
    row_tiles = largest // token_tiles if token_tiles * 16 * BLOCKS * largest <= num_outputs else 2
    return max(2, row_tiles), token_tiles
