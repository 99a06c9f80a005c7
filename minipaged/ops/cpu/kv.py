"""The KV cache in the layout that attention on the CPU reads (written by :mod:`~minipaged.ops.cpu.kv_writes`).

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

import numpy as np

from .memory import compiled
from .packing import round_up
from .pages import sparse_zeros

LAYOUT = 4  # raised with every change of the layout, or of how the numbers in it are rounded
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
def bytes_of_key(head_dim, terms, item_bytes):
    """Bytes of a token's K in one head: whole words."""
    return (head_dim + terms - 1) // terms * terms * item_bytes
