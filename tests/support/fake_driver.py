"""A CUDA driver without a card: the real ``cuda.bindings`` calls it, and it checks, remembers and interprets.

``cuda.bindings`` finds every driver function by asking ``libcuda.so.1`` for it. :func:`install` puts a library of
that name into this process, which asks Python instead, so the functions of :class:`FakeDriver` are the driver.
What a real one punishes is refused here too: a call from a thread without the context, addresses that were never
allocated, copies of more than an allocation has, and anything but launches while a stream is captured; what fails
meanwhile spoils the capture.

Device memory is the PTX interpreter's, and with ``interpret`` it runs the launches, which are noted in
``launches`` in any case: the whole path to a card is walked, up to the card.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cuda_kernels.toolchain.interpreter import launch
from cuda_kernels.toolchain.memory import DeviceMemory

SHIM = r"""
static void *(*find)(const char *);
void set_find(void *(*function)(const char *)) { find = function; }
#define FORWARD(name, parameters, arguments) \
    int name parameters { return ((int (*) parameters)find(#name)) arguments; }
FORWARD(cuInit, (unsigned flags), (flags))
FORWARD(cuDriverGetVersion, (int *version), (version))
FORWARD(cuDeviceGetCount, (int *count), (count))
FORWARD(cuDeviceGet, (int *device, int number), (device, number))
FORWARD(cuDeviceGetName, (char *name, int size, int device), (name, size, device))
FORWARD(cuDeviceGetAttribute, (int *value, int attribute, int device), (value, attribute, device))
int cuGetProcAddress_v2(const char *name, void **function, int version, unsigned long flags, int *status) {
    *function = find(name);
    if (status) *status = *function ? 0 : 1;
    return *function ? 0 : 500;
}
"""
INVALID_VALUE, OUT_OF_MEMORY, INVALID_CONTEXT, NOT_FOUND, UNSUPPORTED_IN_CAPTURE = 1, 2, 201, 500, 900
INVALID_CAPTURE = 901
ERRORS = {
    INVALID_VALUE: (b"CUDA_ERROR_INVALID_VALUE", b"invalid argument"),
    OUT_OF_MEMORY: (b"CUDA_ERROR_OUT_OF_MEMORY", b"out of memory"),
    INVALID_CONTEXT: (b"CUDA_ERROR_INVALID_CONTEXT", b"invalid device context"),
    NOT_FOUND: (b"CUDA_ERROR_NOT_FOUND", b"named symbol not found"),
    UNSUPPORTED_IN_CAPTURE: (b"CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", b"operation not permitted when capturing"),
    INVALID_CAPTURE: (b"CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", b"operation failed due to a previous error"),
    218: (b"CUDA_ERROR_INVALID_PTX", b"a PTX JIT compilation failed"),
    700: (b"CUDA_ERROR_ILLEGAL_ADDRESS", b"an illegal memory access was encountered"),
}
INT, U, P, S, U64 = ctypes.c_int, ctypes.c_uint, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint64
BYTE = ctypes.c_ubyte
CONTEXT, DEVICE = 0xC0, 0


class DriverFailure(Exception):
    """Raised inside the fake to return this status."""


@dataclass
class Launched:
    """One kernel as the driver was asked to run it; ``values`` are 8 bytes for each parameter."""

    ptx: str
    entry: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    values: list[int]


class FakeDriver:
    """Its state, and one method for each driver function, with pointers as addresses."""

    def __init__(self, capability=(8, 0), version=13000, total_memory=1 << 30, num_devices=1, interpret=False):
        self.capability, self.version, self.num_devices = capability, version, num_devices
        self.total_memory, self.interpret = total_memory, interpret
        self.memory = DeviceMemory()
        self.allocations: dict[int, int] = {}
        self.host_memory: dict[int, ctypes.Array] = {}
        self.modules: dict[int, str] = {}
        self.functions: dict[int, tuple[str, str]] = {}
        self.graphs: dict[int, list[Launched]] = {}
        self.dynamic_shared: dict[int, int] = {}
        self.capturing: list[Launched] | None = None
        self.capture_is_valid = True
        self.launches: list[Launched] = []
        self.graph_launches = self.num_context_switches = 0
        self.copies: list[tuple[str, int]] = []
        self.fail_next: int | None = None
        self.retained = 0
        self.current = threading.local()
        self._handles = iter(range(0x1000, 1 << 30, 16))
        self._keep: list = []

    # -- devices, contexts, streams ---------------------------------------------------------------

    def cuInit(self, flags: U):
        pass

    def cuDriverGetVersion(self, out: P):
        write(out, INT, self.version)

    def cuDeviceGetCount(self, out: P):
        write(out, INT, self.num_devices)

    def cuDeviceGet(self, out: P, number: INT):
        require(0 <= number < self.num_devices)
        write(out, INT, DEVICE)

    def cuDeviceGetName(self, out: P, size: INT, device: INT):
        name = b"Imaginary card\0"
        ctypes.memmove(out, name, min(len(name), size))

    def cuDeviceGetAttribute(self, out: P, attribute: INT, device: INT):
        values = {75: self.capability[0], 76: self.capability[1], 16: 108}
        require(attribute in values)
        write(out, INT, values[attribute])

    def cuDevicePrimaryCtxRetain(self, out: P, device: INT):
        self.retained += 1
        write(out, P, CONTEXT)

    def cuDevicePrimaryCtxRelease(self, device: INT):
        require(self.retained > 0)
        self.retained -= 1

    def cuCtxSetCurrent(self, context: P):
        require(context == CONTEXT)
        self.current.context = context
        self.num_context_switches += 1

    def cuStreamCreate(self, out: P, flags: U):
        self._need_context()
        write(out, P, next(self._handles))

    def cuStreamDestroy(self, stream: P):
        self._need_context()

    def cuStreamSynchronize(self, stream: P):
        self._need_context()
        self._not_capturing()

    # -- memory -----------------------------------------------------------------------------------

    def cuMemAlloc(self, out: P, size: S):
        self._need_context()
        require(size > 0)
        if size > self._free_bytes():
            raise DriverFailure(OUT_OF_MEMORY)
        address = self.memory.allocate(size)
        self.allocations[address] = size
        write(out, U64, address)

    def cuMemFree(self, address: U64):
        self._need_context()
        require(address in self.allocations)
        del self.allocations[address]
        self.memory.free(address)

    def cuMemGetInfo(self, free: P, total: P):
        self._need_context()
        write(free, S, self._free_bytes())
        write(total, S, self.total_memory)

    def cuMemHostAlloc(self, out: P, size: S, flags: U):
        self._need_context()
        memory = (ctypes.c_uint8 * size)()
        self.host_memory[ctypes.addressof(memory)] = memory
        write(out, P, ctypes.addressof(memory))

    def cuMemFreeHost(self, address: P):
        require(address in self.host_memory)
        del self.host_memory[address]

    def cuMemcpyHtoDAsync(self, target: U64, source: P, size: S, stream: P):
        self._need_range(target, size)
        self.copies.append(("upload", size))
        self.memory.write(target, np.frombuffer(ctypes.string_at(source, size), np.uint8))

    def cuMemcpyDtoHAsync(self, target: P, source: U64, size: S, stream: P):
        self._need_range(source, size)
        self.copies.append(("download", size))
        ctypes.memmove(target, self.memory.read(source, size, np.uint8).tobytes(), size)

    def cuMemsetD8Async(self, address: U64, value: BYTE, size: S, stream: P):
        self._need_range(address, size)
        self.memory.fill(address, size, value)

    def _need_range(self, address: int, size: int):
        """All of these bytes lie in one allocation, and this is no time of capturing."""
        self._need_context()
        self._not_capturing()
        require(any(start <= address and address + size <= start + n for start, n in self.allocations.items()))

    def _free_bytes(self) -> int:
        return self.total_memory - sum(self.allocations.values())

    # -- kernels and graphs -----------------------------------------------------------------------

    def cuModuleLoadDataEx(self, out: P, image: P, count: U, options: P, values: P):
        self._need_context()
        self._not_capturing()
        ptx = ctypes.string_at(image).decode()
        if ".entry" not in ptx:
            names = (INT * count).from_address(options)
            pointers = (P * count).from_address(values)
            given = dict(zip(names, pointers, strict=True))
            text = b"ptxas fatal: no entry\0"
            if 5 in given:  # CU_JIT_ERROR_LOG_BUFFER
                ctypes.memmove(given[5], text, len(text))
            raise DriverFailure(218)
        handle = next(self._handles)
        self.modules[handle] = ptx
        write(out, P, handle)

    def cuModuleGetFunction(self, out: P, module: P, name: P):
        ptx, entry = self.modules[module], ctypes.string_at(name).decode()
        if not re.search(rf"\.entry\s+{re.escape(entry)}\s*\(", ptx):
            raise DriverFailure(NOT_FOUND)
        handle = next(self._handles)
        self.functions[handle] = ptx, entry
        write(out, P, handle)

    def cuModuleUnload(self, module: P):
        require(self.modules.pop(module, None) is not None)

    def cuFuncSetAttribute(self, function: P, attribute: INT, value: INT):
        require(function in self.functions and attribute == 8)  # MAX_DYNAMIC_SHARED_SIZE_BYTES
        self.dynamic_shared[function] = value

    def cuLaunchKernel(
        self, function: P, gx: U, gy: U, gz: U, bx: U, by: U, bz: U, shared: U, stream: P, arguments: P, extra: P
    ):
        self._need_context()
        require(function in self.functions and not extra)
        require(0 < gx < 2**31 and 0 < gy < 65536 and 0 < gz < 65536 and 0 < bx * by * bz <= 1024)
        require(shared <= max(48 * 1024, self.dynamic_shared.get(function, 0)))
        ptx, entry = self.functions[function]
        count = _parameters(ptx, entry).count(".param")
        addresses = (P * count).from_address(arguments) if count else []
        values = [U64.from_address(address).value for address in addresses]
        launched = Launched(ptx, entry, (gx, gy, gz), (bx, by, bz), shared, values)
        if self.capturing is not None:
            self.capturing.append(launched)
        else:
            self._start(launched)

    def _start(self, launched: Launched):
        self.launches.append(launched)
        if self.interpret:
            kinds = re.findall(r"\.param\s+\.(?:align\s+\d+\s+\.)?(\w+)", _parameters(launched.ptx, launched.entry))
            values = [
                np.uint32(value & 0xFFFFFFFF).view(np.float32) if kind == "f32" else value
                for kind, value in zip(kinds, launched.values, strict=True)
            ]
            launch(
                launched.ptx, launched.entry, launched.grid, launched.block, values, launched.shared_bytes,
                memory=self.memory,
            )  # fmt: skip

    def cuStreamBeginCapture(self, stream: P, mode: INT):
        self._need_context()
        self._not_capturing()
        self.capturing, self.capture_is_valid = [], True

    def cuStreamEndCapture(self, stream: P, out: P):
        require(self.capturing is not None)
        captured, self.capturing = self.capturing, None
        if not self.capture_is_valid:
            raise DriverFailure(INVALID_CAPTURE)
        handle = next(self._handles)
        self.graphs[handle] = captured
        write(out, P, handle)

    def cuGraphInstantiateWithFlags(self, out: P, graph: P, flags: U64):
        handle = next(self._handles)
        self.graphs[handle] = list(self.graphs[graph])
        write(out, P, handle)

    def cuGraphLaunch(self, executable: P, stream: P):
        self._need_context()
        self.graph_launches += 1
        for launched in self.graphs[executable]:
            self._start(launched)

    def cuGraphDestroy(self, graph: P):
        require(self.graphs.pop(graph, None) is not None)

    def cuGraphExecDestroy(self, executable: P):
        require(self.graphs.pop(executable, None) is not None)

    # -- errors -----------------------------------------------------------------------------------

    def cuGetErrorName(self, status: INT, out: P):
        self._error_text(status, 0, out)

    def cuGetErrorString(self, status: INT, out: P):
        self._error_text(status, 1, out)

    def _error_text(self, status, index, out):
        require(status in ERRORS)
        text = ctypes.create_string_buffer(ERRORS[status][index])
        self._keep.append(text)
        write(out, P, ctypes.addressof(text))

    def _need_context(self):
        if getattr(self.current, "context", None) != CONTEXT:
            raise DriverFailure(INVALID_CONTEXT)
        if self.fail_next is not None:
            status, self.fail_next = self.fail_next, None
            raise DriverFailure(status)

    def _not_capturing(self):
        if self.capturing is not None:
            raise DriverFailure(UNSUPPORTED_IN_CAPTURE)


def _parameters(ptx: str, entry: str) -> str:
    return re.search(rf"\.entry\s+{re.escape(entry)}\s*\((.*?)\)", ptx, re.S).group(1)


def write(address: int, kind, value) -> None:
    kind.from_address(address).value = value


def require(condition: bool) -> None:
    if not condition:
        raise DriverFailure(INVALID_VALUE)


_installed: dict[str, object] = {}


def install(folder: Path, **options) -> FakeDriver:
    """Make a fake driver this process's CUDA driver, for good; ``folder`` receives the library.

    A second call replaces the driver's state. Needs a C compiler (``cc``).
    """
    driver = _installed["driver"] = FakeDriver(**options)
    if "library" in _installed:
        return driver
    source, library = Path(folder) / "shim.c", Path(folder) / "libcuda.so.1"
    source.write_text(SHIM)
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, source], check=True, capture_output=True
    )
    loaded = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)  # dlopen("libcuda.so.1") finds it from now on
    callbacks: dict[str, object] = {}

    def find(name: bytes) -> int:
        name = name.decode()
        if name.startswith("_") or not hasattr(FakeDriver, name):
            return 0
        if name not in callbacks:
            callbacks[name] = _callback(name)
        return ctypes.cast(callbacks[name], P).value

    finder = ctypes.CFUNCTYPE(P, ctypes.c_char_p)(find)
    loaded.set_find(finder)
    _installed["library"] = (loaded, finder, callbacks)
    return driver


def _callback(name: str):
    """The C function behind ``name``: calls the method of the driver that is installed now."""
    annotations = getattr(FakeDriver, name).__annotations__
    kinds = [globals()[kind] for kind in annotations.values()]

    def call(*arguments):
        try:
            getattr(_installed["driver"], name)(*arguments)
        except DriverFailure as failure:
            _installed["driver"].capture_is_valid = False
            return failure.args[0]
        return 0

    return ctypes.CFUNCTYPE(INT, *kinds)(call)
