"""Devices for tests of the CUDA backend: the emulated one everywhere, the card with ``pytest -m gpu``."""

from __future__ import annotations

import pytest

for package in ("numba_cuda", "cuda.bindings.nvvm"):
    pytest.importorskip(package, reason=f"compiling CUDA kernels needs {package} (pip install minipaged[cuda])")

from minipaged.ops.cuda.device import Device  # noqa: E402
from minipaged.ops.cuda.emulated import EmulatedDevice  # noqa: E402

DEVICES = ["emulated", pytest.param("card", marks=pytest.mark.gpu)]


def make_device(kind: str, capability: tuple[int, int] = (8, 0)) -> Device:
    """The emulated device as a card of ``capability``, or the card that is here, with PTX for its own."""
    if kind == "emulated":
        return EmulatedDevice(capability)
    from minipaged.ops.cuda.available import driver_facts
    from minipaged.ops.cuda.hardware import HardwareDevice

    if problem := driver_facts()["problem"]:
        pytest.skip(problem)
    return HardwareDevice()


@pytest.fixture(name="device", params=DEVICES)
def each_device(request):
    """``device``: each of them in turn, for the tests of a module that imports this."""
    device = make_device(request.param)
    yield device
    device.close()
