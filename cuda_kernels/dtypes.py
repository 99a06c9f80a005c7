"""What memory holds and what kernels compute with: every value is float32 between its load and its store.

    name        in memory      as a Numba element
    float32     4 bytes        float32
    float16     2 bytes        uint16: the bits; native half arithmetic is never used
    bfloat16    2 bytes        uint16: the upper half of a float32's bits
    int8        1 byte         int8: times a scale, which the kernel applies
"""

from __future__ import annotations

from functools import cache

from numba import cuda

from cuda_kernels.intrinsics import bf16_to_f32, f32_to_bf16, f32_to_half, half_to_f32
from cuda_kernels.kernel import float32, int8, uint16

ELEMENTS = {"float32": float32, "float16": uint16, "bfloat16": uint16, "int8": int8}
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}


@cuda.jit(device=True)
def _f32_as_f32(x):
    return x


@cuda.jit(device=True)
def _int8_as_f32(x):
    return float32(x)


@cache
def loader(dtype: str):
    """The device function that turns a stored element of ``dtype`` into float32."""
    return {"float32": _f32_as_f32, "float16": half_to_f32, "bfloat16": bf16_to_f32, "int8": _int8_as_f32}[dtype]


@cache
def storer(dtype: str):
    """The device function that turns float32 into what is stored as ``dtype``, rounding to nearest even."""
    return {"float32": _f32_as_f32, "float16": f32_to_half, "bfloat16": f32_to_bf16}[dtype]
