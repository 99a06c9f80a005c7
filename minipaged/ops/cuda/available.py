"""Whether a CUDA device can be used here, and if not, why: found out without importing or compiling anything.

``MINIPAGED_CUDA=emulate`` in the environment stands the PTX interpreter in for a card.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from importlib import metadata, util

from minipaged.errors import BackendUnavailableError

VARIABLE = "MINIPAGED_CUDA"
CAPABILITY_VARIABLE = "MINIPAGED_CUDA_CAPABILITY"
"""Environment variable: the compute capability to emulate, such as ``7.5``; 8.0 without it."""
MIN_CAPABILITY = (7, 5)
DRIVER_OF_CUDA = {12: "525", 13: "580"}  # the first driver for each major version
INSTALL = "pip install 'minipaged[cuda]'"


@dataclass(frozen=True)
class Found:
    """What was found. ``problem`` is ``None`` if the device can be used."""

    problem: str | None
    name: str = ""
    capability: tuple[int, int] = (0, 0)
    emulated: bool = False


def emulation_asked() -> bool:
    """Whether the environment asks for the emulated device."""
    return os.environ.get(VARIABLE, "") == "emulate"


def examine() -> Found:
    """The device that :func:`open_device` would open."""
    setting = os.environ.get(VARIABLE, "")
    if setting not in ("", "emulate"):
        return Found(f"{VARIABLE} is {setting!r}; it may be 'emulate', or not set")
    found = _examine_emulator() if setting else _examine_card()
    if found.problem is None and (missing := _missing_packages()):
        return Found(f"{found.name} is there, but not the packages {', '.join(missing)}: {INSTALL}")
    return found


def open_device():
    """The device, ready for use (:class:`~minipaged.ops.cuda.device.Device`).

    Raises :class:`~minipaged.errors.BackendUnavailableError` where :func:`examine` finds a problem.
    """
    found = examine()
    if found.problem is not None:
        raise BackendUnavailableError(f"no CUDA device can be used: {found.problem}.")
    if found.emulated:
        from .emulated import EmulatedDevice

        return EmulatedDevice(found.capability)
    from .hardware import HardwareDevice

    return HardwareDevice()


def _examine_emulator() -> Found:
    text = os.environ.get(CAPABILITY_VARIABLE, "8.0")
    major, _, minor = text.partition(".")
    if not (major.isdigit() and minor.isdigit()) or (int(major), int(minor)) < MIN_CAPABILITY:
        return Found(f"{CAPABILITY_VARIABLE} is {text!r}; it must be a compute capability from 7.5 on, such as 8.0")
    return Found(None, f"an EMULATED device (sm_{major}{minor})", (int(major), int(minor)), emulated=True)


def _examine_card() -> Found:
    facts = driver_facts()
    if facts["problem"]:
        return Found(facts["problem"])
    device = facts["devices"][0]
    capability = tuple(map(int, device["compute_capability"].split(".")))
    if capability < MIN_CAPABILITY:
        return Found(f"{device['name']} has compute capability {device['compute_capability']}; 7.5 is the least")
    needed = _compiler_version()
    if needed and facts["driver"] and tuple(map(int, facts["driver"].split("."))) < needed:
        update = DRIVER_OF_CUDA.get(needed[0])
        return Found(
            f"the driver of {device['name']} is for CUDA {facts['driver']}, but kernels are compiled by CUDA "
            f"{needed[0]}.{needed[1]}; update the driver" + (f" to {update} or newer" if update else "")
        )
    return Found(None, f"{device['name']} (compute capability {device['compute_capability']})", capability)


def _missing_packages() -> list[str]:
    modules = {"numba-cuda": "numba_cuda", "cuda-bindings": "cuda.bindings"}
    return [package for package, module in modules.items() if not _importable(module)]


def _importable(module: str) -> bool:
    try:
        return util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent is missing
        return False


def _compiler_version() -> tuple[int, int] | None:
    """The CUDA release of the compiler's package, if that is how it was installed."""
    try:
        major, minor = metadata.version("nvidia-nvvm").split(".")[:2]
        return int(major), int(minor)
    except (metadata.PackageNotFoundError, ValueError):
        return None


def driver_facts() -> dict:
    """What the driver says: ``driver`` (the CUDA version it is for, or ``None``), ``devices`` (name and
    compute capability each) and ``problem`` (text, or ``None``)."""
    found = {"driver": None, "devices": [], "problem": None}
    try:
        driver = ctypes.CDLL("libcuda.so.1" if os.name == "posix" else "nvcuda.dll")
    except OSError:
        return found | {"problem": "no CUDA driver (libcuda.so.1 is not there)"}
    version, count = ctypes.c_int(), ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(version)) == 0:
        found["driver"] = f"{version.value // 1000}.{version.value % 1000 // 10}"
    status = driver.cuInit(0)
    if status == 0:
        status = driver.cuDeviceGetCount(ctypes.byref(count))
    if status != 0:
        return found | {"problem": f"the CUDA driver answers with error {status} (no device?)"}
    found["devices"] = [_device_facts(driver, number) for number in range(count.value)]
    if not found["devices"]:
        found["problem"] = "the CUDA driver sees no device"
    return found


def _device_facts(driver, number: int) -> dict:
    major_attribute, minor_attribute = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    driver.cuDeviceGet(ctypes.byref(device), number)
    driver.cuDeviceGetName(name, len(name), device)
    driver.cuDeviceGetAttribute(ctypes.byref(major), major_attribute, device)
    driver.cuDeviceGetAttribute(ctypes.byref(minor), minor_attribute, device)
    return {"name": name.value.decode(errors="replace"), "compute_capability": f"{major.value}.{minor.value}"}
