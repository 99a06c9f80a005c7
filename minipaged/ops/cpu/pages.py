"""Memory that is written here and there, in the smallest pages that the system has."""

from __future__ import annotations

import contextlib
import mmap

import numpy as np

from .packing import aligned_zeros


def sparse_zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Zeros of which only what is written takes memory, page by page (of 4 KiB, usually).

    NumPy asks Linux for pages of 2 MiB, the first byte written in each of which costs them all. What is
    read in sequence, such as weights, gains by that (see :class:`~minipaged.ops.cpu.packing.Arena`). A KV pool
    does not: one block lies in as many places as there are layers.

    Raises :class:`MemoryError` if the system does not grant so much address space.
    """
    nbytes = int(np.prod(shape)) * dtype.itemsize
    if nbytes == 0 or not hasattr(mmap, "MADV_NOHUGEPAGE"):
        return aligned_zeros(shape, dtype)
    try:
        mapped = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{nbytes:,} bytes cannot be had: {error.strerror}.") from None
    with contextlib.suppress(OSError):  # a kernel that has no large pages refuses to do without them
        mapped.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(mapped, dtype).reshape(shape)
