"""What the interpreter refuses to do, and the happens-before check on memory that threads share."""

from __future__ import annotations

import numpy as np


class KernelFault(Exception):
    """A kernel did what no kernel may do.

    ``kind`` is one of ``out of bounds``, ``misaligned``, ``never written``, ``race``, ``copy under way``,
    ``divergent barrier``, ``deadlock``, ``warp operation``, ``trap`` and ``runaway``. The text names the block, the
    thread, the memory and the PTX instruction.
    """

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind


class Clock:
    """Who comes before whom: threads of a block meet at ``bar.sync``, those of a warp at ``bar.warp.sync``.

    ``block_time`` and ``warp_time`` count these meetings for each thread. Warp shuffles and votes order no
    memory (PTX ISA, 9.7.9), so they do not count.
    """

    def __init__(self, num_threads: int, threads_per_block: int, first_thread: int) -> None:
        self.threads_per_block = threads_per_block
        self.thread = np.arange(first_thread, first_thread + num_threads, dtype=np.int32)  # in the whole grid
        self.block_time = np.zeros(num_threads, np.int32)
        self.warp_time = np.zeros(num_threads, np.int32)


class Shadow:
    """Last writer and last readers of each granule (1, 2, 4, 8 or 16 bytes) of a memory.

    Two accesses of one granule, at least one of them a write, must be ordered: by the same thread, by a barrier
    of the block between them, or by a barrier of the warp. Threads of different blocks are never ordered
    within a launch.
    """

    def __init__(self, num_bytes: int, shift: int) -> None:
        count = (num_bytes >> shift) + 1
        self.shift = shift
        self.writer = np.full(count, -1, np.int32)
        self.write_block_time = np.zeros(count, np.int32)
        self.write_warp_time = np.zeros(count, np.int32)
        self.first_reader = np.full(count, -1, np.int32)  # of those since the readers' last meeting
        self.last_reader = np.full(count, -1, np.int32)
        self.read_block_time = np.zeros(count, np.int32)
        self.read_warp_time = np.zeros(count, np.int32)
        self.copy_under_way = np.zeros(count, bool)

    def granules(self, offsets: np.ndarray, num_bytes: int) -> tuple[np.ndarray, int]:
        """All granules of accesses of ``num_bytes`` at ``offsets``, access after access, and how many each has."""
        count = max(1, num_bytes >> self.shift)
        granules = offsets >> self.shift
        if count > 1:
            granules = (granules[:, None] + np.arange(count)).reshape(-1)
        return granules, count

    def _unordered(self, clock, lanes, other, other_block_time, other_warp_time) -> np.ndarray:
        """Where ``other`` threads' accesses (-1: none) have no order with those of ``lanes`` now."""
        thread = clock.thread[lanes]
        meeting = (other_block_time == clock.block_time[lanes]) & (
            (other >> 5 != thread >> 5) | (other_warp_time == clock.warp_time[lanes])
        )
        block = clock.threads_per_block
        return (other >= 0) & (other != thread) & (meeting | (other // block != thread // block))

    def unordered_writer(self, clock: Clock, lanes: np.ndarray, at: np.ndarray) -> np.ndarray:
        return self._unordered(clock, lanes, self.writer[at], self.write_block_time[at], self.write_warp_time[at])

    def unordered_reader(self, clock: Clock, lanes: np.ndarray, at: np.ndarray) -> np.ndarray:
        times = self.read_block_time[at], self.read_warp_time[at]
        first = self._unordered(clock, lanes, self.first_reader[at], *times)
        return first | self._unordered(clock, lanes, self.last_reader[at], *times)

    def read(self, clock: Clock, lanes: np.ndarray, at: np.ndarray) -> None:
        """Remembers the reads; readers that a meeting has put in the past are forgotten first."""
        thread, block_time, warp_time = clock.thread[lanes], clock.block_time[lanes], clock.warp_time[lanes]
        first, last = self.first_reader[at], self.last_reader[at]
        block = clock.threads_per_block
        same_block = (first // block == thread // block) & (last // block == thread // block)
        same_warp = (first >> 5 == thread >> 5) & (last >> 5 == thread >> 5)
        past = same_block & (
            (self.read_block_time[at] != block_time) | (same_warp & (self.read_warp_time[at] != warp_time))
        )
        forget = at[past | (first < 0)]
        self.first_reader[forget] = np.iinfo(np.int32).max
        self.last_reader[forget] = -1
        np.minimum.at(self.first_reader, at, thread)
        np.maximum.at(self.last_reader, at, thread)
        self.read_block_time[at] = block_time
        self.read_warp_time[at] = warp_time

    def write(self, clock: Clock, lanes: np.ndarray, at: np.ndarray) -> np.ndarray:
        """Remembers the writes. Returns where several threads wrote one granule in this very instruction."""
        thread = clock.thread[lanes]
        self.writer[at] = thread
        self.write_block_time[at] = clock.block_time[lanes]
        self.write_warp_time[at] = clock.warp_time[lanes]
        return self.writer[at] != thread
