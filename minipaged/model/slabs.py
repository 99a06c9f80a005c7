"""Filling a float32 array from a mapped file in slabs, so that no second copy of a tensor is in memory."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable
from pathlib import Path

import numpy as np

from minipaged.errors import ModelFormatError

SLAB_ELEMENTS = 1 << 18  # one mebibyte of float32 stays in the cache from decoding to check to copy


def map_file(path: Path, size: int) -> np.ndarray:
    """The bytes of a file whose header was checked when it had ``size`` bytes."""
    with open(path, "rb") as file:
        data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)
    if data.size != size:
        raise ModelFormatError(f"{path} had {size} bytes and now has {data.size}; it was changed while it was open.")
    return data


def let_go(data: np.ndarray) -> None:
    """Give back the memory of what was read of a mapped file: it stays in the system's cache, not in ours."""
    mapped = data.base.obj
    if hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def target_array(name: str, shape: tuple[int, ...], out: np.ndarray | None) -> np.ndarray:
    """``out`` if it can take a tensor of ``shape``, a new array if it is ``None``."""
    if out is None:
        return np.empty(shape, dtype=np.float32)
    if out.shape != shape:
        raise ModelFormatError(f"tensor {name!r} has shape {shape} in the file, but {out.shape} is needed.")
    if out.dtype != np.float32:
        raise ValueError(f"tensors are read into float32 arrays, not {out.dtype}")
    return out


def as_rows(out: np.ndarray) -> np.ndarray:
    """A view of ``out`` as ``[rows, columns]``; the last dimension is a row.

    What is no array (:class:`~minipaged.model.weight_packer.PackedRows`) is two-dimensional and stays as it is.
    """
    if out.ndim == 2:
        return out
    if out.ndim > 2 and not out.flags.c_contiguous:
        raise ValueError("an array of more than two dimensions must be contiguous to be read into")
    return out.reshape(-1, out.shape[-1] if out.ndim else 1)


def fill(
    name: str,
    target: np.ndarray,
    decode: Callable[[int, np.ndarray], None],
    order: np.ndarray | None = None,
    shift: float = 0.0,
) -> None:
    """Decode a whole tensor into ``target``, float32 ``[rows, columns]`` of any strides, or something that
    takes rows as such an array does: ``target[places] = values``.

    Args:
        name: for the error.
        decode: ``decode(first, slab)`` writes the tensor's values from the ``first`` on into the
            contiguous ``slab``; ``first`` is a multiple of the slab size or of a row.
        order: row ``i`` of the tensor becomes row ``order[i]`` of ``target``.
        shift: is added to every value.

    Raises :class:`ModelFormatError` at the first value that is NaN or infinite.
    """
    rows, columns = target.shape
    with np.errstate(all="ignore"):
        if order is None and isinstance(target, np.ndarray) and target.flags.c_contiguous:
            flat = target.reshape(-1)
            for start in range(0, flat.size, SLAB_ELEMENTS):
                slab = flat[start : start + SLAB_ELEMENTS]
                decode(start, slab)
                _finish(name, slab, shift)
            return
        step = max(1, SLAB_ELEMENTS // max(columns, 1))
        buffer = np.empty(min(step, rows) * columns, dtype=np.float32)
        for start in range(0, rows, step):
            slab = buffer[: (min(start + step, rows) - start) * columns]
            decode(start * columns, slab)
            _finish(name, slab, shift)
            places = slice(start, start + step) if order is None else order[start : start + step]
            target[places] = slab.reshape(-1, columns)


def _finish(name: str, slab: np.ndarray, shift: float) -> None:
    if shift:
        slab += np.float32(shift)
    # NaN and infinity survive a sum, which is much cheaper than looking at each value. A sum may
    # also overflow; only then is each value looked at.
    if not math.isfinite(np.add.reduce(slab)) and not np.isfinite(slab).all():
        raise ModelFormatError(f"tensor {name!r} holds NaN or infinite values; the file is damaged.")
