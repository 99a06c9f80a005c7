"""Token embeddings out of whatever form the table is kept in.

A model whose embedding is tied to its lm_head keeps one copy, packed for the product: a row is then
one lane of a panel (see :mod:`~minipaged.ops.cpu.packing`), picked out value by value.
"""

from __future__ import annotations

import numpy as np

from .memory import bytes8, floats, part_of_caller, words16, words32
from .packing import PANEL

FORMATS = {"float32 rows": 0, "bfloat16 rows": 1, "float32": 2, "bfloat16": 3, "int8": 4}
"""Tables as plain rows, and packed in one of the formats that a lm_head may have."""


@part_of_caller
def embed(format, table, scales, token, out_address, size):
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
        quads = (size + 3) // 4
        quantised = bytes8(table + 4 * PANEL * panel * quads, 4 * PANEL * quads)
        scale = floats(scales + 4 * token, 1)[0]
        for i in range(size):
            out[i] = np.float32(quantised[(i // 4 * PANEL + lane) * 4 + i % 4]) * scale
