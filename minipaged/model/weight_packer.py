"""Matrices packed for the cpu backend while they are read: no float32 copy of a whole one is made.

A quantised source is dequantised by slabs of about a mebibyte, and these are quantised again as the
backend wants them. That second rounding cannot be left out for GGUF's Q8_0, which has a scale for every 32 values
where ``int8`` has one for 96. Q4_1 and ``int4`` are the same numbers in another order, and Q4_0 is the case
whose minimum is -8 times the scale: they are repacked as they are, without any rounding.
"""

from __future__ import annotations

import numpy as np

from minipaged.errors import ModelFormatError
from minipaged.ops.cpu import packing
from minipaged.ops.cpu.packing import INT4_GROUP, PANEL, PackedWeight


class WeightPacker:
    """How :func:`~minipaged.model.architectures.load_weights` shall keep matrices for the cpu backend.

    ``weight_format``: ``"float32"``, ``"bfloat16"``, ``"int8"`` or ``"int4"``. With ``int4`` the lm_head
    is ``int8``; an embedding of its own is never quantised. (A :class:`~minipaged.model.weights.Pack`.)
    """

    def __init__(self, weight_format: str):
        self.weight_format = weight_format
        self._arena = packing.Arena()

    def __call__(self, matrix: np.ndarray, role: str) -> PackedWeight | np.ndarray:
        if role == "embedding":
            return matrix if self.weight_format == "float32" else packing.to_bfloat16(matrix)
        return packing.pack(self._format(role), matrix, self._arena)

    def start(self, num_rows: int, num_columns: int, role: str) -> PackedRows | None:
        """Somewhere to read the tensors of a matrix to; ``None`` if it is needed as a whole."""
        if role == "embedding":
            return None
        return PackedRows(packing.allocate(self._format(role), num_rows, num_columns, self._arena))

    def _format(self, role: str) -> str:
        return "int8" if (self.weight_format, role) == ("int4", "lm_head") else self.weight_format


class PackedRows:
    """Rows ``first_row ... first_row + num_rows`` of a packed weight, as a float32 matrix that can only be written.

    It stands for an array in :meth:`~minipaged.model.weights.TensorSource.read`: ``rows[places] = values``.

    Attributes:
        block_types: the types of GGUF whose blocks :meth:`put_blocks` takes.
    """

    ndim = 2
    dtype = np.dtype(np.float32)

    def __init__(self, packed: PackedWeight, first_row: int = 0, num_rows: int | None = None):
        self.packed = packed
        self.first_row = first_row
        self.shape = (packed.num_rows if num_rows is None else num_rows, packed.num_columns)
        self.size = self.shape[0] * self.shape[1]
        is_exact = packed.format == "int4" and packed.num_columns % INT4_GROUP == 0
        self.block_types = ("Q4_0", "Q4_1") if is_exact else ()

    def part(self, first_row: int, num_rows: int) -> PackedRows:
        return PackedRows(self.packed, self.first_row + first_row, num_rows)

    def __setitem__(self, places: slice | np.ndarray, values: np.ndarray) -> None:
        """Pack float32 ``values [n, columns]`` as the rows ``places``."""
        for first, run in self._runs(places):
            packing.pack_rows(self.packed, values[run], first)

    def put_blocks(self, name: str, block_type: str, places: slice | np.ndarray, blocks: np.ndarray) -> None:
        """Pack ``blocks [n, columns / 32, bytes]`` of tensor ``name``.

        A block of Q4_0 is a float16 scale and 16 pairs of nibbles; Q4_1 has a float16 minimum after the scale.

        Raises :class:`ModelFormatError` for a scale or a minimum that is NaN or infinite.
        """
        scale = np.ascontiguousarray(blocks[:, :, :2]).view("<f2")[:, :, 0]
        if block_type == "Q4_1":
            minimum = np.ascontiguousarray(blocks[:, :, 2:4]).view("<f2")[:, :, 0]
        else:
            with np.errstate(over="ignore"):
                minimum = np.float16(-8) * scale
        if not (np.isfinite(scale).all() and np.isfinite(minimum).all()):
            raise ModelFormatError(f"tensor {name!r} holds NaN or infinite values; the file is damaged.")
        pairs = blocks[:, :, -16:]
        # Values 0-15 are low halves there, 16-31 high ones; here values k and k + 4 of every eight share a byte.
        values = np.concatenate([pairs & 15, pairs >> 4], axis=2).reshape(len(blocks), -1, 4, 2, 4)
        data = values[:, :, :, 0] | values[:, :, :, 1] << 4  # [n, columns / 32, words, 4]
        for first, run in self._runs(places):
            row = np.arange(first, first + len(data[run]))
            self.packed.words[row // PANEL, :, :, row % PANEL] = data[run]
            self.packed.scale[row // PANEL, :, row % PANEL] = scale[run]
            self.packed.minimum[row // PANEL, :, row % PANEL] = minimum[run]

    def _runs(self, places: slice | np.ndarray):
        """``(first row of the packed weight, which of the values)`` of each run of consecutive rows."""
        if isinstance(places, slice):
            yield self.first_row + places.start, slice(None)
            return
        order = np.argsort(places)
        for run in np.split(order, np.flatnonzero(np.diff(places[order]) != 1) + 1):
            yield self.first_row + int(places[run[0]]), run
