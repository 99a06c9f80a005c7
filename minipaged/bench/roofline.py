"""How fast products could be on this machine, and how fast they are.

The floor of a product is the larger of two times: reading the weights from memory, and doing the
arithmetic at the rate of the instruction that it is made of. Both rates are measured here, in the same
minute, because neither can be trusted from a data sheet: bandwidth is shared with neighbours, and
clocks move. Weights are cold: each product reads a copy that the caches have forgotten.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numba import njit

from minipaged.ops.cpu import features
from minipaged.ops.cpu.emit import Emitter, kernel
from minipaged.ops.cpu.memory import ints64
from minipaged.ops.cpu.packing import GROUPS, PANEL, PackedWeight, aligned_zeros, array_shape, padded_rows
from minipaged.ops.cpu.products import ProductKernel, call_prepare, call_product, product_kernel

COLD_BYTES = 192 << 20  # more than the last cache of the CPUs we know
_PEAK_ITERATIONS = 400_000


@dataclass(frozen=True)
class ProductTiming:
    """One product ``[M, K] x [K, N]`` with cold weights."""

    format: str
    M: int
    num_threads: int
    seconds: float  # of one product, the median
    operations: int  # two for each multiply-add
    floor_seconds: float

    @property
    def rate(self) -> float:
        """Operations a second."""
        return self.operations / self.seconds

    @property
    def percent_of_floor(self) -> float:
        return 100 * self.floor_seconds / self.seconds


def in_threads(num_threads: int, work: Callable[[int], None], repeats: int) -> float:
    """Median seconds of ``work(thread_index)``, started together in all threads, to the last one's end."""
    start = threading.Barrier(num_threads)
    spans: list[list[tuple[float, float]]] = [[] for _ in range(num_threads)]

    def run(index: int) -> None:
        work(index)  # caches, page tables and clocks
        for _ in range(repeats):
            start.wait()
            begin = time.perf_counter()
            work(index)
            spans[index].append((begin, time.perf_counter()))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    runs = zip(*spans, strict=True)
    return statistics.median(max(end for _, end in run) - min(begin for begin, _ in run) for run in runs)


# ---- the two rates

_UNROLL = 12  # independent chains: enough to hide the latency of any of these instructions


@kernel(2)
def _read_lines(e: Emitter, address, count):
    """Load ``count`` times 512 bytes."""
    vectors = 512 // e.isa.vector_bytes

    def body(i, totals):
        base = e.add(address, e.mul(i, 512))
        return [
            e.builder.or_(total, e.load(e.add(base, n * e.isa.vector_bytes), e.i32)) for n, total in enumerate(totals)
        ]

    totals = e.loop(count, [e.constant(e.i32, 0)] * vectors, body)
    while len(totals) > 1:
        totals = [e.builder.or_(a, b) for a, b in zip(totals[::2], totals[1::2], strict=True)]
    e.store(totals[0], address)  # the bytes are zeros: this keeps the loads alive, and changes nothing


def _steps(e: Emitter) -> dict[str, tuple[Callable, int]]:
    """For each format: one multiply-accumulate of a vector, and how many operations it is."""
    as_is = e.bitcast
    float_step = (lambda total, x: as_is(e.fma(as_is(x, e.f32), as_is(x, e.f32), as_is(total, e.f32)), e.i32), 2)
    pmaddwd = (lambda total, x: e.builder.add(total, e.dot_i16(as_is(x, e.i16), as_is(total, e.i16))), 4)
    steps = {"float32": float_step, "bfloat16": float_step, "int8": pmaddwd, "int4": pmaddwd}
    if e.isa.has_vnni:
        vnni = (lambda total, x: e.dot_accumulate_u8_i8(total, as_is(x, e.i8), as_is(x, e.i8)), 8)
        steps |= {"int8": vnni, "int4": vnni}
    elif e.isa.has_avx2:

        def pmaddubsw(total, x):
            product = e.dot_u8_i8_saturating(as_is(x, e.i8), as_is(total, e.i8))
            return as_is(e.builder.add(as_is(total, e.i16), product), e.i32)

        def and_pmaddwd(total, x):
            pairs = e.dot_u8_i8_saturating(as_is(x, e.i8), as_is(total, e.i8))
            return e.builder.add(total, e.dot_i16(pairs, e.constant(e.i16, 1)))

        steps |= {"int8": (and_pmaddwd, 8), "int4": (pmaddubsw, 8)}
    if e.isa.has_bf16_dot:
        dot = (lambda total, x: as_is(e.dot_accumulate_bf16(as_is(total, e.f32), x, x), e.i32), 4)
        steps["bfloat16"] = dot
    return steps


def _peak_function(format: str):
    @kernel(2)
    def chains(e: Emitter, count, memory):
        step, _ = _steps(e)[format]
        x = e.load(memory, e.i32)
        places = [e.add(memory, i * e.isa.vector_bytes) for i in range(_UNROLL)]
        totals = e.loop(
            count, [e.load(place, e.i32) for place in places], lambda _, totals: [step(total, x) for total in totals]
        )
        for place, total in zip(places, totals, strict=True):
            e.store(total, place)

    @njit(nogil=True)
    def run(count, memory):
        chains(count, memory)

    return run


def peak_rate(format: str, num_threads: int) -> float:
    """Operations a second of the instruction that products of ``format`` are made of, from registers."""
    run = _peak_function(format)
    memory = [np.zeros(4096, np.uint8) for _ in range(num_threads)]
    seconds = in_threads(num_threads, lambda i: run(_PEAK_ITERATIONS, memory[i].ctypes.data), 9)
    isa = features.current()
    operations = _steps(Emitter(None, isa))[format][1] * isa.lanes
    return num_threads * _PEAK_ITERATIONS * _UNROLL * operations / seconds


@njit(nogil=True)
def _read(address, count):
    _read_lines(address, count)


def read_bandwidth(num_threads: int) -> float:
    """Bytes a second that threads together read from memory, each a part of its own."""
    lines = COLD_BYTES // 512 // num_threads
    memory = np.zeros(COLD_BYTES, np.uint8)
    memory[::512] = 0  # a page that was never written is not in memory
    seconds = in_threads(num_threads, lambda i: _read(memory.ctypes.data + i * lines * 512, lines), 7)
    return num_threads * lines * 512 / seconds


# ---- products


@njit(nogil=True)
def _products(function, x, x_stride, weights, num_weights, K, panel0, panel1, M, out, out_stride):
    table = ints64(weights, num_weights)
    for i in range(num_weights):
        call_product(function, x, x_stride, table[i], K, panel0, panel1, M, out, out_stride, np.int64(0))


@njit(nogil=True)
def _prepare(function, x, x_stride, K, M, prepared, prepared_stride):
    call_prepare(function, x, x_stride, K, np.int64(0), M, prepared, prepared_stride)


def _random_weight(format: str, N: int, K: int, rng: np.random.Generator) -> PackedWeight:
    """A weight of small random values, without the work of quantising one."""
    packed = PackedWeight(format, N, K, aligned_zeros(*array_shape(format, N, K)))
    if format == "float32":
        packed.data[...] = rng.standard_normal(PANEL, np.float32)
    elif format == "bfloat16":
        packed.data[...] = rng.integers(0, 127, packed.data.shape[1:], np.uint16)
    else:
        packed.words[...] = rng.integers(0, 127, packed.words.shape[1:], np.uint8)
        packed.scale[...] = rng.standard_normal(PANEL, np.float32)
        if GROUPS[format].has_minimum:
            packed.minimum[...] = rng.standard_normal(PANEL, np.float32)
    return packed


def time_products(
    format: str,
    rows: Sequence[int] = (1, 2, 4, 8, 32, 64, 256),
    num_threads: int = 1,
    N: int = 1536,
    K: int = 576,
    repeats: int = 5,
) -> list[ProductTiming]:
    """Time ``format``'s product for each number of rows, and compare it with its floor."""
    function = product_kernel(format)
    rng = np.random.default_rng(0)
    weights = [_random_weight(format, N, K, rng)]
    weights += [_random_weight(format, N, K, rng) for _ in range(COLD_BYTES // weights[0].nbytes)]
    peak, bandwidth = peak_rate(format, num_threads), read_bandwidth(num_threads)
    timings = []
    for M in rows:
        some = weights if M <= 8 else weights[: max(8, len(weights) * 8 // M)]
        seconds = _time_product(function, some, M, N, K, num_threads, repeats, rng)
        operations = 2 * M * N * K
        floor = max(weights[0].nbytes / bandwidth, operations / peak)
        timings.append(ProductTiming(format, M, num_threads, seconds, operations, floor))
    return timings


def _time_product(
    function: ProductKernel,
    weights: list[PackedWeight],
    M: int,
    N: int,
    K: int,
    num_threads: int,
    repeats: int,
    rng: np.random.Generator,
) -> float:
    x = rng.standard_normal((M, K), np.float32)
    prepared, stride = x, x.strides[0]
    if function.prepare:
        stride = function.row_bytes(K)
        prepared = np.zeros((M, stride), np.uint8)
        _prepare(function.prepare, x.ctypes.data, x.strides[0], K, M, prepared.ctypes.data, stride)
    out = np.zeros((M, padded_rows(N)), np.float32)
    table = np.array([weight.address for weight in weights], np.int64)
    panels = weights[0].num_panels

    def work(i: int) -> None:
        first, last = panels * i // num_threads, panels * (i + 1) // num_threads
        _products(
            function.product,
            prepared.ctypes.data,
            stride,
            table.ctypes.data,
            len(weights),
            K,
            first,
            last,
            M,
            out.ctypes.data,
            out.strides[0],
        )

    return in_threads(num_threads, work, repeats) / len(weights)


def measure(formats: Sequence[str], rows: Sequence[int], num_threads: int) -> dict:
    """Memory bandwidth (bytes/s) and, for each format, the peak rate (operations/s) and every product."""
    return {
        "num_threads": num_threads,
        "level": features.current().level,
        "bandwidth": read_bandwidth(num_threads),
        "formats": {
            format: {
                "peak": peak_rate(format, num_threads),
                "products": [
                    {"rows": t.M, "rate": t.rate, "percent_of_floor": t.percent_of_floor}
                    for t in time_products(format, rows, num_threads)
                ],
            }
            for format in formats
        },
    }
