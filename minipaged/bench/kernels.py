"""Each kernel of a step on a CUDA device: its time, and how near it comes to what the card can move.

A kernel's launches of all layers are recorded one after the other and repeated, so that every layer's weights
come from memory as they do in a step, and the host's part is one launch. Bytes are those that must move: weights,
activations and KV once. The card's own figure is a copy by our block-copy kernel, in the same minute.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import numpy as np

from minipaged.engine import Engine
from minipaged.errors import ConfigError
from minipaged.ops.cuda.device import Call, Device, DeviceArray, argument_values
from minipaged.ops.cuda.kv import CudaKVCache, CudaKVLayout
from minipaged.ops.interface import Batch

BITS = {"float32": 32, "float16": 16, "bfloat16": 16, "int8": 8, "int4": 4.5}  # int4: with its scales
COPY_BYTES = 256 << 20
EMULATED_COPY_BYTES = 64 << 10


def measure(
    engine: Engine,
    batch_sizes: list[int],
    context: int,
    prompt_len: int,
    repetitions: int,
    progress: Callable[[str], None],
) -> dict:
    """Times of the kernels of decode steps (``batch_sizes`` sequences of ``context`` tokens) and of a prompt's.

    Raises :class:`ConfigError` if the engine is not on a CUDA device, or the steps do not fit it.
    """
    if engine.backend.name != "cuda":
        raise ConfigError(f"bench kernels measures a CUDA device; this engine is on {engine.backend.name!r}.")
    decoder = engine.runner.decoder
    device: Device = decoder.device
    steps = [("decode", size, 1, context) for size in batch_sizes] + [("prefill", 1, prompt_len, prompt_len)]
    for _, size, length, total in steps:
        _check_fit(engine, size, length, total)
    repeats = 1 if device.emulated else repetitions
    bandwidth = _copy_bandwidth(device, repeats)
    rows = []
    for kind, size, length, total in steps:
        progress(f"{kind}, {size} x {length} tokens, context {total}")
        calls = decoder.plan_step(_batch(engine, size, length, total))
        rows += [
            {"step": kind, "batch_size": size, "tokens": size * length, "context": total, **row}
            for row in _time_kernels(device, calls, _Sizes(engine, size, length, total), repeats)
        ]
    for row in rows:
        row["share_of_copy"] = row["bytes_per_second"] / bandwidth
    return {
        "device": device.name,
        "compute_capability": ".".join(map(str, device.compute_capability)),
        "emulated": device.emulated,
        "copy_bytes_per_second": bandwidth,
        "kernels": rows,
    }


def text(result: dict) -> str:
    """The table of ``bench kernels``."""
    from minipaged.cli.terminal import table

    head = f"device  {result['device']}, copies at {result['copy_bytes_per_second'] / 1e9:.1f} GB/s\n"
    if result["emulated"]:
        head += "EMULATED: these are times of the PTX interpreter and say nothing about any card\n"
    rows = [
        [
            f"{row['step']} {row['batch_size']}",
            row["kernel"],
            str(row["launches"]),
            f"{1e6 * row['seconds']:.1f}",
            f"{row['bytes_per_second'] / 1e9:.1f}",
            f"{100 * row['share_of_copy']:.0f}%",
            f"{row['operations_per_second'] / 1e12:.2f}",
        ]
        for row in result["kernels"]
    ]
    return head + table(["step", "kernel", "launches", "us each", "GB/s", "of copy", "TFLOP/s"], rows)


class _Sizes:
    """What the bytes of a step follow from."""

    def __init__(self, engine: Engine, batch_size: int, length: int, context: int):
        self.config, self.formats = engine.model.config, engine.formats
        self.rows, self.context = batch_size * length, context
        # A token sees the tokens before it: a prompt's see half of it on average.
        self.keys_seen = self.rows * (context if length == 1 else context / 2)
        self.keys_read = batch_size * context

    def work(self, call: Call) -> tuple[float, float]:
        """Bytes that a launch must move, and its arithmetic operations."""
        c, act, kv = self.config, BITS[self.formats.activations] / 8, BITS[self.formats.kv_cache] / 8
        kernel, values = call.kernel, argument_values(call)
        variant, width = kernel.variant, values.get("width", 0)
        if kernel.name.startswith("product"):
            rows, outputs = values["num_tokens"], values["num_outputs"]
            weights = outputs * (2 if variant["gated"] else 1) * width
            moved = weights * BITS[variant["weight"]] / 8 + rows * width * BITS[variant["x"]] / 8
            moved += rows * outputs * BITS[variant["out"]] / 8 * (2 if variant["add"] else 1)
            return moved, 2 * rows * weights
        if kernel.name.startswith("attention"):
            read = self.keys_read * 2 * c.num_kv_heads * c.head_dim * kv
            moved = read + 2 * self.rows * c.num_heads * c.head_dim * act
            return moved, 4 * self.keys_seen * c.num_heads * c.head_dim
        if kernel.name == "rope_kv":
            heads = c.num_heads + 2 * c.num_kv_heads
            return self.rows * c.head_dim * (4 * heads + act * c.num_heads + kv * 2 * c.num_kv_heads), 0
        if kernel.name == "sample":
            return values["num_draws"] * values["vocab_size"] * 4, 0
        rows = call.grid[0]
        added = 0 if variant.get("residual", "none") == "none" else 8
        return rows * width * (4 + act + added), 0


def _time_kernels(device: Device, calls: list[Call], sizes: _Sizes, repeats: int) -> list[dict]:
    groups: dict[tuple, list[Call]] = {}
    for call in calls:
        groups.setdefault((call.kernel.entry, call.grid, _shape(call)), []).append(call)
    device.run(calls)  # compiles, and leaves every buffer written
    device.synchronize()
    found = []
    for group in groups.values():
        seconds = _seconds(device, group, repeats) / len(group)
        moved, operations = (sum(part) / len(group) for part in zip(*map(sizes.work, group), strict=True))
        kernel = group[0].kernel
        found.append(
            {
                "kernel": kernel.name + _shape(group[0]),
                "entry": kernel.entry,
                "launches": len(group),
                "seconds": seconds,
                "bytes": moved,
                "operations": operations,
                "bytes_per_second": moved / seconds,
                "operations_per_second": operations / seconds,
            }
        )
    return found


def _shape(call: Call) -> str:
    values = argument_values(call)
    return f" {values['num_outputs']} x {values['width']}" if "num_outputs" in values else ""


def _seconds(device: Device, calls: list[Call], repeats: int) -> float:
    """Median time of ``calls`` in a row, on the device."""
    recording = device.record(list(calls) * repeats)
    launch = recording.launch if recording is not None else lambda: device.run(list(calls) * repeats)
    times = []
    for _ in range(1 if device.emulated else 6):
        device.synchronize()
        begin = time.perf_counter()
        launch()
        device.synchronize()
        times.append((time.perf_counter() - begin) / repeats)
    return statistics.median(times[1:] or times)  # the first one finds clocks and caches unprepared


def _copy_bandwidth(device: Device, repeats: int) -> float:
    """Bytes a second, read and written, of a large copy."""
    half = (EMULATED_COPY_BYTES if device.emulated else COPY_BYTES) // 2
    block_bytes = 16 << 10
    layout = CudaKVLayout("float32", 16, 1, block_bytes // 64)
    cache = CudaKVCache(device, 1, half // block_bytes, layout)
    count = cache.num_blocks // 2
    pairs = np.stack([np.arange(count), np.arange(count) + count], axis=1).astype(np.int32)
    table = DeviceArray.from_host(device, pairs)
    seconds = _seconds(device, cache.copy_calls(table.address, count), repeats)
    table.free()
    cache.free()
    return 2 * 2 * count * layout.values_bytes / seconds


def _check_fit(engine: Engine, size: int, length: int, context: int) -> None:
    needed = size * math.ceil(context / engine.config.block_size)
    limits = (
        ("tokens of the step", size * length, engine.config.max_num_batched_tokens, "max_num_batched_tokens"),
        ("context", context, engine.max_model_len, "max_model_len"),
        ("blocks", needed, engine.runner.kv_cache.num_blocks, "num_blocks"),
    )
    for what, value, limit, option in limits:
        if value > limit:
            raise ConfigError(f"the {what} would be {value}, but {option} is {limit}; raise it or measure less.")


def _batch(engine: Engine, size: int, length: int, context: int) -> Batch:
    """``size`` sequences of ``context`` tokens, of which the last ``length`` are computed."""
    block_size = engine.config.block_size
    per_sequence = math.ceil(context / block_size)
    tables = np.arange(size * per_sequence, dtype=np.int32).reshape(size, per_sequence)
    positions = np.tile(np.arange(context - length, context, dtype=np.int32), size)
    sequence = np.repeat(np.arange(size), length)
    return Batch(
        input_ids=np.arange(size * length, dtype=np.int32) % engine.model.config.vocab_size,
        positions=positions,
        slot_mapping=tables[sequence, positions // block_size].astype(np.int64) * block_size + positions % block_size,
        query_start_loc=np.arange(size + 1, dtype=np.int32) * length,
        context_lens=np.full(size, context, np.int32),
        block_tables=tables,
        logits_indices=np.arange(size, dtype=np.int32) * length + length - 1,
    )
