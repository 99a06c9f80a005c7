"""A decode step of the cpu backend, taken apart: each operator's time beside its floor.

The floor of an operator is the larger of two times: reading its weights, or its KV, from memory, and
doing its arithmetic at the rate of the instruction it is made of. Bandwidth and rates are measured in
the same run. Norms, rope, activations and waiting for each other have no floor of their own: they are
the part of a step that could be hidden behind memory.

How the parts are timed: products by themselves, the same ones of all layers in order, with a barrier after
each, on the step's own weights and on copies of them, as many as no cache holds (in a step the other weights
come in between); attention as what a longer context adds to a step; Python as what surrounds the compiled
step. The rest is what remains. (It is too small, even negative, where the last cache keeps some of the weights
from one step to the next.)
"""

from __future__ import annotations

import ctypes
import random
import time

import numpy as np
from numba import njit

from minipaged.bench import roofline
from minipaged.bench.latency import check_fits, decode_steps, kv_bytes_per_token
from minipaged.bench.roofline import in_threads, peak_rate, read_bandwidth
from minipaged.bench.summary import median
from minipaged.cli.terminal import table
from minipaged.engine import Engine
from minipaged.errors import ConfigError
from minipaged.ops.cpu.linear import share
from minipaged.ops.cpu.packing import Arena, array_shape, padded_rows
from minipaged.ops.cpu.products import FORMATS, call_product, product_kernel
from minipaged.ops.cpu.team import BARRIER_BYTES, barrier

SHORT_CONTEXT = 16  # tokens of the step whose attention counts as nothing
_REPEATS = 9


def measure(engine: Engine, batch_sizes: list[int], context: int, num_steps: int = 24, progress=None) -> dict:
    """Time a decode step of each batch size at about ``context`` tokens, and its parts.

    Raises:
        ConfigError: the engine does not run on the cpu backend, its model is a mixture of experts (whose
            products depend on the tokens), or the context is too short or too long.
    """
    if engine.backend.name != "cpu":
        raise ConfigError(f"a step's roofline is made for device 'cpu'; this engine runs on {engine.backend.name!r}.")
    if engine.model.config.num_experts:
        raise ConfigError("which weights a mixture of experts reads depends on the tokens: it has no one floor.")
    if context < 4 * SHORT_CONTEXT:
        raise ConfigError(f"context is {context}; at least {4 * SHORT_CONTEXT} tokens are needed to time attention.")
    for batch_size in batch_sizes:
        check_fits(engine, context, num_steps, batch_size)
    decoder = engine.runner.decoder
    num_threads = decoder.team.num_threads
    products = decoder.products()
    formats = {product_kernel(format).product: format for format in FORMATS if _is_used(format, products)}
    rates = {format: peak_rate(format, num_threads) for format in {*formats.values(), "float32"}}
    steps = []
    for batch_size in batch_sizes:
        bandwidth = read_bandwidth(num_threads)
        operators = []
        for name, linears in products.items():
            nbytes = [_weight_bytes(formats[int(linear["product"])], linear) for linear in linears]
            seconds = time_products(linears, nbytes, batch_size, num_threads)
            operations = 2 * batch_size * int((linears["num_inputs"] * linears["num_outputs"]).sum())
            floor = max(sum(nbytes) / bandwidth, operations / rates[formats[int(linears[0]["product"])]])
            operators.append({"name": name, "seconds": seconds, "floor": floor})
        _, short = _time_step(engine, SHORT_CONTEXT, num_steps, batch_size)
        whole, compiled = _time_step(engine, context, num_steps, batch_size)
        tokens = batch_size * (context + num_steps // 2)
        config = engine.model.config
        operations = 4 * tokens * config.num_layers * config.num_heads * config.head_dim
        floor = max(tokens * kv_bytes_per_token(engine) / bandwidth, operations / rates["float32"])
        operators.append({"name": "attention", "seconds": max(compiled - short, 0.0), "floor": floor})
        rest = compiled - sum(operator["seconds"] for operator in operators)
        operators.append({"name": "norms, rope, activations, waiting", "seconds": rest, "floor": None})
        operators.append({"name": "Python", "seconds": whole - compiled, "floor": None})
        floor = sum(operator["floor"] or 0 for operator in operators)
        steps.append(
            {"batch_size": batch_size, "bandwidth": bandwidth, "seconds": whole, "floor": floor, "operators": operators}
        )
        if progress:
            progress(f"batch {batch_size}: {floor / whole:.0%} of the sum of its floors")
    return {"num_threads": num_threads, "context": context, "rates": rates, "steps": steps}


def text(result: dict) -> str:
    """A table for each batch size."""
    parts = [
        f"a decode step at {result['context']} tokens of context, {result['num_threads']} threads; peaks: "
        + ", ".join(f"{name} {rate / 1e9:.0f} billion operations/s" for name, rate in sorted(result["rates"].items()))
    ]
    for step in result["steps"]:
        rows = [
            [
                operator["name"],
                f"{operator['seconds'] * 1e3:.2f}",
                f"{operator['seconds'] / step['seconds']:.0%}",
                f"{operator['floor'] * 1e3:.2f}" if operator["floor"] else "",
                f"{operator['floor'] / operator['seconds']:.0%}" if operator["floor"] and operator["seconds"] else "",
            ]
            for operator in step["operators"]
        ]
        whole = ["whole step", f"{step['seconds'] * 1e3:.2f}", "100%", f"{step['floor'] * 1e3:.2f}"]
        rows.append([*whole, f"{step['floor'] / step['seconds']:.0%}"])
        title = f"{step['batch_size']} sequence(s), memory read at {step['bandwidth'] / 1e9:.1f} GB/s"
        parts.append(
            title + "\n" + table(["operator", "ms", "of the step", "floor, ms", "floor / ms"], rows, right=(1, 2, 3, 4))
        )
    return "\n\n".join(parts)


def _is_used(format: str, products: dict[str, np.ndarray]) -> bool:
    address = product_kernel(format).product
    return any((linears["product"] == address).any() for linears in products.values())


def _weight_bytes(format: str, linear) -> int:
    shape, dtype = array_shape(format, int(linear["num_outputs"]), int(linear["num_inputs"]))
    return int(np.prod(shape)) * dtype.itemsize


@njit(nogil=True)
def _multiply_all(linears, x, out, out_stride, num_rows, thread, num_threads, barrier_address):
    for i in range(len(linears)):
        linear = linears[i]
        first, last = share(linear.num_panels, thread, num_threads)
        row_bytes = linear.row_bytes if linear.prepare else 4 * linear.num_inputs
        call_product(
            linear.product, x, row_bytes, linear.weight, linear.num_inputs, first, last, num_rows, out, out_stride, 0,
        )  # fmt: skip
        barrier(barrier_address, num_threads)


def time_products(linears: np.ndarray, nbytes: list[int], num_rows: int, num_threads: int) -> float:
    """Seconds of the products of ``linears`` (records of tables.LINEAR), one after the other, with inputs of zeros.

    ``nbytes``: of each one's weight. Weights are cold.
    """
    num_passes, arena = -(-roofline.COLD_BYTES // sum(nbytes)), Arena()
    passes, copies = [linears], []
    for _ in range(num_passes - 1):
        passes.append(linears.copy())
        for linear, size in zip(passes[-1], nbytes, strict=True):
            copies.append(arena((size,), np.dtype(np.uint8)))
            ctypes.memmove(copies[-1].ctypes.data, int(linear["weight"]), size)
            linear["weight"] = copies[-1].ctypes.data
    linears = np.concatenate(passes)
    row_bytes = max(int(linears["row_bytes"].max()), 4 * int(linears["num_inputs"].max()))
    x = np.zeros((num_rows + 1, row_bytes), np.uint8)
    out = np.zeros((num_rows + 1, padded_rows(int(linears["num_outputs"].max()))), np.float32)
    meeting = np.zeros(BARRIER_BYTES, np.uint8)

    def work(thread: int) -> None:
        _multiply_all(
            linears, x.ctypes.data, out.ctypes.data, out.strides[0], num_rows, thread, num_threads,
            meeting.ctypes.data,
        )  # fmt: skip

    return in_threads(num_threads, work, _REPEATS) / num_passes


def _time_step(engine: Engine, context: int, num_steps: int, batch_size: int) -> tuple[float, float]:
    """Median seconds of a decode step, and of the compiled part of it."""
    decoder, compiled = engine.runner.decoder, []
    run = decoder.team.run

    def timed() -> None:
        started = time.perf_counter()
        run()
        compiled.append(time.perf_counter() - started)

    whole, inside = [], []
    decoder.team.run = timed
    try:
        for _ in range(3):
            compiled.clear()
            whole += decode_steps(engine, context, num_steps, batch_size, random.Random(0))
            inside += compiled[-num_steps:]  # those before computed the prompts
    finally:
        del decoder.team.run
    return median(whole), median(inside)
