"""The memory that a step computes in: allocated once, for the largest step, at addresses that never change."""

from __future__ import annotations

import numpy as np

from cuda_kernels.dtypes import BYTES
from minipaged.ops.sampling import MAX_TOP

from .attention import workspace_floats
from .device import Device, DeviceArray

SAMPLED_AT_ONCE = 64
"""Draws that have room to work in at the same time."""


class Buffers:
    """Arrays by name (T: ``max_num_tokens``, A: dtype ``activation``)::

        hidden, output   [T, hidden_size] float32      normed    [T, hidden_size] A
        qkv              [T, heads, head_dim] float32  q, attended  [T, num_heads, head_dim] A
        inner            [T, intermediate_size] A      logits    [num_logits, vocab_size] float32
        processed        [num_logits, vocab_size] float32, of draws whose logits are edited
        list_ids, list_weights   [SAMPLED_AT_ONCE, vocab_size] int32, float64: room to draw in
        answers          bytes (sampling.py)
        last_hidden, last_output   the rows of hidden and output whose logits are wanted
        workspace        [floats] float32              what attention keeps between chunks

    and those of a mixture of experts (:mod:`cuda_kernels.moe`).
    """

    def __init__(self, device: Device, config, activation: str, max_num_tokens: int, num_logits: int):
        self._arrays: list[DeviceArray] = []
        for name, (shape, dtype) in shapes(config, activation, max_num_tokens, num_logits).items():
            array = DeviceArray(device, shape, dtype)
            self._arrays.append(array)
            setattr(self, name, array)

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(array.nbytes for array in self._arrays)

    def free(self) -> None:
        """Give the memory back."""
        for array in self._arrays:
            array.free()


def answer_fields(num_asks: int) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Type, shape and first byte of what the device answers to so many asks, in one piece of memory."""
    return {
        "logprobs": ("f8", (num_asks,), 0),
        "tokens": ("i4", (num_asks, 2), 8 * num_asks),
        "ranks": ("i4", (num_asks,), 16 * num_asks),
        "top": ("f8", (num_asks * MAX_TOP, 2), 24 * num_asks),  # last, so that only what is in use is fetched
    }


def answer_bytes(num_asks: int) -> int:
    """Bytes of all of them."""
    return (24 + 16 * MAX_TOP) * num_asks


def shapes(config, activation: str, tokens: int, num_logits: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of each buffer of a model with these features."""
    f4, i4, act = np.dtype("f4"), np.dtype("i4"), np.dtype(f"u{BYTES[activation]}")
    moe = any(layer.moe for layer in config.layers)
    dense = any(not layer.moe for layer in config.layers)
    slots = tokens * config.num_experts_per_tok
    inner = max(dense * tokens * config.intermediate_size, moe * slots * config.moe_intermediate_size)
    heads = config.num_heads + 2 * config.num_kv_heads
    hidden = (tokens, config.hidden_size)
    made = {
        "hidden": (hidden, f4),
        "output": (hidden, f4),
        "last_hidden": (hidden, f4),
        "last_output": (hidden, f4),
        "normed": (hidden, act),
        "qkv": ((tokens, heads, config.head_dim), f4),
        "q": ((tokens, config.num_heads, config.head_dim), act),
        "attended": ((tokens, config.num_heads, config.head_dim), act),
        "inner": ((inner,), act),
        "logits": ((num_logits, config.vocab_size), f4),
        "processed": ((num_logits, config.vocab_size), f4),
        "list_ids": ((min(num_logits, SAMPLED_AT_ONCE), config.vocab_size), i4),
        "list_weights": ((min(num_logits, SAMPLED_AT_ONCE), config.vocab_size), np.dtype("f8")),
        "answers": ((answer_bytes(num_logits),), np.dtype("u1")),
        "workspace": ((workspace_floats(config) if activation != "float32" else 1,), f4),
    }
    if moe:
        made |= {
            "router_logits": ((tokens, config.num_experts), f4),
            "expert_ids": ((slots,), i4),
            "expert_weights": ((slots,), f4),
            "expert_starts": ((config.num_experts + 1,), i4),
            "slots": ((slots,), i4),
            "slot_rows": ((slots,), i4),
            "expert_output": ((slots, config.hidden_size), f4),
        }
    return made
