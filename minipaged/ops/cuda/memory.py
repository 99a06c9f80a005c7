"""How much of a device's memory a model takes, known before anything is allocated."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cuda_kernels.dtypes import BYTES
from cuda_kernels.product_plain import GROUP
from minipaged.errors import OutOfDeviceMemoryError

from .asks import max_words
from .buffers import shapes
from .device import Device
from .inputs import InputSizes, max_tiles

MAX_LOGITS_ROWS = 256
"""Rows of logits that are computed, and asks about them that are answered, at once; a step that wants more
(``prompt_logprobs``) takes several turns."""


@dataclass(frozen=True)
class Needs:
    """A model that will run on the device, and its largest step: ``max_blocks`` is that of one sequence."""

    config: object
    weight_format: str
    activation: str
    max_num_tokens: int
    max_blocks: int

    @property
    def weights(self) -> int:
        """Bytes of its weights."""
        return weight_bytes(self.config, self.weight_format, self.activation)

    @property
    def buffers(self) -> int:
        """Bytes that a step takes."""
        inputs = input_sizes(self.config, self.max_num_tokens, self.max_blocks).nbytes
        return buffer_bytes(self.config, self.activation, self.max_num_tokens) + inputs


def left_for_kv_cache(device: Device, models: list[Needs], reserved: int = 0) -> int:
    """Bytes that the weights and buffers of all models, and what is ``reserved``, leave of what is free now.

    Raises :class:`~minipaged.errors.OutOfDeviceMemoryError` if nothing is left.
    """
    free, total = device.memory()
    left = free - reserved - sum(model.weights + model.buffers for model in models)
    if left <= 0:
        taken = " and ".join(
            f"{model.config.architecture} in {model.weight_format} takes {model.weights:,} bytes and a step of "
            f"{model.max_num_tokens} tokens {model.buffers:,}"
            for model in models
        )
        raise OutOfDeviceMemoryError(
            f"{taken}, but only {free:,} of the {total:,} bytes of {device.name} are free; use quantization='int8' "
            "or 'int4', a smaller model, or lower max_num_batched_tokens."
        )
    return left


def num_logits(max_num_tokens: int) -> int:
    """Rows of logits that are computed at once by a model that takes so many tokens a step."""
    return min(max_num_tokens, MAX_LOGITS_ROWS)


def input_sizes(config, max_num_tokens: int, max_blocks: int) -> InputSizes:
    """Sizes of the memory of a step's inputs."""
    tiles = max_tiles(config, max_num_tokens)
    return InputSizes(max_num_tokens, tiles, max_blocks, num_logits(max_num_tokens), max_words(config.vocab_size))


def buffer_bytes(config, activation: str, max_num_tokens: int) -> int:
    """Bytes of :class:`~minipaged.ops.cuda.buffers.Buffers`."""
    made = shapes(config, activation, max_num_tokens, num_logits(max_num_tokens))
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
