"""Which attention kernels a step takes, and how its rows are cut into tiles for tensor cores.

float32, and what tensor cores do not multiply, goes to the plain kernel, a block for each row and head. The others
take *tiles*: (sequence, first row), where a row is one query head of one token, and the heads that share a KV head
stand side by side. A step that only decodes has small tiles and eight warps for each; with few sequences and long
contexts a block takes one chunk of 512 keys, and a second launch folds them (*split*). Any other step has tiles
of 64 rows. A row gets the same bits from all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cuda_kernels import attention_decode, attention_prefill
from cuda_kernels.attention_tile import CHUNK
from minipaged.ops.interface import Batch

TILES_AT_ONCE = 256
"""Tiles of a prefill launch; its workspace has room for so many."""
ENOUGH_BLOCKS = 256
"""About two for each multiprocessor of a large card: with so many sequences and heads nothing is split."""
MAX_HEAD_DIM = 256
"""Values of a head that the kernels have room for."""
MAX_SPLIT_BLOCKS = 4096
"""Blocks of a split launch; its workspace has room for so many."""


@dataclass(frozen=True)
class AttentionShape:
    """What a plan must know of a step's attention: ``kind`` is ``"plain"``, ``"prefill"`` or ``"decode"``;
    ``num_chunks`` is 0 where nothing is split."""

    kind: str
    num_tiles: int = 0
    num_chunks: int = 0


PLAIN = AttentionShape("plain")


def uses_tensor_cores(capability: tuple[int, int], activation: str, kv_dtype: str, head_dim: int) -> bool:
    """Whether the tile kernels serve these formats, and heads of this size, on such a card."""
    if activation == "float32" or (activation == "bfloat16" and capability < (8, 0)):
        return False
    return kv_dtype in (activation, "int8") and head_dim % 8 == 0


def workspace_floats(config) -> int:
    """float32 that the largest launch of each kind needs."""
    prefill = TILES_AT_ONCE * config.num_kv_heads * attention_prefill.TILE_ROWS * config.head_dim
    rows = attention_decode.tile_rows(config.num_heads, config.num_kv_heads)
    return max(prefill, MAX_SPLIT_BLOCKS * rows * (config.head_dim + 2))


def decode_shape(config, num_rows: int, longest_context: int) -> AttentionShape:
    """For a step of one token in each of ``num_rows`` sequences.

    Chunks are counted in powers of two, so that few graphs serve all contexts.
    """
    group = config.num_heads // config.num_kv_heads
    tiles = num_rows * -(-group // attention_decode.tile_rows(config.num_heads, config.num_kv_heads))
    needed = -(-longest_context // CHUNK)
    chunks = 1 << (needed - 1).bit_length() if needed > 1 else 0
    blocks = tiles * config.num_kv_heads
    if blocks >= ENOUGH_BLOCKS or blocks * chunks > MAX_SPLIT_BLOCKS:
        chunks = 0
    return AttentionShape("decode", tiles, chunks)


def make_tiles(config, batch: Batch, num_rows: int, decode: bool) -> np.ndarray:
    """int32 ``[n, 2]``: the tiles of a step's sequences; of ``num_rows`` when it only decodes, some of them padding."""
    group = config.num_heads // config.num_kv_heads
    if decode:
        size = attention_decode.tile_rows(config.num_heads, config.num_kv_heads)
        first = np.arange(0, group, size)
        return np.stack(np.meshgrid(np.arange(num_rows), first, indexing="ij"), axis=-1).reshape(-1, 2).astype(np.int32)
    counts = -(-np.diff(batch.query_start_loc) * group // attention_prefill.TILE_ROWS)
    sequence = np.repeat(np.arange(len(counts)), counts)
    number = np.arange(len(sequence)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.stack([sequence, number * attention_prefill.TILE_ROWS], axis=1).astype(np.int32)
