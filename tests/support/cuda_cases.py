"""What tests of CUDA kernels share: stored formats in NumPy, tolerances, and a run in the PTX interpreter."""

from __future__ import annotations

import numpy as np
import pytest

for package in ("numba.cuda", "cuda.bindings.nvvm", "cuda.bindings.nvrtc"):
    pytest.importorskip(package, reason=f"compiling CUDA kernels needs {package} (pip install minipaged[cuda])")

from cuda_kernels.toolchain.interpreter import run  # noqa: E402

CARDS = [(7, 5), (8, 0)]
TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-3}
ULP = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}  # rounding of the result itself


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


def assert_close(stored: np.ndarray, expected: np.ndarray, dtype: str, factor: float = 1.0) -> None:
    """Each value within ``factor`` times the tolerance of ``dtype``, relative to its row's largest, plus rounding."""
    found = decode(stored, dtype)
    expected = np.asarray(expected, np.float32)
    scale = np.abs(expected).max(axis=-1, keepdims=True, initial=1e-30)
    limit = factor * TOLERANCE[dtype] * scale + 1.01 * ULP[dtype] * np.abs(expected)
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
