"""What a device can do, and how a kernel is called on it: the same for a card and for the emulator.

A launch names its arguments, so that host and kernel can only disagree loudly::

    call = bind(device, kernel, grid=(rows,), residual=buffer, eps=1e-5, num_rows=rows)
    device.run([call])

Pointers are addresses in the device's memory (integers) or :class:`DeviceArray`; scalars are packed in the
type of the kernel's signature.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Protocol

import numpy as np

from cuda_kernels.kernel import Kernel


@dataclass(frozen=True)
class Call:
    """One launch, ready to go: ``function`` is what the device made of the kernel, ``arguments`` has
    8 bytes for each of them, the value in the first ones (little-endian)."""

    kernel: Kernel
    function: Any
    grid: tuple[int, int, int]
    arguments: np.ndarray  # uint64 [parameters]

    @cached_property
    def pointers(self) -> np.ndarray:
        """The address of each argument, uint64 ``[parameters]``: what a driver is given."""
        return np.uint64(self.arguments.ctypes.data) + 8 * np.arange(len(self.arguments), dtype=np.uint64)


class Recording(Protocol):
    """Calls that a device has kept, to be repeated as often as wanted with what their buffers hold then."""

    def launch(self) -> None: ...


class Device(Protocol):
    """A CUDA device with one stream: whatever is asked of it happens in that order.

    ``memory`` operations raise :class:`~minipaged.errors.OutOfDeviceMemoryError` with sizes;
    anything else that goes wrong is a :class:`~minipaged.errors.DeviceError`.
    """

    name: str
    compute_capability: tuple[int, int]
    emulated: bool
    num_launches: int  #: kernels started so far, those of recordings included

    def allocate(self, nbytes: int) -> int:
        """The address of ``nbytes`` of device memory, whose content is undefined."""
        ...

    def free(self, address: int) -> None:
        """Give an allocation back."""
        ...

    def memory(self) -> tuple[int, int]:
        """Bytes that are free, and bytes in all."""
        ...

    def host_array(self, nbytes: int) -> np.ndarray:
        """uint8 ``[nbytes]`` on the host from which copies are fast (page-locked, where that exists)."""
        ...

    def upload(self, address: int, source: np.ndarray) -> None:
        """Copy a contiguous array to the device; ``source`` must not change before :meth:`synchronize`."""
        ...

    def download(self, target: np.ndarray, address: int) -> None:
        """Fill a contiguous array from the device; it holds the data after :meth:`synchronize`."""
        ...

    def fill(self, address: int, nbytes: int, byte: int) -> None:
        """Set every byte of a piece of device memory."""
        ...

    def function(self, kernel: Kernel) -> Any:
        """Compile and load a kernel, once."""
        ...

    def run(self, calls: Sequence[Call]) -> None:
        """Start kernels one after the other."""
        ...

    def record(self, calls: Sequence[Call]) -> Recording | None:
        """Keep calls for repetition; ``None`` where the device cannot, and :meth:`run` must do."""
        ...

    def synchronize(self) -> None:
        """Wait until everything is done; errors of kernels appear here at the latest."""
        ...

    def close(self) -> None:
        """Give everything back. Closing twice is harmless."""
        ...


class DeviceArray:
    """An array in a device's memory: ``address``, ``shape``, ``dtype``; freed with :meth:`free`."""

    def __init__(self, device: Device, shape: tuple[int, ...] | int, dtype):
        self.device = device
        self.shape = (shape,) if isinstance(shape, int) else tuple(shape)
        self.dtype = np.dtype(dtype)
        self.nbytes = int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize
        self.address = device.allocate(max(self.nbytes, 1))

    @classmethod
    def from_host(cls, device: Device, array: np.ndarray) -> DeviceArray:
        """A copy of ``array`` on the device."""
        array = np.ascontiguousarray(array)
        made = cls(device, array.shape, array.dtype)
        if made.nbytes:
            device.upload(made.address, array)
            device.synchronize()
        return made

    def to_host(self) -> np.ndarray:
        """A copy on the host."""
        array = np.empty(self.shape, self.dtype)
        if self.nbytes:
            self.device.download(array, self.address)
            self.device.synchronize()
        return array

    def fill(self, array: np.ndarray) -> None:
        """Overwrite the content by an array of the same shape and dtype."""
        array = np.ascontiguousarray(array, self.dtype)
        assert array.shape == self.shape, (array.shape, self.shape)
        self.device.upload(self.address, array)
        self.device.synchronize()

    def row(self, first: int) -> int:
        """The address of row ``first`` (of the first dimension)."""
        return self.address + first * (self.nbytes // self.shape[0])

    def free(self) -> None:
        """Give the memory back; the array cannot be used afterwards."""
        self.device.free(self.address)
        self.address = 0


def scalar_type(numba_type) -> np.dtype:
    """The NumPy dtype of a parameter; of a pointer, its address."""
    return np.dtype(np.uint64) if hasattr(numba_type, "dtype") else np.dtype(str(numba_type))


@cache
def _parameters(kernel: Kernel) -> dict[str, np.dtype]:
    names = inspect.signature(kernel.body).parameters
    return {name: scalar_type(kind) for name, kind in zip(names, kernel.signature, strict=True)}


def bind(device: Device, kernel: Kernel, grid: tuple[int, ...], **arguments) -> Call:
    """A call of ``kernel`` with its arguments by name; ``None`` for a pointer that the variant does not use.

    Raises ``TypeError`` for a missing or unknown name, and for a value that its type cannot hold.
    """
    parameters = _parameters(kernel)
    if parameters.keys() != arguments.keys():
        missing, unknown = parameters.keys() - arguments.keys(), arguments.keys() - parameters.keys()
        raise TypeError(f"{kernel.name}: missing arguments {sorted(missing)}, unknown ones {sorted(unknown)}")
    packed = np.zeros(len(parameters), np.uint64)
    for slot, (name, dtype) in zip(packed.view(np.uint8).reshape(-1, 8), parameters.items(), strict=True):
        value = arguments[name]
        if dtype == np.uint64:
            value = getattr(value, "address", value) or 0
        if dtype.kind in "iu" and not isinstance(value, (int, np.integer)):
            raise TypeError(f"{kernel.name}: {name} is {value!r}, not an integer or an address")
        slot[: dtype.itemsize] = np.array([value], dtype).view(np.uint8)
    three = (*grid, 1, 1)[:3]
    return Call(kernel, device.function(kernel), tuple(int(n) for n in three), packed)


def argument_values(call: Call) -> dict[str, int | np.generic]:
    """What a call passes, by name: addresses and integers, and floats of their own width."""
    values = {}
    for slot, (name, dtype) in zip(
        call.arguments.view(np.uint8).reshape(-1, 8), _parameters(call.kernel).items(), strict=True
    ):
        value = slot[: dtype.itemsize].view(dtype)[0]
        values[name] = int(value) if dtype.kind in "iu" else value
    return values
