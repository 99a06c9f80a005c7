"""Token embeddings out of whatever form the table is kept in.

A model whose embedding is tied to its lm_head keeps one copy, packed for the product: a row is then
one lane of a panel (see :mod:`~minipaged.ops.cpu.packing`), picked out value by value.
"""

from __future__ import annotations

import numpy as np

from .memory import bits_float, floats, part_of_caller, unsigned8, words16, words32
from .packing import GROUPS, PANEL

FORMATS = {"float32 rows": 0, "bfloat16 rows": 1, "float32": 2, "bfloat16": 3, "int8": 4}
"""Tables as plain rows, and packed in one of the formats that a lm_head may have."""

_INT8 = GROUPS["int8"]
_RECORD, _SCALE_OFFSET, _GROUP = _INT8.nbytes, _INT8.scale_offset, _INT8.size


@part_of_caller
def _positive_half(bits):
    """The value of float16 bits without a sign: at the place of a float32's bits it is 2**-112 too small."""
    return bits_float(np.uint32(bits) << np.uint32(13)) * np.float32(2.0**112)


@part_of_caller
def embed(format, table, token, out_address, size):
    """Write the embedding of ``token``, ``size`` float32, to ``out_address``."""
    out, bits = floats(out_address, size), words32(out_address, size)
    panel, lane = token // PANEL, token % PANEL
    if format == 0:
        row = floats(table + 4 * token * size, size)
        for i in range(size):
            out[i] = row[i]
    elif format == 1:
        halves = words16(table + 2 * token * size, size)
        for i in range(size):
            bits[i] = np.uint32(halves[i]) << np.uint32(16)
    elif format == 2:
        values = floats(table + 4 * PANEL * panel * size, PANEL * size)
        for i in range(size):
            out[i] = values[i * PANEL + lane]
    elif format == 3:
        pairs = (size + 1) // 2
        halves = words16(table + 4 * PANEL * panel * pairs, 2 * PANEL * pairs)
        for i in range(size):
            bits[i] = np.uint32(halves[(i // 2 * PANEL + lane) * 2 + i % 2]) << np.uint32(16)
    else:
        groups = (size + _GROUP - 1) // _GROUP
        records = table + panel * groups * _RECORD
        quantised, halves = unsigned8(records, groups * _RECORD), words16(records, groups * _RECORD // 2)
        for i in range(size):
            record, k = i // _GROUP * _RECORD, i % _GROUP
            scale = _positive_half(halves[(record + _SCALE_OFFSET) // 2 + lane])
            out[i] = (np.float32(quantised[record + (k // 4 * PANEL + lane) * 4 + k % 4]) - np.float32(128)) * scale
