"""How much of a device's memory a model takes, known before anything is allocated."""

from __future__ import annotations

import math

from cuda_kernels.dtypes import BYTES
from cuda_kernels.product_plain import GROUP
from minipaged.errors import OutOfDeviceMemoryError

from .buffers import shapes
from .device import Device
from .inputs import input_bytes, max_tiles

MAX_LOGITS_ROWS = 256
"""Rows of logits that are computed at once; a step that wants more (``prompt_logprobs``) takes several turns."""


def left_for_kv_cache(
    device: Device, config, weight_format: str, activation: str, max_num_tokens: int, max_blocks: int
) -> int:
    """Bytes that weights and buffers leave of what is free now.

    Raises :class:`~minipaged.errors.OutOfDeviceMemoryError` if nothing is left.
    """
    free, total = device.memory()
    weights = weight_bytes(config, weight_format, activation)
    inputs = input_bytes(max_num_tokens, max_tiles(config, max_num_tokens), max_blocks)
    buffers = buffer_bytes(config, activation, max_num_tokens) + inputs
    left = free - weights - buffers
    if left <= 0:
        raise OutOfDeviceMemoryError(
            f"{config.architecture} in {weight_format} takes {weights:,} bytes and a step of {max_num_tokens} tokens "
            f"{buffers:,}, but only {free:,} of the {total:,} bytes of {device.name} are free; use quantization='int8' "
            "or 'int4', a smaller model, or lower max_num_batched_tokens."
        )
    return left


def buffer_bytes(config, activation: str, max_num_tokens: int) -> int:
    """Bytes of :class:`~minipaged.ops.cuda.buffers.Buffers`."""
    made = shapes(config, activation, max_num_tokens, min(max_num_tokens, MAX_LOGITS_ROWS))
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in made.values())


def weight_bytes(config, weight_format: str, activation: str) -> int:
    """Bytes of the weights of a model with these features, vectors left out (they are few)."""
    heads = config.num_heads * config.head_dim
    kv_heads = config.num_kv_heads * config.head_dim
    halves = 3 if config.gated else 2  # of the feed-forward part: gate, up and down
    total = 0
    for layer in config.layers:
        inner, count = config.intermediate_size, 1
        if layer.moe:
            inner, count = config.moe_intermediate_size, config.num_experts
            total += 4 * count * config.hidden_size
        values = config.hidden_size * (2 * heads + 2 * kv_heads + halves * inner * count)
        total += matrix_bytes(values, weight_format)
    table = config.vocab_size * config.hidden_size
    head_format = "int8" if weight_format == "int4" else weight_format
    total += matrix_bytes(table, head_format)
    if not config.tie_word_embeddings or head_format != activation:
        total += matrix_bytes(table, activation)
    if config.learned_positions:
        total += matrix_bytes(config.max_position_embeddings * config.hidden_size, activation)
    return total


def matrix_bytes(num_values: int, weight_format: str) -> int:
    """Bytes of so many values, scales of int4 groups included (those of int8 rows are few)."""
    if weight_format == "int4":
        return num_values // 2 + 2 * num_values // GROUP
    return num_values * BYTES[weight_format]
