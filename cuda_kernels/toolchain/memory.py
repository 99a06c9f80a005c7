"""The interpreter's global memory: every allocation an array of its own, with exact bounds.

An address is ``allocation number << 40 | byte offset``, so a wrong index never lands in a neighbour: it falls
outside of its own allocation and is reported. Each byte knows whether it was ever written; a freed allocation
is remembered by name, so that its later use is named as well.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

OFFSET_BITS = 40
OFFSET_MASK = (1 << OFFSET_BITS) - 1
SHARED_WINDOW = 1 << OFFSET_BITS  # generic addresses of shared and local memory, as allocations 1 and 2
LOCAL_WINDOW = 2 << OFFSET_BITS
FIRST_ALLOCATION = 16


class DeviceMemoryError(Exception):
    """Global memory was used from the host in a way that no device would allow."""


@dataclass
class Allocation:
    """``data``: uint8 [num_bytes]; ``written``: bool [num_bytes], or None once all of it has been written.

    ``shadow`` is there while a launch may write the allocation, for the check of races.
    """

    number: int
    name: str
    data: np.ndarray
    written: np.ndarray | None
    shadow: object = None

    @property
    def pointer(self) -> int:
        return self.number << OFFSET_BITS

    def mark_written(self, start: int, stop: int) -> None:
        if self.written is not None:
            self.written[start:stop] = True
            if stop - start == self.data.size or (start == 0 and self.written.all()):
                self.written = None


class DeviceMemory:
    """A flat address space. Pointers are plain ints; arithmetic on them within one allocation is allowed."""

    def __init__(self) -> None:
        self._allocations: dict[int, Allocation] = {}
        self._freed: dict[int, str] = {}
        self._next = FIRST_ALLOCATION

    def allocate(self, num_bytes: int, name: str = "") -> int:
        """A pointer to ``num_bytes`` fresh bytes that count as never written."""
        data = np.full(num_bytes, 0xFF, np.uint8)  # as floats: NaN
        return self._add(data, np.zeros(num_bytes, bool) if num_bytes else None, name)

    def upload(self, array: np.ndarray, name: str = "") -> int:
        """A pointer to a copy of ``array``, in C order."""
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).copy()
        return self._add(data, None, name)

    def _add(self, data, written, name) -> int:
        number, self._next = self._next, self._next + 1
        allocation = Allocation(number, name or f"allocation {number}", data, written)
        self._allocations[number] = allocation
        return allocation.pointer

    def free(self, pointer: int) -> None:
        allocation, offset = self.find(pointer)
        if offset:
            raise DeviceMemoryError(f"{hex(pointer)} points {offset} bytes into {allocation.name}, not at its start")
        del self._allocations[allocation.number]
        self._freed[allocation.number] = allocation.name

    def find(self, pointer: int) -> tuple[Allocation, int]:
        """The allocation that ``pointer`` belongs to and the offset in it (which may lie outside)."""
        number, offset = pointer >> OFFSET_BITS, pointer & OFFSET_MASK
        allocation = self._allocations.get(number)
        if allocation is None:
            freed = self._freed.get(number)
            why = f"{freed} was freed" if freed else "no allocation is there"
            raise DeviceMemoryError(f"address {hex(pointer)}: {why}")
        return allocation, offset

    def _range(self, pointer: int, num_bytes: int) -> tuple[Allocation, slice]:
        allocation, offset = self.find(pointer)
        if offset + num_bytes > allocation.data.size:
            raise DeviceMemoryError(
                f"bytes {offset} to {offset + num_bytes} of {allocation.name}, which has {allocation.data.size}"
            )
        return allocation, slice(offset, offset + num_bytes)

    def write(self, pointer: int, array: np.ndarray) -> None:
        """Host to device."""
        source = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        allocation, where = self._range(pointer, source.size)
        allocation.data[where] = source
        allocation.mark_written(where.start, where.stop)

    def read(self, pointer: int, shape, dtype) -> np.ndarray:
        """Device to host, a copy. Bytes never written read as 0xFF, which is NaN in every float format."""
        dtype = np.dtype(dtype)
        count = int(np.prod(shape, dtype=np.int64))
        allocation, where = self._range(pointer, count * dtype.itemsize)
        return allocation.data[where].copy().view(dtype).reshape(shape)

    def is_written(self, pointer: int, num_bytes: int) -> np.ndarray:
        """Which of the bytes have ever been written: bool [num_bytes]."""
        allocation, where = self._range(pointer, num_bytes)
        return np.ones(num_bytes, bool) if allocation.written is None else allocation.written[where].copy()

    def copy(self, destination: int, source: int, num_bytes: int) -> None:
        """Device to device; what was never written stays so."""
        from_, from_where = self._range(source, num_bytes)
        to, to_where = self._range(destination, num_bytes)
        to.data[to_where] = from_.data[from_where].copy()
        if from_.written is None:
            to.mark_written(to_where.start, to_where.stop)
        else:
            if to.written is None:
                to.written = np.ones(to.data.size, bool)
            to.written[to_where] = from_.written[from_where].copy()

    def fill(self, pointer: int, num_bytes: int, byte: int = 0) -> None:
        allocation, where = self._range(pointer, num_bytes)
        allocation.data[where] = byte
        allocation.mark_written(where.start, where.stop)
