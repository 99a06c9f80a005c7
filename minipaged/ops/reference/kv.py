"""Writes to the KV cache: new tokens, and copies of blocks."""

from __future__ import annotations

import numpy as np


def write_kv(
    k: np.ndarray, v: np.ndarray, k_cache: np.ndarray, v_cache: np.ndarray, slot_mapping: np.ndarray
) -> None:
    """See :meth:`Ops.write_kv <minipaged.ops.interface.Ops.write_kv>`."""
    blocks, offsets = np.divmod(slot_mapping, k_cache.shape[1])
    k_cache[blocks, offsets] = k
    v_cache[blocks, offsets] = v


def copy_blocks(cache: np.ndarray, pairs: list[tuple[int, int]]) -> None:
    """Copy whole blocks of ``cache [layers, num_blocks, ...]``, all sources read before any write."""
    sources, destinations = zip(*pairs, strict=True)
    cache[:, list(destinations)] = cache[:, list(sources)]  # fancy indexing reads into a copy first
