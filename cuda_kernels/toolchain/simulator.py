"""Runs a kernel's Python itself, thread by thread: to step through it in a debugger, and to print from it.

Each thread is a greenlet that runs until it must wait for others: at a barrier for its block, at a shuffle, vote
or tensor-core product for its warp. Shared memory begins as NaN (0xFF in every byte), indices outside of an array
raise, and a wait that nobody ends is a :class:`Deadlock`. There are no types here: arithmetic is NumPy's and
Python's, so the PTX interpreter has the last word on results. numba's ``@cuda.jit`` functions are taken apart into
the Python functions they came from; intrinsics are replaced by their twins in ``simulator_intrinsics.py``.
"""

from __future__ import annotations

import sys
import types
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
from greenlet import getcurrent, greenlet
from numba.core.types import Type
from numba.np.numpy_support import as_dtype

from cuda_kernels import intrinsics
from cuda_kernels.kernel import Kernel

WARP = 32


class Deadlock(Exception):
    """Threads wait for others that will never come."""


def _dtype(type_) -> np.dtype:
    """NumPy's type for a Numba type, or for the conversion that stands for one in a kernel."""
    return as_dtype(getattr(type_, "type", type_))


def _low_bits(value, dtype: np.dtype):
    return np.array(int(value) & ((1 << 8 * dtype.itemsize) - 1), f"u{dtype.itemsize}").view(dtype)[()]


class Pointer:
    """A flat pointer: elements of one type from some byte of an array on. No index may leave the array."""

    def __init__(self, array: np.ndarray, name: str) -> None:
        self.array, self.name = array, name
        self.dtype = array.dtype

    def _at(self, index) -> int:
        index = int(index)
        if not 0 <= index < self.array.size:
            raise IndexError(f"element {index} of {self.name}, which has {self.array.size}")
        return index

    def __getitem__(self, index):
        return self.array[self._at(index)]

    def __setitem__(self, index, value) -> None:
        if isinstance(value, (int, np.integer)) and self.dtype.kind in "iu":  # as a card: keep the low bits
            value = _low_bits(value, self.dtype)
        self.array[self._at(index)] = value

    def words(self, index, count: int) -> np.ndarray:
        """``count`` uint32 from element ``index`` on, as a view that can be written."""
        start = int(index) * self.dtype.itemsize
        data = self.array.view(np.uint8)
        if not 0 <= start <= data.size - 4 * count:
            raise IndexError(f"{4 * count} bytes from byte {start} of {self.name}, which has {data.size}")
        if start % (4 * count):
            raise IndexError(f"byte {start} of {self.name} is not aligned for {4 * count} bytes")
        return data[start : start + 4 * count].view(np.uint32)

    def reinterpret(self, index, dtype) -> Pointer:
        data = self.array.view(np.uint8)[int(index) * self.dtype.itemsize :]
        dtype = _dtype(dtype)
        return Pointer(data[: data.size // dtype.itemsize * dtype.itemsize].view(dtype), self.name)


class Lane(greenlet):
    """One thread. ``request``: what it waits for, ``answer``: what it got."""

    def __init__(self, body, block: Block, number: int) -> None:
        super().__init__(body)
        self.block, self.number = block, number
        self.request = self.answer = None
        self.copies: list[list] = [[]]  # cp.async: groups of (target, data), the newest last

    @property
    def lane(self) -> int:
        return self.number % WARP

    def wait(self, *request):
        self.request = request
        self.parent.switch()
        return self.answer


class Block:
    """The threads of one block until all have ended."""

    def __init__(self, function, arguments, index, grid, size: int, shared_bytes: int) -> None:
        self.index, self.grid, self.size = index, grid, size
        self.dynamic = np.full(shared_bytes, 0xFF, np.uint8)
        self.shared: dict[tuple, Pointer] = {}
        self.lanes = [Lane(lambda: function(*arguments), self, number) for number in range(size)]

    def run(self) -> None:
        ready = list(self.lanes)
        while ready:
            for lane in ready:
                lane.parent = getcurrent()
                lane.switch()
            living = [lane for lane in self.lanes if not lane.dead]
            ready = self._block_wide(living) or self._warp_wide(living)
            if living and not ready:
                waiting = {lane.number: lane.request[0] for lane in living[:8]}
                raise Deadlock(f"block {self.index}: threads wait at {waiting}")

    def _block_wide(self, living: list[Lane]) -> list[Lane]:
        if not living or any(lane.request[0] != "block" for lane in living):
            return []
        values = [bool(lane.request[2]) for lane in living]
        for lane in living:
            lane.answer = lane.request[1](values)
        return living

    def _warp_wide(self, living: list[Lane]) -> list[Lane]:
        """Answers each warp operation that all the lanes it names have reached."""
        warps, released = defaultdict(list), []
        for lane in living:
            warps[lane.number // WARP].append(lane)
        for lanes in warps.values():
            groups = defaultdict(dict)
            for lane in lanes:
                if lane.request[0] == "warp":
                    groups[lane.request[1:3]][lane.lane] = lane  # by operation and members
            for (operation, members), here in groups.items():
                alive = {lane.lane for lane in lanes}
                if {number for number in alive if members >> number & 1} <= here.keys():
                    values = {number: lane.request[3] for number, lane in here.items()}
                    for number, lane in here.items():
                        lane.answer = operation(number, values)
                    released += here.values()
        return released


def warp_operation(operation, members: int, value):
    """Meets the lanes of ``members``; ``operation(own lane, {lane: value})`` gives each its answer."""
    return getcurrent().wait("warp", operation, int(members) & 0xFFFFFFFF, value)


def _shuffle(source):
    def operation(number, values):
        value, argument = values[number]
        other = source(number, argument)
        return values[other][0] if 0 <= other < WARP and other in values else value

    return operation


_IDX = _shuffle(lambda number, argument: argument % WARP)
_UP = _shuffle(lambda number, argument: number - argument)
_DOWN = _shuffle(lambda number, argument: number + argument)
_XOR = _shuffle(lambda number, argument: number ^ argument)


def _bits(lanes) -> np.uint32:
    return np.uint32(sum(1 << number for number in lanes))


def _ballot(number, values):
    return _bits(n for n, value in values.items() if value)


def _any(number, values):
    return any(values.values())


def _all(number, values):
    return all(values.values())


def _match(number, values):
    return _bits(n for n, value in values.items() if value == values[number])


def _meet(number, values):
    return None


class _Dimension:
    """``cuda.threadIdx`` and its like: asks the running thread."""

    def __init__(self, of) -> None:
        self._of = of

    x = property(lambda self: self._of(getcurrent())[0])
    y = property(lambda self: self._of(getcurrent())[1])
    z = property(lambda self: self._of(getcurrent())[2])


class _SharedMemory:
    @staticmethod
    def array(shape, dtype, alignment=None):
        """The block's own array of this place in the code; of shape 0, its dynamic shared memory."""
        caller, block, dtype = sys._getframe(1), getcurrent().block, _dtype(dtype)
        if shape == 0:
            return Pointer(block.dynamic[: block.dynamic.size // dtype.itemsize * dtype.itemsize].view(dtype), "shared")
        key = caller.f_code, caller.f_lasti
        if key not in block.shared:
            data = np.full(int(np.prod(shape)) * dtype.itemsize, 0xFF, np.uint8).view(dtype)
            block.shared[key] = Pointer(data, f"shared array of {caller.f_code.co_name}")
        return block.shared[key]


class _LocalMemory:
    @staticmethod
    def array(shape, dtype, alignment=None):
        dtype = _dtype(dtype)
        return Pointer(np.full(int(np.prod(shape)) * dtype.itemsize, 0xFF, np.uint8).view(dtype), "local array")


def _barrier(combine=lambda values: None):
    return lambda value=True: getcurrent().wait("block", combine, value)


#: What a kernel sees as ``cuda``.
CUDA = SimpleNamespace(
    threadIdx=_Dimension(lambda lane: (lane.number, 0, 0)),
    blockIdx=_Dimension(lambda lane: lane.block.index),
    blockDim=_Dimension(lambda lane: (lane.block.size, 1, 1)),
    gridDim=_Dimension(lambda lane: lane.block.grid),
    shared=_SharedMemory,
    local=_LocalMemory,
    syncthreads=_barrier(),
    syncthreads_count=_barrier(sum),
    syncthreads_and=_barrier(all),
    syncthreads_or=_barrier(any),
    syncwarp=lambda members=0xFFFFFFFF: warp_operation(_meet, members, None),
    shfl_sync=lambda members, value, lane: warp_operation(_IDX, members, (value, int(lane))),
    shfl_up_sync=lambda members, value, by: warp_operation(_UP, members, (value, int(by))),
    shfl_down_sync=lambda members, value, by: warp_operation(_DOWN, members, (value, int(by))),
    shfl_xor_sync=lambda members, value, by: warp_operation(_XOR, members, (value, int(by))),
    ballot_sync=lambda members, value: warp_operation(_ballot, members, bool(value)),
    any_sync=lambda members, value: warp_operation(_any, members, bool(value)),
    all_sync=lambda members, value: warp_operation(_all, members, bool(value)),
    match_any_sync=lambda members, value: warp_operation(_match, members, value),
    popc=lambda value: int(value).bit_count() if hasattr(int, "bit_count") else bin(int(value)).count("1"),
    clz=lambda value: 32 - int(value).bit_length(),
    ffs=lambda value: (int(value) & -int(value)).bit_length(),
    fma=lambda a, b, c: a * b + c,
)


def _convert(type_):
    """A Numba type as a conversion: integers keep their low bits."""
    dtype = as_dtype(type_)

    def convert(value):
        if dtype.kind in "iu":
            return _low_bits(value, dtype)
        return dtype.type(value)

    convert.type = type_
    return convert


def as_python(value, done: dict | None = None):
    """``value`` as the simulator needs it: jitted functions, intrinsics, types and ``cuda`` replaced, however deep."""
    from cuda_kernels.toolchain.simulator_intrinsics import TWINS

    done = {} if done is None else done
    if isinstance(value, types.ModuleType):
        return CUDA if value.__name__ in ("numba.cuda", "numba.cuda.simulator") else value
    if isinstance(value, Type):
        return _convert(value)
    if type(value).__name__ == "_Intrinsic":
        return TWINS[next(name for name, each in vars(intrinsics).items() if each is value)]
    function = getattr(value, "py_func", value)
    if not isinstance(function, types.FunctionType) or function.__module__.split(".")[0] in ("math", "numpy", "numba"):
        return value
    if function not in done:
        cells = [types.CellType() for _ in function.__closure__ or ()]
        names = {}
        done[function] = types.FunctionType(
            function.__code__, names, function.__name__, function.__defaults__, tuple(cells)
        )
        done[function].__kwdefaults__ = function.__kwdefaults__
        used = set(_names(function.__code__))
        names["__builtins__"] = __builtins__
        names |= {name: as_python(each, done) for name, each in function.__globals__.items() if name in used}
        for cell, original in zip(cells, function.__closure__ or (), strict=True):
            cell.cell_contents = as_python(original.cell_contents, done)
    return done[function]


def _names(code):
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _elements(array: np.ndarray, type_) -> np.ndarray:
    """The array's memory in elements as wide as ``type_``: a card knows the pointer's type alone."""
    flat, dtype = array.reshape(-1), _dtype(type_)
    return flat if flat.itemsize == dtype.itemsize else flat.view(dtype)


def run(kernel: Kernel, grid, arguments, shared_bytes: int | None = None) -> None:
    """Runs ``kernel`` on NumPy arrays, which it writes to, and scalars."""
    body, names = as_python(kernel.body), kernel.body.__code__.co_varnames
    values = [
        Pointer(_elements(each, type_.dtype), names[number]) if isinstance(each, np.ndarray) else as_python(type_)(each)
        for number, (each, type_) in enumerate(zip(arguments, kernel.signature, strict=True))
    ]
    grid = (*np.atleast_1d(grid).tolist(), 1, 1)[:3]
    shared_bytes = kernel.shared_bytes if shared_bytes is None else shared_bytes
    with np.errstate(all="ignore"):
        for number in range(grid[0] * grid[1] * grid[2]):
            index = (number % grid[0], number // grid[0] % grid[1], number // (grid[0] * grid[1]))
            Block(body, values, index, grid, kernel.block, shared_bytes).run()
