"""A mask of one bit a token, put to a row of logits; a backend may have a faster way (``ops/cpu/masks.py``)."""

from __future__ import annotations

import numpy as np

from minipaged.ops.sampling import few

_BYTES = np.arange(256, dtype=np.uint8)[:, None]
_PENALTIES = np.where(np.unpackbits(_BYTES, axis=1, bitorder="little"), np.float32(0), np.float32(-np.inf))
"""What eight tokens' bits add to their logits, float32 ``[256, 8]``."""


def mask_row(row: np.ndarray, bits: np.ndarray, out: np.ndarray) -> int:
    """Copy float32 logits ``[vocab]`` to ``out`` (or leave them there), ``-inf`` for tokens without a bit.

    Args:
        row: positive infinity becomes NaN under a mask.
        bits: uint8 ``[vocab / 8]``, rounded up, lowest first.

    Returns:
        The index of the largest of ``out``, the first of several; of no meaning where one is NaN.
    """
    np.add(row, _PENALTIES.take(bits, axis=0).reshape(-1)[: len(row)], out=out)
    return int(out.argmax())


def few_allowed(row: np.ndarray, bits: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """The tokens with a bit and their logits, if they are :func:`~minipaged.ops.sampling.few`; else ``None``.

    Args: as those of :func:`mask_row`.

    Returns:
        ``(token_ids, logits)``: ids ascending, int64 ``[n]``; float32 ``[n]``.
    """
    held = np.flatnonzero(bits != 0)
    if few(8 * len(held), len(row)):  # then a look at these bytes does
        index = np.flatnonzero(np.unpackbits(bits[held], bitorder="little").view(bool))
        ids = 8 * held[index >> 3] + (index & 7)
        ids = ids[: np.searchsorted(ids, len(row))]
    else:
        ids = np.flatnonzero(np.unpackbits(bits, count=len(row), bitorder="little").view(bool))
    return (ids, row[ids]) if few(len(ids), len(row)) else None


def likeliest_allowed(row: np.ndarray, bits: np.ndarray) -> int:
    """The index of the largest among the logits of tokens with a bit, the first of several; -1 if there is none.

    Args: as those of :func:`mask_row`; ``row`` is finite.
    """
    ids = np.flatnonzero(np.unpackbits(bits, count=len(row), bitorder="little").view(bool))
    return int(ids[row[ids].argmax()]) if len(ids) else -1
