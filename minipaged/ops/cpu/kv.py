"""The KV cache in the layout that attention on the CPU reads, and the writes to it.

A block of a layer holds ``[K of each kv_head | V of each kv_head]``. Inside a head's K, tokens come
last, 16 together: one vector load brings the same component of 16 keys, and scores need no sums
across lanes. V has the tokens first, each padded to whole groups of 16 components. The values of a word of
32 bits, components in K and tokens in V, are those that one instruction multiplies::

             float32                     bfloat16                          int8
    K  [block_size / 16] of:  [dim][16]  [dim / 2][16][2]                  [dim / 4][16][4]
    V  [block_size][padded]              [block_size / 2][padded][2]       [block_size / 4][padded][4]

Where ``block_size`` is below 16, K is one piece with ``block_size`` in the place of 16; where it is below the
values of a word, it takes their place in V.

``int8`` quantises each token's K and V of a head by one scale (its largest magnitude is 127), so a
token's KV never depends on its neighbours; the ``block_size`` float32 scales follow the values. K is stored
with 128 added (see :mod:`~minipaged.ops.cpu.attention_formats`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numba.core.ccallback import CFunc

from .compile_cache import c_function
from .elementwise import add, norm, rope
from .memory import bytes8, compiled, floats, ints32, ints64, part_of_caller, unsigned8, words16, words32
from .packing import round_up
from .pages import sparse_zeros
from .phases import PHASE_SIGNATURE, layer_at, linear_at, model_at

LAYOUT = 3  # raised with every change of the layout, or of how the numbers in it are rounded
TOKENS = 16  # keys side by side
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
TERMS = {"float32": 1, "bfloat16": 2, "int8": 4}  # values of a word of 32 bits


@dataclass(frozen=True)
class KVLayout:
    """Sizes, in bytes, of a block of one layer."""

    dtype: str
    block_size: int
    num_kv_heads: int
    head_dim: int

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]

    @property
    def padded_dim(self) -> int:
        """Components of a token's V."""
        return round_up(self.head_dim, 16)

    @property
    def k_bytes(self) -> int:
        """K of one head, scales included."""
        return self._part(round_up(self.head_dim, TERMS[self.dtype]))

    @property
    def v_bytes(self) -> int:
        """V of one head, scales included."""
        return self._part(self.padded_dim)

    @property
    def block_bytes(self) -> int:
        """One block of one layer."""
        return self.num_kv_heads * (self.k_bytes + self.v_bytes)

    def _part(self, dim: int) -> int:
        scales = 4 * self.block_size if self.dtype == "int8" else 0
        return round_up(self.block_size * dim * self.item_bytes, 4) + scales


class CpuKVCache:
    """K and V of ``num_blocks`` blocks in every layer, ``data [layer, block, byte]``.

    The operating system provides the memory page by page as blocks are first written.
    """

    def __init__(self, num_layers: int, num_blocks: int, layout: KVLayout):
        self.layout = layout
        self.num_blocks = num_blocks
        self.block_size = layout.block_size
        self.data = sparse_zeros((num_layers, num_blocks, layout.block_bytes), np.dtype(np.uint8))

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks, whether touched yet or not."""
        return self.data.nbytes

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        """Copy the content of block ``source`` to block ``destination``, for each pair, in every layer.

        All sources are read before any destination is written.
        """
        if pairs:
            sources, destinations = zip(*pairs, strict=True)
            self.data[:, list(destinations)] = self.data[:, list(sources)]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block: K and V in every layer."""
        return self.data.nbytes // self.num_blocks

    def read_blocks(self, block_ids: list[int]) -> np.ndarray:
        """A copy of the content of blocks, uint8 ``[len(block_ids), block_bytes]``."""
        content = np.moveaxis(self.data[:, block_ids], 1, 0)
        return np.ascontiguousarray(content).reshape(len(block_ids), -1)

    def write_blocks(self, block_ids: list[int], content: np.ndarray) -> None:
        """Fill blocks with what :meth:`read_blocks` returned, here or in a cache of the same layout."""
        layers = content.reshape(len(block_ids), len(self.data), -1)
        self.data[:, block_ids] = np.moveaxis(layers, 0, 1)


@compiled
def _to_bfloat16(bits):
    """float32 bits rounded to the nearest bfloat16, ties to even; NaN stays NaN."""
    if bits & np.uint32(0x7FFFFFFF) > np.uint32(0x7F800000):
        return np.uint16(0x7FC0)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@compiled
def _quantisation_scale(x):
    """The scale that makes the largest magnitude of ``x`` 127; NaN if a value is NaN or infinite."""
    largest, poison = np.float32(0), np.float32(0)
    for i in range(len(x)):
        largest = max(largest, abs(x[i]))
        poison += x[i] * np.float32(0)
    return largest / np.float32(127) + poison


@compiled
def _quantise(value, inverse):
    return np.int8(min(max(np.rint(value * inverse), np.float32(-127)), np.float32(127)))


@compiled
def bytes_of_key(head_dim, terms, item_bytes):
    """Bytes of a token's K in one head: whole words."""
    return (head_dim + terms - 1) // terms * terms * item_bytes


def _build_write(dtype: str):
    """The function that stores one token's K and V of one head.

    ``write(k, v, dim, k_part, v_part, offset, width, padded_dim, k_scales, v_scales)``: float32
    rows ``k``, ``v`` of ``dim`` values go to token ``offset`` of the head's parts of a block;
    ``width`` keys lie side by side.
    """

    if dtype == "float32":

        @compiled
        def write_float32(k, v, dim, k_part, v_part, offset, width, padded_dim, k_scales, v_scales):
            first = offset // width * width * dim + offset % width
            source, target = floats(k, dim), floats(k_part + 4 * first, dim * width)
            for i in range(dim):
                target[i * width] = source[i]
            source, target = floats(v, dim), floats(v_part + 4 * offset * padded_dim, padded_dim)
            for i in range(dim):
                target[i] = source[i]
            for i in range(dim, padded_dim):
                target[i] = 0

        return write_float32

    if dtype == "bfloat16":

        @compiled
        def write_bfloat16(k, v, dim, k_part, v_part, offset, width, padded_dim, k_scales, v_scales):
            even_dim = (dim + 1) // 2 * 2
            first = offset // width * width * even_dim + 2 * (offset % width)
            source, target = words32(k, dim), words16(k_part + 2 * first, even_dim * width)
            for i in range(dim):
                target[i // 2 * 2 * width + i % 2] = _to_bfloat16(source[i])
            if dim % 2:
                target[dim // 2 * 2 * width + 1] = 0
            pair = min(width, 2)
            first = offset // pair * pair * padded_dim + offset % pair
            source, target = words32(v, dim), words16(v_part + 2 * first, pair * padded_dim)
            for i in range(dim):
                target[pair * i] = _to_bfloat16(source[i])
            for i in range(dim, padded_dim):
                target[pair * i] = 0

        return write_bfloat16

    @compiled
    def write_int8(k, v, dim, k_part, v_part, offset, width, padded_dim, k_scales, v_scales):
        whole_dim = (dim + 3) // 4 * 4
        first = offset // width * width * whole_dim + 4 * (offset % width)
        source, target = floats(k, dim), unsigned8(k_part + first, whole_dim * width)
        scale = _quantisation_scale(source)
        inverse = np.float32(1) / scale if scale > 0 else np.float32(0)
        for i in range(dim):
            target[i // 4 * 4 * width + i % 4] = np.int16(_quantise(source[i], inverse)) + 128
        floats(k_scales, offset + 1)[offset] = scale
        together = min(width, 4)
        first = offset // together * together * padded_dim + offset % together
        source, target = floats(v, dim), bytes8(v_part + first, together * padded_dim)
        scale = _quantisation_scale(source)
        inverse = np.float32(1) / scale if scale > 0 else np.float32(0)
        for i in range(dim):
            target[together * i] = _quantise(source[i], inverse)
        for i in range(dim, padded_dim):
            target[together * i] = 0
        floats(v_scales, offset + 1)[offset] = scale

    return write_int8


@part_of_caller
def _finish_heads(model, layer, linear, row):
    """Biases, norms and rope of one token's q, k and v."""
    qkv = model.qkv + row * model.qkv_stride
    if linear.bias:
        add(qkv, linear.bias, linear.num_outputs)
    rotation = 4 * ints32(model.positions, row + 1)[row] * layer.rotary_half
    dim = model.head_dim
    for head in range(model.num_heads + model.num_kv_heads):
        x = qkv + 4 * head * dim
        if model.qk_norm:
            is_query = head < model.num_heads
            weight = layer.q_norm if is_query else layer.k_norm
            norm(model, x, weight, layer.q_norm_bias if is_query else layer.k_norm_bias, x, dim)
        if layer.rotary_half:
            rope(x, layer.cos + rotation, layer.sin + rotation, layer.rotary_half)


@cache
def write_phase(dtype: str) -> CFunc:
    """The phase that finishes q, k and v of row ``index`` (bias, norms, rope) and stores k and v."""
    write, item_bytes, terms = _build_write(dtype), ITEM_BYTES[dtype], TERMS[dtype]

    @c_function(PHASE_SIGNATURE, f"write-{dtype}")
    def finish_and_write(model_address, layer_address, linears, row, thread, num_threads):
        model, layer = model_at(model_address), layer_at(layer_address)
        _finish_heads(model, layer, linear_at(linears, layer.qkv), row)
        dim, size = model.head_dim, model.block_size
        key_bytes = bytes_of_key(dim, terms, item_bytes)
        slot = ints64(model.slot_mapping, row + 1)[row]
        block = layer.cache + slot // size * model.block_bytes
        k = model.qkv + row * model.qkv_stride + 4 * model.num_heads * dim
        for head in range(model.num_kv_heads):
            k_part = block + head * model.k_bytes
            v_part = block + model.num_kv_heads * model.k_bytes + head * model.v_bytes
            write(
                k + 4 * head * dim,
                k + 4 * (model.num_kv_heads + head) * dim,
                dim,
                k_part,
                v_part,
                slot % size,
                min(size, TOKENS),
                model.padded_dim,
                k_part + size * key_bytes,
                v_part + size * model.padded_dim * item_bytes,
            )

    return finish_and_write
