"""Arrays at an address: how ``@njit`` code reads and writes the memory it is given as int64.

A step gets its buffers as a table of addresses, so that one compiled function serves every model.
Numba's ``carray`` makes an array of a pointer; here the pointer is made of an int64.
"""

from __future__ import annotations

from numba import carray, njit, types
from numba.extending import intrinsic


@intrinsic
def _pointer(typing_context, address, dtype):
    """The int64 ``address`` as a pointer to ``dtype``."""
    pointer = types.CPointer(dtype.dtype)

    def codegen(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(pointer))

    return pointer(types.int64, dtype), codegen


@njit(inline="always")
def array_at(address, count, dtype):
    """The ``count`` elements of ``dtype`` (``np.float32``, ...) at ``address``, as an array; nothing is copied."""
    return carray(_pointer(address, dtype), count, dtype)
