"""How weights lie in a card's memory, and how float32 rows become that; NumPy only.

Two layouts. *Rows* is what :mod:`~cuda_kernels.product_plain` reads: row after row, as drawn there.
*Fragments* is what the tensor cores of :mod:`~cuda_kernels.product` read: a weight is cut into panels of 64
rows, a panel into chunks of 32 columns, and in a chunk lies what a warp's 32 lanes load, 16 bytes each, as
runs of 512 bytes::

    format     data                                16 bytes of a lane
    float16    [N/64][K/32][4][2][32][8] uint16    the fragment A of one m16n8k16 product: 16 rows, 16 columns
    bfloat16   the same                            the same
    int8       [N/64][K/32][4][32][16]   uint8     16 rows, 32 columns: two fragments, q + 128
    int4       [N/64][K/32][2][32][16]   uint8     32 rows, 32 columns: four fragments, two q a byte

With g = lane / 4 and t = lane % 4 a fragment is four pairs of neighbouring columns::

    pair 0: row g, columns 2t, 2t + 1          pair 2: row g,     columns 2t + 8, 2t + 9
    pair 1: row g + 8, the same columns        pair 3: row g + 8, the same columns as pair 2

int8 stores the pairs in order. A 32-bit word of int4 is one fragment (rows 0-15 columns 0-15, rows 0-15
columns 16-31, then rows 16-31): pair i has its first q in bits 4i, its second in bits 4i + 16, so that
``word >> 4i & 0x000F000F`` is the pair.

    scales   int8   [N] float32                 weight = scale * q, q in -127..127
             int4   [N/64][K/32][64] float16    weight = scale * (q - 8), q in 0..15
                                                entry 32p + 4g + j is row 32p + 8j + g of the panel

N is padded with zero rows to whole panels, K with zero columns to whole chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FORMATS = ("float32", "float16", "bfloat16", "int8", "int4")
PANEL = 64  # rows
TILE_ROWS = 16  # of one fragment
CHUNK = 32  # columns that are padded to, and that share a scale in int4
_LANES = np.arange(32)


@dataclass(frozen=True)
class Packed:
    """One weight ``[num_rows, num_columns]`` as the kernels read it; ``scales`` is empty where there are none."""

    format: str
    num_rows: int
    num_columns: int
    data: np.ndarray
    scales: np.ndarray

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + self.scales.nbytes


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The bits, as uint16, of float32 ``values`` rounded to nearest even bfloat16; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + (0x7FFF + (bits >> 16 & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


def to_bits(format: str, values: np.ndarray) -> np.ndarray:
    """``values`` as elements of float32, float16 (uint16) or bfloat16 (uint16)."""
    if format == "float32":
        return np.ascontiguousarray(values, np.float32)
    if format == "float16":
        return np.ascontiguousarray(values).astype(np.float16).view(np.uint16)
    return to_bfloat16(values)


def quantise_int8(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``(q int8 [N, K], scale float32 [N])`` of float32 rows; the largest magnitude of a row becomes 127."""
    scale = np.abs(rows).max(axis=1, initial=0).astype(np.float32) / np.float32(127)
    q = np.rint(rows / np.where(scale == 0, 1, scale)[:, None]).astype(np.int8)
    return q, scale


def quantise_int4(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``(q uint8 [N, K32], scale float16 [N, K32 / 32])`` of float32 rows, K padded to a multiple of 32.

    As Q4_0 of llama.cpp: the value of largest magnitude in a group of 32 becomes -8 exactly, so that the
    scale carries its (negated) sign, and the range on its side is used fully.
    """
    groups = _pad(rows, 1, CHUNK).reshape(len(rows), -1, CHUNK)
    largest = np.take_along_axis(groups, np.abs(groups).argmax(axis=-1)[..., None], axis=-1)[..., 0]
    scale = (largest / np.float32(-8)).astype(np.float16)
    divisor = scale.astype(np.float32)
    q = np.rint(groups / np.where(divisor == 0, 1, divisor)[..., None]) + 8
    return np.clip(q, 0, 15).astype(np.uint8).reshape(len(rows), -1), scale


def interleave_gated(rows: np.ndarray) -> np.ndarray:
    """``[2 I, K]``, the gate's half first, in the order of a gated product: 16 rows of the gate, 16 of the other.

    Each half is padded with zero rows to half a panel's multiple.
    """
    halves = _pad(rows.reshape(2, -1, rows.shape[1]), 1, PANEL // 2)
    tiles = halves.reshape(2, -1, TILE_ROWS, rows.shape[1])
    return np.ascontiguousarray(tiles.swapaxes(0, 1)).reshape(-1, rows.shape[1])


def pack_rows(format: str, weight: np.ndarray) -> Packed:
    """float32 ``weight [N, K]`` for :mod:`~cuda_kernels.product_plain`."""
    num_rows, num_columns = weight.shape
    weight = np.asarray(weight, np.float32)
    data, scales = weight, np.empty(0, np.float32)
    if format == "int8":
        data, scales = quantise_int8(weight)
    elif format == "int4":
        q, scale = quantise_int4(weight)
        data, scales = q[:, ::2] | q[:, 1::2] << 4, scale.view(np.uint16)
    else:
        data = to_bits(format, weight)
    return Packed(format, num_rows, num_columns, data, scales)


def pack_fragments(format: str, weight: np.ndarray) -> Packed:
    """float32 ``weight [N, K]`` for :mod:`~cuda_kernels.product`: float16, bfloat16, int8 or int4.

    Slabs of a multiple of 64 rows may be packed one by one and put one after the other.
    """
    num_rows, num_columns = weight.shape
    weight = _pad(np.asarray(weight, np.float32), 0, PANEL)
    panels, chunks = len(weight) // PANEL, -(-num_columns // CHUNK)
    scales = np.empty(0, np.float32)
    if format == "int8":
        q, scales = quantise_int8(weight)
        biased = (q.astype(np.int16) + 128).astype(np.uint8)
        pairs = _fragments(_pad(biased, 1, CHUNK, 128)).reshape(panels, 4, chunks, 2, 32, 8)
        data = pairs.transpose(0, 2, 1, 4, 3, 5).reshape(panels, chunks, 4, 32, 16)
    elif format == "int4":
        q, scale = quantise_int4(weight)
        shifts = (4 * np.arange(4)[:, None] + 16 * np.arange(2)).astype(np.uint32)
        words = np.bitwise_or.reduce(_fragments(q).astype(np.uint32) << shifts, axis=(-2, -1))
        words = words.reshape(panels, 2, 2, chunks, 2, 32).transpose(0, 3, 1, 5, 2, 4)  # ..[lane][tile][step]
        data = np.ascontiguousarray(words).view(np.uint8).reshape(panels, chunks, 2, 32, 16)
        scale = scale.reshape(panels, 2, 4, 8, chunks).transpose(0, 4, 1, 3, 2)  # [panel][chunk][p][g][j]
        scales = np.ascontiguousarray(scale).reshape(panels, chunks, PANEL).view(np.uint16)
    elif format in ("float16", "bfloat16"):
        pairs = _fragments(_pad(to_bits(format, weight), 1, CHUNK)).reshape(panels, 4, chunks, 2, 32, 8)
        data = pairs.transpose(0, 2, 1, 3, 4, 5)
    else:
        raise ValueError(f"no fragments of {format!r}; there are float16, bfloat16, int8 and int4")
    return Packed(format, num_rows, num_columns, np.ascontiguousarray(data), scales)


def _fragments(values: np.ndarray) -> np.ndarray:
    """``[N, K]`` as ``[N/16][K/16][lane][pair][first, second]``."""
    tiles = values.reshape(values.shape[0] // 16, 16, values.shape[1] // 16, 16).swapaxes(1, 2)
    pair, which = np.arange(4)[:, None], np.arange(2)
    rows = (_LANES // 4)[:, None, None] + 8 * (pair & 1)
    columns = 2 * (_LANES % 4)[:, None, None] + 8 * (pair >> 1) + which
    return tiles[:, :, rows + 0 * columns, columns]


def _pad(values: np.ndarray, axis: int, multiple: int, fill: int = 0) -> np.ndarray:
    missing = -values.shape[axis] % multiple
    if not missing:
        return values
    shape = list(values.shape)
    shape[axis] = missing
    return np.concatenate([values, np.full(shape, fill, values.dtype)], axis)
