"""Facts about this machine: what a measurement was made on, and what ``doctor`` shows."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

CPU_FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_tile")
PACKAGES = (
    "numpy", "numba", "tokenizers", "safetensors", "gguf", "jinja2", "tqdm", "cffi", "threadpoolctl", "huggingface_hub",
)  # fmt: skip


def cpu() -> dict:
    """Model name and the vector features that matter here, by name: ``{"avx2": True, ...}``.

    Features are ``None`` where the system does not tell (only Linux's ``/proc/cpuinfo`` is read).
    """
    info = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            info.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    flags = info.get("flags", info.get("Features", "")).split()
    return {
        "model": info.get("model name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "features": {name: name in flags if flags else None for name in CPU_FEATURES},
    }


def cores() -> dict:
    """Logical cores: of the machine, those this process may run on, and the control group's quota
    (in cores; ``None``: no limit)."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"machine": os.cpu_count(), "usable": usable, "quota": _cpu_quota()}


def _cpu_quota() -> float | None:
    root = Path("/sys/fs/cgroup")
    try:
        quota, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (root / "cpu/cpu.cfs_quota_us").read_text().strip()
            period = (root / "cpu/cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    return None if quota in ("max", "-1") else int(quota) / int(period)


def memory() -> dict:
    """Bytes of memory: the machine's, and what this process may still take (``None``: unknown)."""
    from minipaged.sizing import available_memory

    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        total = None
    return {"total": total, "available": available_memory()}


def packages() -> dict[str, str | None]:
    """Versions of the packages minipaged uses; ``None``: not installed. Imports none of them."""
    return {name: package_version(name) for name in PACKAGES}


def package_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def blas() -> dict:
    """The BLAS that NumPy multiplies matrices with, and how many threads it uses (``None``: unknown)."""
    import numpy as np

    found = np.show_config(mode="dicts").get("Build Dependencies", {}).get("blas", {})
    return {"name": found.get("name", "unknown"), "version": found.get("version"), "threads": blas_threads()}


def blas_threads() -> int | None:
    """Threads of the BLAS that is loaded in this process; ``None`` if none is known."""
    from threadpoolctl import threadpool_info

    counts = [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]
    return max(counts, default=None)


def cuda() -> dict:
    """What answers of CUDA: ``driver`` (version or ``None``), ``devices`` (name and compute
    capability each), ``package`` (numba-cuda's version) and ``problem`` (text, or ``None``)."""
    from minipaged.ops.cuda.available import driver_facts

    return driver_facts() | {"package": package_version("numba-cuda")}
