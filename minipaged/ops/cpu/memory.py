"""Typed views of raw addresses, for ``@compiled`` code.

The compiled step gets addresses in tables. A SIMD kernel takes them as they are; a plain loop looks
at them through :func:`floats` and its like, which cost nothing.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

compiled = partial(njit, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
"""``njit`` for functions that only compiled code calls.

A division by zero gives infinity, as in C, so that loops vectorise; nothing is made to call it from
Python, which takes a good part of the time to compile it.
"""

part_of_caller = partial(compiled, inline="always")
"""``compiled``, as part of its caller: for a function with one caller, it saves compiling it twice."""


@intrinsic
def _pointer(typing_context, address):
    """``address`` (int64) as a ``void *``."""

    def codegen(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), codegen


@intrinsic
def float_bits(typing_context, value):
    """The bits of a float32, as int64: how a float is passed where only integers are."""

    def codegen(context, builder, signature, arguments):
        return builder.zext(builder.bitcast(arguments[0], ir.IntType(32)), ir.IntType(64))

    return types.int64(types.float32), codegen


@intrinsic
def bits_float(typing_context, bits):
    """The float32 that has these bits, a uint32."""

    def codegen(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), codegen


@compiled
def floats(address, count):
    """``count`` float32 at ``address``, as an array."""
    return carray(_pointer(address), count, np.float32)


@compiled
def ints32(address, count):
    """``count`` int32 at ``address``, as an array."""
    return carray(_pointer(address), count, np.int32)


@compiled
def ints64(address, count):
    """``count`` int64 at ``address``, as an array."""
    return carray(_pointer(address), count, np.int64)


@compiled
def words16(address, count):
    """``count`` uint16 at ``address``, as an array: the bits of bfloat16 values."""
    return carray(_pointer(address), count, np.uint16)


@compiled
def words32(address, count):
    """``count`` uint32 at ``address``, as an array: the bits of float32 values."""
    return carray(_pointer(address), count, np.uint32)


@compiled
def unsigned8(address, count):
    """``count`` uint8 at ``address``, as an array."""
    return carray(_pointer(address), count, np.uint8)
