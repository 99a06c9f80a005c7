"""A device without a card: the PTX that a driver would load, run by the interpreter. Slow, and strict.

The interpreter (``cuda_kernels/toolchain/``) reports races in shared memory, accesses outside of an allocation,
reads of memory that was never written, and divergent barriers; all of these end the step with a
:class:`~minipaged.errors.DeviceError`. Nothing here says anything about speed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cuda_kernels.kernel import Kernel
from cuda_kernels.toolchain.interpreter import KernelFault, PTXError, launch
from cuda_kernels.toolchain.memory import DeviceMemory, DeviceMemoryError
from minipaged.errors import DeviceError, OutOfDeviceMemoryError

from .compiled import compiled
from .device import Call, argument_values

MEMORY_BYTES = 4 << 30
"""What the emulated device pretends to have; the host provides only what is written."""


class EmulatedDevice:
    """The interpreter as a device (see :class:`~minipaged.ops.cuda.device.Device`).

    ``compute_capability``: the card to compile for.
    ``checks`` turns the interpreter's checks of shared memory off, which makes it faster.
    """

    emulated = True

    def __init__(self, compute_capability: tuple[int, int] = (8, 0), checks: bool = True):
        self.compute_capability = compute_capability
        self.name = f"emulated sm_{self.compute_capability[0]}{self.compute_capability[1]}"
        self.checks = checks
        self.num_launches = 0
        self._memory = DeviceMemory()
        self._allocated: dict[int, int] = {}
        self._total = MEMORY_BYTES

    def allocate(self, nbytes: int) -> int:
        free, total = self.memory()
        if nbytes > free:
            raise OutOfDeviceMemoryError(
                f"{nbytes:,} bytes were asked of the {self.name}, of whose {total:,} bytes {free:,} are free; "
                "lower num_blocks, kv_cache_memory or max_num_batched_tokens, or use a smaller model."
            )
        address = self._memory.allocate(nbytes)
        self._allocated[address] = nbytes
        return address

    def free(self, address: int) -> None:
        self._memory.free(address)
        del self._allocated[address]

    def memory(self) -> tuple[int, int]:
        return self._total - sum(self._allocated.values()), self._total

    def host_array(self, nbytes: int) -> np.ndarray:
        return np.zeros(nbytes, np.uint8)

    def upload(self, address: int, source: np.ndarray) -> None:
        self._memory.write(address, source)

    def download(self, target: np.ndarray, address: int) -> None:
        target[...] = self._memory.read(address, target.shape, target.dtype)

    def fill(self, address: int, nbytes: int, byte: int) -> None:
        self._memory.fill(address, nbytes, byte)

    def function(self, kernel: Kernel) -> str:
        return compiled(kernel, self.compute_capability)

    def run(self, calls: Sequence[Call]) -> None:
        for call in calls:
            kernel = call.kernel
            self.num_launches += 1
            try:
                launch(
                    call.function,
                    kernel.entry,
                    call.grid,
                    (kernel.block, 1, 1),
                    list(argument_values(call).values()),
                    kernel.shared_bytes,
                    checks=self.checks,
                    memory=self._memory,
                )
            except (KernelFault, PTXError, DeviceMemoryError) as error:
                raise DeviceError(f"kernel {kernel.entry} on the {self.name}: {error}") from error

    def record(self, calls: Sequence[Call]) -> _Recording:
        return _Recording(self, calls)

    def synchronize(self) -> None:
        """Nothing to wait for: every call ends before the next begins."""

    def close(self) -> None:
        for address in list(self._allocated):
            self.free(address)


class _Recording:
    """Repeats its calls with the arguments they had."""

    def __init__(self, device: EmulatedDevice, calls: Sequence[Call]):
        self._device, self._calls = device, tuple(calls)

    def launch(self) -> None:
        self._device.run(self._calls)
