"""Kernels as PTX, kept on disk by the toolchain, in minipaged's own folder."""

from __future__ import annotations

import os

from cuda_kernels.kernel import Kernel
from cuda_kernels.toolchain.compile import CompileError, compile_ptx
from minipaged.errors import DeviceError
from minipaged.home import home

CACHE_VARIABLE = "CUDA_KERNELS_CACHE"


def compiled(kernel: Kernel, capability: tuple[int, int]) -> str:
    """PTX of ``kernel`` for a compute capability.

    Raises :class:`~minipaged.errors.DeviceError` if the kernel cannot be compiled.
    """
    os.environ.setdefault(CACHE_VARIABLE, str(home() / "ptx"))
    try:
        return compile_ptx(kernel, capability)
    except (CompileError, ImportError) as error:
        raise DeviceError(
            f"kernel {kernel.name} could not be compiled: {error}. Do the packages fit together? "
            "pip install 'minipaged[cuda]' has those that do."
        ) from error
