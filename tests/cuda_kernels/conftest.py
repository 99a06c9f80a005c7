"""``pytest -m gpu``: the tests of the kernels run on the card, the same matrix as in the interpreter.

Every test of a kernel calls :func:`cuda_kernels.toolchain.interpreter.run`. Asked for the marker ``gpu``, these
tests get it, and ``run`` becomes one that loads the same PTX, for the same ``cc``, into the driver.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

NOT_OF_KERNELS = ("test_interpreter", "test_toolchain", "test_simulator", "test_mutation", "test_sass")


class _NoCounters:
    """A card does not count: who asks for a counter is a test of the interpreter."""

    def __getattr__(self, name: str):
        pytest.skip(f"the counter {name!r} is the interpreter's")


@cache
def _card(cc: tuple[int, int]):
    """The card, with PTX for ``cc``; a card newer than that compiles it for itself."""
    from minipaged.ops.cuda.available import driver_facts
    from minipaged.ops.cuda.hardware import HardwareDevice

    facts = driver_facts()
    if facts["problem"]:
        pytest.skip(facts["problem"])
    if cc > tuple(map(int, facts["devices"][0]["compute_capability"].split("."))):
        pytest.skip(f"the card is older than {cc[0]}.{cc[1]}")
    return HardwareDevice(target=cc)


def run_on_card(kernel, grid, args, cc=(8, 0), checks=True, block=None, shared_bytes=None) -> _NoCounters:
    """As :func:`cuda_kernels.toolchain.interpreter.run`."""
    from minipaged.ops.cuda.device import DeviceArray, bind

    device, names = _card(tuple(cc)), kernel.body.__code__.co_varnames
    values = [DeviceArray.from_host(device, arg) if isinstance(arg, np.ndarray) else arg for arg in args]
    grid = tuple(int(n) for n in np.atleast_1d(grid))
    device.run([bind(device, kernel, grid, **dict(zip(names, values, strict=False)))])
    for arg, value in zip(args, values, strict=True):
        if isinstance(arg, np.ndarray):
            arg[...] = value.to_host()
            value.free()
    return _NoCounters()


def _card_is_asked_for(config) -> bool:
    return config.option.markexpr.strip() == "gpu"


def pytest_configure(config):
    if _card_is_asked_for(config):
        interpreter = pytest.importorskip("cuda_kernels.toolchain.interpreter")
        interpreter.run = run_on_card


def pytest_collection_modifyitems(config, items):
    for item in items:
        if _card_is_asked_for(config) and item.path.parent.name == "cuda_kernels":
            if not item.path.name.startswith(NOT_OF_KERNELS):
                item.add_marker(pytest.mark.gpu)
