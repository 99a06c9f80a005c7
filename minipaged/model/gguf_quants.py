"""Tensor types of GGUF, and their way back to float32.

A quantised type stores blocks of 32 or 256 consecutive values: a scale (and, for some, a minimum)
in float16, then small integers. The layouts are those of ggml's ``ggml-common.h``. The most common
types are decoded here, in NumPy; the others by the ``gguf`` package, imported only when one is met.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from minipaged.errors import UnsupportedModelError


class TensorType(NamedTuple):
    """``block_size`` values are stored in ``type_size`` bytes."""

    id: int
    name: str
    block_size: int
    type_size: int


TYPES = {
    type_.id: type_
    for type_ in (
        TensorType(0, "F32", 1, 4),
        TensorType(1, "F16", 1, 2),
        TensorType(2, "Q4_0", 32, 18),
        TensorType(3, "Q4_1", 32, 20),
        TensorType(6, "Q5_0", 32, 22),
        TensorType(7, "Q5_1", 32, 24),
        TensorType(8, "Q8_0", 32, 34),
        TensorType(9, "Q8_1", 32, 40),
        TensorType(10, "Q2_K", 256, 84),
        TensorType(11, "Q3_K", 256, 110),
        TensorType(12, "Q4_K", 256, 144),
        TensorType(13, "Q5_K", 256, 176),
        TensorType(14, "Q6_K", 256, 210),
        TensorType(15, "Q8_K", 256, 292),
        TensorType(16, "IQ2_XXS", 256, 66),
        TensorType(17, "IQ2_XS", 256, 74),
        TensorType(18, "IQ3_XXS", 256, 98),
        TensorType(19, "IQ1_S", 256, 50),
        TensorType(20, "IQ4_NL", 32, 18),
        TensorType(21, "IQ3_S", 256, 110),
        TensorType(22, "IQ2_S", 256, 82),
        TensorType(23, "IQ4_XS", 256, 136),
        TensorType(24, "I8", 1, 1),
        TensorType(25, "I16", 1, 2),
        TensorType(26, "I32", 1, 4),
        TensorType(27, "I64", 1, 8),
        TensorType(28, "F64", 1, 8),
        TensorType(29, "IQ1_M", 256, 56),
        TensorType(30, "BF16", 1, 2),
        TensorType(34, "TQ1_0", 256, 54),
        TensorType(35, "TQ2_0", 256, 66),
        TensorType(39, "MXFP4", 32, 17),
        TensorType(40, "NVFP4", 64, 36),
    )
}


def dequantize(data: np.ndarray, type_: TensorType, out: np.ndarray) -> None:
    """Decode ``data`` (uint8, whole blocks) into ``out`` (float32, contiguous, one value each).

    Raises :class:`UnsupportedModelError` for types that hold no weights.
    """
    decode = _DECODERS.get(type_.name)
    if decode is not None:
        decode(data.reshape(-1, type_.type_size), out.reshape(-1, type_.block_size))
    else:
        _dequantize_with_gguf(data, type_, out)


def _f32(blocks: np.ndarray, out: np.ndarray) -> None:
    out[:] = blocks.view("<f4")


def _f16(blocks: np.ndarray, out: np.ndarray) -> None:
    out[:] = blocks.view("<f2")


def _bf16(blocks: np.ndarray, out: np.ndarray) -> None:
    """bfloat16 is the upper half of a float32."""
    np.left_shift(blocks.view("<u2"), 16, out=out.view(np.uint32), dtype=np.uint32)


def _q8_0(blocks: np.ndarray, out: np.ndarray) -> None:
    """``d * q``: d float16, then 32 int8."""
    np.multiply(blocks[:, 2:].view(np.int8), _half(blocks, 0), out=out)


def _q4_0(blocks: np.ndarray, out: np.ndarray) -> None:
    """``d * (q - 8)``: d float16, then 16 bytes; low halves are values 0-15, high halves 16-31."""
    _nibbles(blocks[:, 2:], out)
    out -= 8
    out *= _half(blocks, 0)


def _q4_1(blocks: np.ndarray, out: np.ndarray) -> None:
    """``d * q + m``: d and m float16, then 16 bytes as in Q4_0."""
    _nibbles(blocks[:, 4:], out)
    out *= _half(blocks, 0)
    out += _half(blocks, 2)


def _half(blocks: np.ndarray, at: int) -> np.ndarray:
    """The float16 at byte ``at`` of each block, as a float32 column."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: np.ndarray, out: np.ndarray) -> None:
    out[:, :16] = packed & 15
    out[:, 16:] = packed >> 4


_DECODERS: dict[str, Callable[[np.ndarray, np.ndarray], None]] = {
    "F32": _f32,
    "F16": _f16,
    "BF16": _bf16,
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
}


def _dequantize_with_gguf(data: np.ndarray, type_: TensorType, out: np.ndarray) -> None:
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize as gguf_dequantize

    try:
        values = gguf_dequantize(data, GGMLQuantizationType(type_.id))
    except (NotImplementedError, ValueError):
        raise UnsupportedModelError(f"tensor type {type_.name} cannot be turned into float32.") from None
    out.reshape(-1)[:] = values.reshape(-1)
