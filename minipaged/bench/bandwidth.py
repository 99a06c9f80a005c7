"""How fast this machine reads memory: the floor under decoding, which must read all weights."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

ARRAY_BYTES = 512 << 20  # beyond any cache
PASSES = 5


def read_bandwidth(num_threads: int, array_bytes: int = ARRAY_BYTES, passes: int = PASSES) -> float:
    """Bytes a second that ``num_threads`` threads read together: the best of several passes over one
    large array, each thread taking the maximum of its own part (NumPy releases the GIL for that)."""
    # Written once, or the pages would all be the operating system's single page of zeros.
    array = np.ones(array_bytes // 8, np.int64)
    parts = np.array_split(array, num_threads)
    best = float("inf")
    with ThreadPoolExecutor(num_threads) as pool:
        for _ in range(passes):
            started = time.perf_counter()
            list(pool.map(np.max, parts))
            best = min(best, time.perf_counter() - started)
    return array.nbytes / best
