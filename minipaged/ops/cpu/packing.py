"""Packed weights: the memory layouts that the products read, and how float32 rows become them.

A weight ``[N, K]`` is cut into panels of 48 rows; inside a panel, k comes first, so that one step of
the product reads 48 neighbouring values. N is padded with zero rows to whole panels, K with zeros::

    float32   [N/48][K   ][48]            4 bytes an element
    bfloat16  [N/48][K/2 ][48][2]         2 bytes; a pair of k is one 32-bit word
    int8      [N/48][K/96] records        of 96 k each, whole cache lines:
                  words [24][48][4]       1 byte; a quad of k is one 32-bit word
                  scale [48] float16      weight = scale * (byte - 128), byte - 128 in -127..127
    int4      [N/48][K/32] records        of 32 k each, whole cache lines:
                  words [4][48][4]        half a byte; byte j of the word for k..k+7 holds
                                              k+j in its low nibble and k+4+j in its high one
                  scale [48] float16
                  minimum [48] float16    weight = scale * nibble + minimum, the least of the 32 k

The integer formats pad K to whole groups of 96 and 32. What belongs to a group lies together, so that one row
reads memory in a single sequence, which the hardware fetches ahead (int4, one row: 1.3 times as fast as with
scales and minima in arrays of their own).

The layout is the same at every level, so a packed file serves any CPU. Arrays start at a multiple of
64 bytes (a cache line). Packing streams: rows arrive in slabs of any size, and no float copy is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from minipaged.errors import ConfigError

from .products import FORMATS

PANEL = 48
ALIGNMENT = 64


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple that is not below ``value``."""
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class GroupLayout:
    """The record of a group of ``size`` neighbouring k, whose weights share a scale.

    Attributes:
        words: 32-bit words of one output in it.
        has_minimum: the weights of an output share a minimum as well.
    """

    size: int
    words: int
    has_minimum: bool

    @property
    def scale_offset(self) -> int:
        """Bytes before the scales."""
        return 4 * PANEL * self.words

    @property
    def minimum_offset(self) -> int:
        """Bytes before the minima."""
        return self.scale_offset + 2 * PANEL

    @property
    def nbytes(self) -> int:
        """Bytes of a record."""
        return round_up(self.minimum_offset + 2 * PANEL * self.has_minimum, ALIGNMENT)


GROUPS = {"int8": GroupLayout(96, 24, False), "int4": GroupLayout(32, 4, True)}
INT8_GROUP, INT4_GROUP = GROUPS["int8"].size, GROUPS["int4"].size


def padded_rows(num_rows: int) -> int:
    """Columns that a product writes for a weight of ``num_rows`` rows."""
    return round_up(num_rows, PANEL)


@dataclass(frozen=True)
class PackedWeight:
    """One weight ``[num_rows, num_columns]`` in the layout of ``format``.

    ``data`` is drawn above: an array of the float formats, bytes ``[N/48, groups, bytes of a record]`` of the
    integer ones, whose parts are seen through :attr:`words`, :attr:`scale` and :attr:`minimum`.
    """

    format: str
    num_rows: int
    num_columns: int
    data: np.ndarray

    @property
    def num_panels(self) -> int:
        return self.data.shape[0]

    @property
    def address(self) -> int:
        """``w`` for ``call_product``; valid while this object lives."""
        return self.data.ctypes.data

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    @property
    def words(self) -> np.ndarray:
        """The words of an integer format: bytes ``[N/48, groups, words, 48, 4]`` of ``data``."""
        layout = GROUPS[self.format]
        return self.data[:, :, : layout.scale_offset].reshape(*self.data.shape[:2], layout.words, PANEL, 4)

    @property
    def scale(self) -> np.ndarray:
        """The scales of an integer format: float16 ``[N/48, groups, 48]`` of ``data``."""
        return self._halves(GROUPS[self.format].scale_offset)

    @property
    def minimum(self) -> np.ndarray:
        """The minima of int4: float16 ``[N/48, groups, 48]`` of ``data``."""
        return self._halves(GROUPS[self.format].minimum_offset)

    def _halves(self, offset: int) -> np.ndarray:
        return self.data[:, :, offset : offset + 2 * PANEL].view(np.float16)


def array_shape(format: str, num_rows: int, num_columns: int) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of ``data`` (also what a packed file must hold).

    Raises:
        ConfigError: no such format.
    """
    panels = padded_rows(num_rows) // PANEL
    if format == "float32":
        return (panels, num_columns, PANEL), np.dtype(np.float32)
    if format == "bfloat16":
        return (panels, round_up(num_columns, 2) // 2, PANEL, 2), np.dtype(np.uint16)
    if format in GROUPS:
        layout = GROUPS[format]
        return (panels, round_up(num_columns, layout.size) // layout.size, layout.nbytes), np.dtype(np.uint8)
    raise ConfigError(f"no weight format {format!r}; the CPU backend has {', '.join(FORMATS)}.")


def aligned_zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Zeros that start at a cache line; the system gives the pages only when they are written."""
    nbytes = int(np.prod(shape)) * dtype.itemsize
    buffer = np.zeros(nbytes + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + nbytes].view(dtype).reshape(shape)


class Arena:
    """Gives out zeros, as :func:`aligned_zeros` does, side by side in large pieces of memory.

    A step reads all weights in sequence, and in pages of 4 KiB each costs a look at the page table.
    NumPy asks Linux for pages of 2 MiB, but only for arrays that are large enough to have some; most
    matrices of a small model are not. (SmolLM2 int8, one user: products take 6 to 14% less time.)
    The memory of a piece is given back when the last of its arrays goes.
    """

    PIECE = 8 << 20

    def __init__(self):
        self._rest = np.zeros(0, np.uint8)

    def __call__(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        size = round_up(int(np.prod(shape)) * dtype.itemsize, ALIGNMENT)
        if size >= self.PIECE:
            return aligned_zeros(shape, dtype)
        if size > self._rest.size:
            self._rest = aligned_zeros((self.PIECE,), np.dtype(np.uint8))
        array, self._rest = self._rest[:size], self._rest[size:]
        return array[: int(np.prod(shape)) * dtype.itemsize].view(dtype).reshape(shape)


def allocate(format: str, num_rows: int, num_columns: int, zeros: Callable = aligned_zeros) -> PackedWeight:
    """A packed weight of zeros, to be filled by :func:`pack_rows`; ``zeros``: as :func:`aligned_zeros`."""
    packed = PackedWeight(format, num_rows, num_columns, zeros(*array_shape(format, num_rows, num_columns)))
    if format == "int8":
        packed.words[...] = 0x80  # 128 stands for zero
    return packed


def pack(format: str, weight: np.ndarray, zeros: Callable = aligned_zeros) -> PackedWeight:
    """Pack a whole float32 ``weight [N, K]``; ``zeros``: as :func:`aligned_zeros`."""
    packed = allocate(format, *weight.shape, zeros)
    pack_rows(packed, weight, 0)
    return packed


def pack_rows(packed: PackedWeight, rows: np.ndarray, first_row: int) -> None:
    """Convert and place float32 ``rows [n, K]`` as rows ``first_row ...`` of ``packed``.

    Slabs may come in any order and size; each row must be packed once. Working memory is one panel.
    """
    row = first_row
    last = first_row + len(rows)
    while row < last:
        panel, lane = divmod(row, PANEL)
        count = min(PANEL - lane, last - row)
        values = np.asarray(rows[row - first_row : row - first_row + count], np.float32)
        _PLACE[packed.format](packed, values, panel, slice(lane, lane + count))
        row += count


def _place_float32(packed: PackedWeight, values: np.ndarray, panel: int, lanes: slice) -> None:
    packed.data[panel, :, lanes] = values.T


def _place_bfloat16(packed: PackedWeight, values: np.ndarray, panel: int, lanes: slice) -> None:
    _interleave(packed.data[panel], to_bfloat16(values), lanes)


def _place_int8(packed: PackedWeight, values: np.ndarray, panel: int, lanes: slice) -> None:
    bytes_, scale = quantise_int8(_in_groups(values, INT8_GROUP))
    _place_words(packed, bytes_.reshape(len(values), -1, 4), panel, lanes)
    packed.scale[panel, :, lanes] = scale.T


def _place_int4(packed: PackedWeight, values: np.ndarray, panel: int, lanes: slice) -> None:
    nibbles, scale, minimum = quantise_int4(_in_groups(values, INT4_GROUP))
    nibbles = nibbles.reshape(len(values), -1, 2, 4)  # [row][8 k][low or high][byte]
    _place_words(packed, nibbles[:, :, 0] | nibbles[:, :, 1] << 4, panel, lanes)
    packed.scale[panel, :, lanes] = scale.T
    packed.minimum[panel, :, lanes] = minimum.T


def _place_words(packed: PackedWeight, words: np.ndarray, panel: int, lanes: slice) -> None:
    """Write ``words [n, all words of a row, 4]`` to the records of a panel."""
    groups, per_group = packed.words.shape[1:3]
    packed.words[panel][:, :, lanes] = words.reshape(-1, groups, per_group, 4).transpose(1, 2, 0, 3)


_PLACE = {"float32": _place_float32, "bfloat16": _place_bfloat16, "int8": _place_int8, "int4": _place_int4}


def _interleave(panel: np.ndarray, values: np.ndarray, lanes: slice) -> None:
    """Write rows ``values [n, K]`` to ``panel [K/step][48][step]``; the padding of K stays zero."""
    step = panel.shape[2]
    whole = values.shape[1] // step
    panel[:whole, lanes] = values[:, : whole * step].reshape(len(values), whole, step).transpose(1, 0, 2)
    if rest := values.shape[1] % step:
        panel[whole, lanes, :rest] = values[:, whole * step :]


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 rounded to nearest even bfloat16, as uint16; NaN stays NaN."""
    bits = values.view(np.uint32)
    rounded = ((bits + (0x7FFF + (bits >> 16 & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _in_groups(values: np.ndarray, size: int) -> np.ndarray:
    """``values [n, K]`` as ``[n, groups, size]``, the last group padded with zeros."""
    count, num_columns = values.shape
    groups = np.zeros((count, round_up(num_columns, size) // size, size), np.float32)
    groups.reshape(count, -1)[:, :num_columns] = values
    return groups


def quantise_int8(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantise groups ``values [..., 96]`` to ``(bytes uint8 [..., 96], scale float16 [...])``."""
    scale = _as_half(np.abs(values).max(axis=-1) / np.float32(127))
    quantised = np.rint(values / _divisor(scale))
    return (np.clip(quantised, -127, 127) + 128).astype(np.uint8), scale


def quantise_int4(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Quantise groups ``values [..., 32]`` to ``(nibbles uint8 [..., 32], scale, minimum float16 [...])``."""
    least = values.min(axis=-1)
    minimum, scale = _as_half(least), _as_half((values.max(axis=-1) - least) / np.float32(15))
    quantised = np.rint((values - minimum.astype(np.float32)[..., None]) / _divisor(scale))
    return np.clip(quantised, 0, 15).astype(np.uint8), scale, minimum


def _as_half(values: np.ndarray) -> np.ndarray:
    """float16, and what is too large for it the largest there is."""
    return np.clip(values, -65504, 65504).astype(np.float16)


def _divisor(scale: np.ndarray) -> np.ndarray:
    """The scales of groups as stored, to divide their values by; 1 where all values are the same."""
    divisor = scale.astype(np.float32)[..., None]
    return np.where(divisor == 0, np.float32(1), divisor)
