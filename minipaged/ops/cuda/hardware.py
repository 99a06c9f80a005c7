"""A card, through the CUDA driver: one context, one stream, and every call checked.

The driver is reached by ``cuda.bindings.driver``, whose functions are those of the CUDA driver API and return
``(status, *results)``. The PTX that it compiles for the card is the very text that the interpreter runs.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Sequence

import numpy as np

from cuda_kernels.kernel import Kernel
from minipaged.errors import DeviceError, OutOfDeviceMemoryError

from .compiled import compiled
from .device import Call

STATIC_SHARED_LIMIT = 48 * 1024  # bytes of shared memory a block; for more, a kernel must ask
# Whose context the driver holds as this thread's. Not kept by thread id: a new thread may get that of one that ended.
_current = threading.local()


class HardwareDevice:
    """The card with this number, as the driver counts them (see :class:`~minipaged.ops.cuda.device.Device`).

    ``target``: compile for this older compute capability; ``None``: for the card's own.
    """

    emulated = False

    def __init__(self, number: int = 0, target: tuple[int, int] | None = None):
        from cuda.bindings import driver

        self._api = driver
        self._token = object()
        self._lock = threading.RLock()  # what another thread asks for must not end up in a graph
        self._context = None
        self._functions: dict[int, tuple[Kernel, object]] = {}
        self._allocations: set[int] = set()
        self._to_destroy: list[tuple[str, object]] = []  # driver function, handle
        self.num_launches = 0
        self._call("cuInit", 0)
        device = self._call("cuDeviceGet", number)
        attribute = driver.CUdevice_attribute
        major = self._call("cuDeviceGetAttribute", attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device)
        minor = self._call("cuDeviceGetAttribute", attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device)
        self.compute_capability = target or (major, minor)
        self.name = self._call("cuDeviceGetName", 256, device).split(b"\0")[0].decode(errors="replace")
        self._device = device
        self._context = self._call("cuDevicePrimaryCtxRetain", device)
        self._stream = self._call("cuStreamCreate", driver.CUstream_flags.CU_STREAM_NON_BLOCKING)

    # -- memory -----------------------------------------------------------------------------------

    def allocate(self, nbytes: int) -> int:
        address = int(self._call("cuMemAlloc", nbytes))
        self._allocations.add(address)
        return address

    def free(self, address: int) -> None:
        self._call("cuMemFree", address)
        self._allocations.remove(address)

    def memory(self) -> tuple[int, int]:
        free, total = self._call("cuMemGetInfo")
        return int(free), int(total)

    def host_array(self, nbytes: int) -> np.ndarray:
        address = int(self._call("cuMemHostAlloc", nbytes, 0))
        self._to_destroy.append(("cuMemFreeHost", address))
        return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))

    def upload(self, address: int, source: np.ndarray) -> None:
        self._call("cuMemcpyHtoDAsync", address, source.ctypes.data, source.nbytes, self._stream)

    def download(self, target: np.ndarray, address: int) -> None:
        self._call("cuMemcpyDtoHAsync", target.ctypes.data, address, target.nbytes, self._stream)

    def fill(self, address: int, nbytes: int, byte: int) -> None:
        self._call("cuMemsetD8Async", address, byte, nbytes, self._stream)

    # -- kernels ----------------------------------------------------------------------------------

    def function(self, kernel: Kernel):
        if id(kernel) not in self._functions:
            ptx = compiled(kernel, compile_target(self.compute_capability))
            module = self._load(kernel.entry, ptx)
            function = self._call("cuModuleGetFunction", module, kernel.entry.encode())
            if kernel.shared_bytes > STATIC_SHARED_LIMIT:
                attribute = self._api.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                self._call("cuFuncSetAttribute", function, attribute, kernel.shared_bytes)
            self._functions[id(kernel)] = kernel, function
        return self._functions[id(kernel)][1]

    def _load(self, entry: str, ptx: str):
        """The driver compiles ``ptx``; what it complains about becomes the error's text."""
        option = self._api.CUjit_option
        log = bytearray(8192)
        options = [option.CU_JIT_ERROR_LOG_BUFFER, option.CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES]
        try:
            module = self._call("cuModuleLoadDataEx", ptx.encode() + b"\0", 2, options, [log, len(log)])
        except DeviceError as error:
            said = bytes(log).split(b"\0")[0].decode(errors="replace").strip()
            raise DeviceError(f"kernel {entry} could not be loaded: {error} {said}".strip()) from None
        self._to_destroy.append(("cuModuleUnload", module))
        return module

    def run(self, calls: Sequence[Call]) -> None:
        for call in calls:
            kernel = call.kernel
            self._call(
                "cuLaunchKernel",
                call.function,
                *call.grid,
                *(kernel.block, 1, 1),
                kernel.shared_bytes,
                self._stream,
                call.pointers.ctypes.data,
                0,
            )
        self.num_launches += len(calls)

    def record(self, calls: Sequence[Call]) -> _Graph:
        return _Graph(self, calls)

    def synchronize(self) -> None:
        self._call("cuStreamSynchronize", self._stream)

    def close(self) -> None:
        if self._context is None:
            return
        cleanup = [("cuStreamSynchronize", self._stream)]
        cleanup += [("cuMemFree", address) for address in self._allocations]
        cleanup += reversed(self._to_destroy)
        cleanup.append(("cuStreamDestroy", self._stream))
        for function, handle in cleanup:
            with contextlib.suppress(DeviceError):  # after a fault of a kernel everything fails, and all is lost anyway
                self._call(function, handle)
        self._context = None
        self._call("cuDevicePrimaryCtxRelease", self._device)

    # -- the driver -------------------------------------------------------------------------------

    def _call(self, function: str, *arguments):
        """Call the driver from whichever thread this is; its results, or an error with its words."""
        api = self._api
        with self._lock:
            if self._context is not None and getattr(_current, "token", None) is not self._token:
                _current.token = self._token
                self._call("cuCtxSetCurrent", self._context)
            status, *results = getattr(api, function)(*arguments)
        if status != api.CUresult.CUDA_SUCCESS:
            raise self._error(status, function, arguments)
        return results[0] if len(results) == 1 else results

    def _error(self, status, function: str, arguments: tuple) -> DeviceError:
        if function in ("cuMemAlloc", "cuMemHostAlloc") and status == self._api.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            free, total = self.memory()
            return OutOfDeviceMemoryError(
                f"{arguments[0]:,} bytes were asked of {self.name}, of whose {total:,} bytes {free:,} are free; lower "
                "num_blocks, kv_cache_memory or max_num_batched_tokens, or use a smaller or quantized model."
            )
        known, text = self._api.cuGetErrorString(status)
        known, name = self._api.cuGetErrorName(status)
        name, text = (words.decode() if words else "?" for words in (name, text))
        return DeviceError(f"{function} failed on {getattr(self, 'name', 'the CUDA device')}: {name} ({text}).")


class _Graph:
    """Launches that were captured from the stream once, and are repeated by one call."""

    def __init__(self, device: HardwareDevice, calls: Sequence[Call]):
        self._device, self._calls = device, tuple(calls)  # their arguments were copied, their functions were not
        api, call = device._api, device._call
        with device._lock:
            call("cuStreamBeginCapture", device._stream, api.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
            try:
                device.run(calls)
            except DeviceError:
                # The stream must leave its capture, which the failure has made invalid: that is said again here.
                with contextlib.suppress(DeviceError):
                    call("cuGraphDestroy", call("cuStreamEndCapture", device._stream))
                raise
            graph = call("cuStreamEndCapture", device._stream)
        device.num_launches -= len(calls)  # they were noted down, not started
        self._executable = call("cuGraphInstantiate", graph, 0)
        call("cuGraphDestroy", graph)
        device._to_destroy.append(("cuGraphExecDestroy", self._executable))

    def launch(self) -> None:
        """Start all kernels, in their order."""
        self._device._call("cuGraphLaunch", self._executable, self._device._stream)
        self._device.num_launches += len(self._calls)


KNOWN_TARGETS = ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))


def compile_target(compute_capability: tuple[int, int]) -> tuple[int, int]:
    """The newest target that this card runs: PTX for an older one is compiled for it by the driver."""
    return max(target for target in KNOWN_TARGETS if target <= compute_capability)
