"""Which instructions the kernels may use: a *level*, chosen once from the host's features.

========== ======================================= =========================================
level      what it needs                           what it gives
========== ======================================= =========================================
generic    any 64-bit little-endian CPU            128-bit vectors (SSE2, NEON)
avx2       AVX2, FMA, F16C                         256-bit vectors, fused multiply-add
avx512     AVX-512 F, BW, DQ, VL, VNNI             512-bit vectors, int8 dot products
avx512bf16 AVX-512 BF16 on top                     bfloat16 dot products
========== ======================================= =========================================

An instruction that the CPU (or the target Numba compiles for) lacks does not raise: LLVM aborts the
process. So a level is taken only if both the host and Numba's target have all of its features;
``NUMBA_CPU_NAME``, ``NUMBA_CPU_FEATURES`` and ``NUMBA_ENABLE_AVX`` are honoured that way.
``MINIPAGED_CPU_LEVEL`` forces a lower level (to test it, or to compare); a higher one is refused.
Results are bit-identical within one level, not between levels.
"""

from __future__ import annotations

import os
import struct
import sys
from dataclasses import dataclass
from functools import cache

from minipaged.errors import BackendUnavailableError, ConfigError

ENVIRONMENT_VARIABLE = "MINIPAGED_CPU_LEVEL"


@dataclass(frozen=True)
class InstructionSet:
    """What one level lets an emitter use."""

    level: str
    vector_bytes: int
    num_registers: int  # vector registers: they bound the accumulators of a tile
    has_fma: bool
    has_x86: bool = True  # pmaddwd and its kind have names of their own on x86
    has_avx2: bool = False
    has_vnni: bool = False
    has_bf16_dot: bool = False

    @property
    def lanes(self) -> int:
        """32-bit lanes of a vector."""
        return self.vector_bytes // 4


_AVX2 = frozenset({"avx2", "fma", "f16c"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni"}

REQUIRED_FEATURES: dict[str, frozenset[str]] = {  # weakest level first
    "generic": frozenset(),
    "avx2": _AVX2,
    "avx512": _AVX512,
    "avx512bf16": _AVX512 | {"avx512bf16"},
}
LEVELS = tuple(REQUIRED_FEATURES)


def instruction_set(level: str, machine: str = "x86_64") -> InstructionSet:
    """The instructions of ``level`` on ``machine`` (``"x86_64"``, or another, which has only ``generic``)."""
    if level == "generic":
        x86 = machine == "x86_64"
        arm = machine == "aarch64"  # NEON: always has the fused multiply-add, and 32 registers
        return InstructionSet(level, 16, 32 if arm else 16, has_fma=arm, has_x86=x86)
    if level == "avx2":
        return InstructionSet(level, 32, 16, has_fma=True, has_avx2=True)
    return InstructionSet(
        level, 64, 32, has_fma=True, has_avx2=True, has_vnni=True, has_bf16_dot=level == "avx512bf16"
    )


def host_features() -> frozenset[str]:
    """Features that both the host has and Numba compiles for, by LLVM's names."""
    import llvmlite.binding as llvm
    from numba import config

    features = {name for name, present in llvm.get_host_cpu_features().items() if present}
    if config.CPU_FEATURES is not None:  # "+avx2,-avx512f,...": set, or "" for NUMBA_CPU_NAME=generic
        features &= {name[1:] for name in config.CPU_FEATURES.split(",") if name.startswith("+")}
    if not config.ENABLE_AVX:
        features = {name for name in features if not name.startswith("avx")}
    return frozenset(features)


def machine() -> str:
    """The architecture LLVM compiles for: ``"x86_64"``, ``"aarch64"``, ..."""
    import llvmlite.binding as llvm

    name = llvm.get_default_triple().partition("-")[0].lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)


def best_level(features: frozenset[str]) -> str:
    """The strongest level whose features are all there."""
    return [level for level in LEVELS if REQUIRED_FEATURES[level] <= features][-1]


def choose_level(features: frozenset[str], forced: str | None) -> str:
    """``forced`` if the host can run it, or the best level if nothing is forced.

    Raises:
        ConfigError: ``forced`` is no level, or the host lacks some of its features.
    """
    best = best_level(features)
    if not forced:
        return best
    if forced not in LEVELS:
        raise ConfigError(f"{ENVIRONMENT_VARIABLE}={forced!r} is not a level; choose one of {', '.join(LEVELS)}.")
    if missing := sorted(REQUIRED_FEATURES[forced] - features):
        raise ConfigError(
            f"{ENVIRONMENT_VARIABLE}={forced!r} needs {', '.join(missing)}, which this CPU (or Numba's target) "
            f"lacks; the highest level here is {best!r}."
        )
    return forced


def check_platform(byteorder: str = sys.byteorder, pointer_bytes: int = struct.calcsize("P")) -> None:
    """Refuse CPUs whose memory layout the packed weights do not fit.

    Raises:
        BackendUnavailableError: the CPU is big-endian, or Python is not a 64-bit build.
    """
    if byteorder != "little":
        raise BackendUnavailableError(f"device 'cpu' needs a little-endian CPU, this one is {byteorder}-endian.")
    if pointer_bytes != 8:
        raise BackendUnavailableError(
            f"device 'cpu' needs a 64-bit Python, this one has {8 * pointer_bytes}-bit addresses."
        )


@cache
def current() -> InstructionSet:
    """The instruction set of this process; decided on first use.

    Raises:
        BackendUnavailableError: this platform is big-endian or 32-bit.
        ConfigError: ``MINIPAGED_CPU_LEVEL`` asks for what is not there.
    """
    check_platform()
    level = choose_level(host_features(), os.environ.get(ENVIRONMENT_VARIABLE))
    return instruction_set(level, machine())
