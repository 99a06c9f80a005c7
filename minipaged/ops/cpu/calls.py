"""Calls of compiled C functions from Python, between two steps.

After a forward pass all of Python is cold memory. NumPy's way to an array's address is Python code, and so is that of
``ctypes`` into a function: either takes longer than what is called. cffi's are C.
"""

from __future__ import annotations

from collections.abc import Callable

import cffi
import numpy as np
from numba.core.ccallback import CFunc

_FFI = cffi.FFI()

buffer = _FFI.from_buffer
"""An array's values as a ``void *`` argument; they must be neighbours in memory."""


def address(array: np.ndarray) -> int:
    """Where an array's values are, for a function that takes addresses as integers."""
    return int(_FFI.cast("intptr_t", buffer(array)))


def callable_of(function: CFunc, signature: str) -> Callable:
    """What calls ``function`` without the GIL; ``signature`` is C's, as ``"int64_t(*)(void *, int64_t)"``. To make it
    takes longer than a call: make it once."""
    return _FFI.cast(signature, function.address)
