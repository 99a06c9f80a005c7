"""What tests of CUDA kernels share: stored formats in NumPy, tolerances, and a run in the PTX interpreter."""

from __future__ import annotations

import numpy as np
import pytest

for package in ("numba.cuda", "cuda.bindings.nvvm", "cuda.bindings.nvrtc"):
    pytest.importorskip(package, reason=f"compiling CUDA kernels needs {package} (pip install minipaged[cuda])")

from cuda_kernels.toolchain.interpreter import run  # noqa: E402

CARDS = [(7, 5), (8, 0)]
#: The error that a kernel may make before it rounds its result to the format, relative to the row's largest value.
TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-3}
#: That last rounding, relative to the value: to nearest of 11 bits or of 8. (float32's is within the tolerance.)
ROUNDING = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 ``values`` as ``dtype`` holds them in memory; 16-bit floats as uint16."""
    values = np.ascontiguousarray(values, np.float32)
    if dtype == "float32":
        return values.copy()
    if dtype == "float16":
        return values.astype(np.float16).view(np.uint16)
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)


def decode(stored: np.ndarray, dtype: str) -> np.ndarray:
    """The float32 values of what :func:`encode` made."""
    if dtype == "float32":
        return stored
    if dtype == "float16":
        return stored.view(np.float16).astype(np.float32)
    return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """``values`` as they are after a trip through ``dtype``."""
    return decode(encode(values, dtype), dtype)


def empty(shape, dtype: str) -> np.ndarray:
    """Memory of ``dtype`` full of NaN."""
    return encode(np.full(shape, np.nan, np.float32), dtype)


def assert_close(stored: np.ndarray, expected: np.ndarray, dtype: str, before: float | None = None) -> None:
    """Each value is within ``before`` times its row's largest, plus one rounding to ``dtype``.

    ``expected`` is what the reference operator computes in float32 from the very inputs of the kernel, rounded as
    they are, and is not rounded itself. ``before``: the error before the last rounding; the tolerance of ``dtype``
    if not given.
    """
    found = decode(stored, dtype)
    expected = np.asarray(expected, np.float32)
    scale = np.abs(expected).max(axis=-1, keepdims=True, initial=1e-30)
    before = TOLERANCE[dtype] if before is None else before
    # What is rounded is the kernel's own value, which is ``before`` off.
    limit = before * scale + ROUNDING[dtype] * (np.abs(expected) + before * scale)
    wrong = ~(np.abs(found - expected) <= limit)
    assert not wrong.any(), (
        f"{wrong.sum()} of {wrong.size} values differ, first at {np.argwhere(wrong)[0]}: "
        f"{found[wrong][0]} for {expected[wrong][0]}"
    )


def run_on(cc, kernel, dims, *args):
    """Run ``kernel`` with ``dims = launch_dims(...)`` in the interpreter, on PTX for ``cc``."""
    grid, block = dims
    assert block[0] == kernel.block
    return run(kernel, grid, list(args), cc=cc)
