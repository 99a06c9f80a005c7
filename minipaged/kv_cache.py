"""The physical memory behind the block tables: K and V of every layer, in blocks."""

from __future__ import annotations

import numpy as np

from minipaged.ops.reference.kv import copy_blocks


class KVCache:
    """K and V of ``num_blocks`` blocks, each an array ``[layer, block, offset, kv_head, head_dim]``.

    That is the logical order, which every index follows. In memory the heads come before the
    blocks: the tokens of one head in neighbouring blocks are then one matrix without gaps, which
    is worth a fifth of the time of attention.

    The operating system provides the memory page by page as blocks are first written, so an
    unused pool costs address space only. Freed blocks keep their old content until they are
    written again: readers go by ``context_lens``, never by what they find.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: str = "float32",
    ):
        self.num_blocks = num_blocks
        self.block_size = block_size
        shape = (num_layers, num_kv_heads, num_blocks, block_size, head_dim)
        self.k = np.zeros(shape, dtype).transpose(0, 2, 3, 1, 4)
        self.v = np.zeros(shape, dtype).transpose(0, 2, 3, 1, 4)

    @property
    def nbytes(self) -> int:
        """Bytes of K and V together, whether touched yet or not."""
        return self.k.nbytes + self.v.nbytes

    def layer(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Views of one layer's K and V, ``[num_blocks, block_size, num_kv_heads, head_dim]``."""
        return self.k[index], self.v[index]

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        """Copy the content of block ``source`` to block ``destination``, for each pair, in every layer.

        All sources are read before any destination is written.
        """
        if pairs:
            copy_blocks(self.k, pairs)
            copy_blocks(self.v, pairs)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block: K and V in every layer."""
        return self.nbytes // self.num_blocks

    def read_blocks(self, block_ids: list[int]) -> np.ndarray:
        """A copy of the content of blocks, uint8 ``[len(block_ids), block_bytes]``."""
        content = np.stack([cache[:, block_ids] for cache in (self.k, self.v)])
        return np.ascontiguousarray(np.moveaxis(content, 2, 0)).reshape(len(block_ids), -1).view(np.uint8)

    def write_blocks(self, block_ids: list[int], content: np.ndarray) -> None:
        """Fill blocks with what :meth:`read_blocks` returned, here or in a cache of the same layout."""
        layers, _, *block_shape = self.k.shape
        values = np.ascontiguousarray(content).view(self.k.dtype)
        values = values.reshape(len(block_ids), 2, layers, *block_shape)
        self.k[:, block_ids] = np.moveaxis(values[:, 0], 0, 1)
        self.v[:, block_ids] = np.moveaxis(values[:, 1], 0, 1)
