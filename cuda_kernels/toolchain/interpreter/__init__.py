"""A PTX interpreter in NumPy: it runs the very PTX that a driver would load, and watches every access.

``program.py`` parses; ``machine.py`` holds threads, and ``control.py`` says who runs next; ``arithmetic.py``,
``bits.py``, ``conversions.py``, ``memory_access.py``, ``async_copy.py`` and ``warp_operations.py`` say what
instructions do; ``faults.py`` holds the check of races; ``counters.py`` counts.

Not modelled: time, caches, the order of blocks (they run in order, and nothing may depend on it), calls,
barriers other than 0, the grid-wide barrier, and the last bits of ``.approx`` functions and of tensor cores.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import lru_cache

import numpy as np

from cuda_kernels.kernel import Kernel
from cuda_kernels.toolchain.compile import compile_ptx
from cuda_kernels.toolchain.interpreter.counters import Counters, kind_of
from cuda_kernels.toolchain.interpreter.faults import KernelFault, Shadow
from cuda_kernels.toolchain.interpreter.machine import MAX_STEPS, Machine
from cuda_kernels.toolchain.interpreter.memory_access import granule_shift
from cuda_kernels.toolchain.interpreter.program import DTYPES, Program, PTXError, parse
from cuda_kernels.toolchain.memory import FIRST_ALLOCATION, OFFSET_BITS, DeviceMemory, DeviceMemoryError

__all__ = ["Counters", "KernelFault", "PTXError", "kind_of", "launch", "run"]

THREADS_AT_ONCE = 8192
MACHINES_KEPT = 32

_machines: OrderedDict[tuple, Machine] = OrderedDict()


@lru_cache(maxsize=256)
def _parsed(ptx: str) -> Program:
    return parse(ptx)


def launch(
    ptx: str,
    entry: str,
    grid,
    block,
    args,
    shared_bytes: int = 0,
    checks: bool = True,
    memory: DeviceMemory | None = None,
    max_steps: int = MAX_STEPS,
    on_access=None,
) -> Counters:
    """Runs the kernel ``entry`` of ``ptx`` over ``grid`` blocks of ``block`` threads (ints or up to three of them).

    ``args`` are pointers into ``memory`` and scalars, in the order of the signature; ``shared_bytes`` is dynamic
    shared memory. Raises :class:`KernelFault` for what a kernel may not do, :class:`PTXError` for PTX that is not
    understood. Without ``checks`` only bounds and alignment are watched and only instructions counted. A chunk of
    blocks that does not end within ``max_steps`` basic blocks counts as endless. ``on_access`` is told of each load
    and store (see :mod:`cuda_kernels.toolchain.accesses`).
    """
    program = _parsed(ptx)
    if program.entry != entry:
        raise PTXError(f"the PTX has the entry {program.entry}, not {entry}")
    grid, block = _three(grid), _three(block)
    values = _arguments(program, args)
    memory = memory or DeviceMemory()
    counters = Counters(program)
    threads_per_block = -(-block[0] * block[1] * block[2] // 32) * 32
    num_blocks = grid[0] * grid[1] * grid[2]
    at_once = max(1, min(num_blocks, THREADS_AT_ONCE // threads_per_block))
    constants = {name: memory.upload(values, name) for name, values in program.constants.items()}
    shadowed = _shadow_written(program, memory, values) if checks else []
    try:
        for first in range(0, num_blocks, at_once):
            count = min(at_once, num_blocks - first)
            machine = _machine(program, count, block, shared_bytes, checks)
            machine.on_access = on_access
            machine.load(grid, first, values, memory, constants)
            counters = counters + machine.run(max_steps)
    finally:
        for allocation in shadowed:
            allocation.shadow = None
        for pointer in constants.values():
            memory.free(pointer)
    return counters


def run(
    kernel: Kernel,
    grid,
    args,
    cc=(8, 0),
    checks: bool = True,
    block: int | None = None,
    shared_bytes=None,
    on_access=None,
) -> Counters:
    """Compiles ``kernel`` for ``cc`` and runs it on NumPy arrays and scalars.

    Each array becomes an allocation of its own, and afterwards holds what the kernel left there.
    """
    memory, names = DeviceMemory(), kernel.body.__code__.co_varnames
    values = [memory.upload(arg, name) if isinstance(arg, np.ndarray) else arg for arg, name in zip(args, names)]  # noqa: B905
    counters = launch(
        compile_ptx(kernel, cc),
        kernel.entry,
        grid,
        block or kernel.block,
        values,
        kernel.shared_bytes if shared_bytes is None else shared_bytes,
        checks,
        memory,
        on_access=on_access,
    )
    for arg, value in zip(args, values, strict=True):
        if isinstance(arg, np.ndarray):
            arg[...] = memory.read(value, arg.shape, arg.dtype)
    return counters


def _three(size) -> tuple[int, int, int]:
    sizes = tuple(int(each) for each in np.atleast_1d(size))
    return (*sizes, 1, 1)[:3]


def _arguments(program: Program, args) -> list[np.ndarray]:
    """Each argument as the unsigned integer of its parameter's width."""
    if len(args) != len(program.parameters):
        raise PTXError(f"{program.entry} has {len(program.parameters)} parameters, {len(args)} were given")
    values = []
    for arg, (_, type_) in zip(args, program.parameters, strict=True):
        dtype = DTYPES[type_]
        if dtype.kind != "f":
            bits = int(arg) & ((1 << 8 * dtype.itemsize) - 1)
            values.append(np.uint64(bits).astype(f"u{dtype.itemsize}"))
        else:
            values.append(np.asarray(arg, dtype).view(f"u{dtype.itemsize}"))
    return values


def _machine(program: Program, num_blocks: int, block: tuple, shared_bytes: int, checks: bool) -> Machine:
    """A machine of the given shape, kept for the next launch of it."""
    key = (program.entry, id(program), num_blocks, block, shared_bytes, checks)
    machine = _machines.pop(key, None) or Machine(program, num_blocks, block, shared_bytes, checks)
    _machines[key] = machine
    if len(_machines) > MACHINES_KEPT:
        _machines.popitem(last=False)
    return machine


def _shadow_written(program: Program, memory: DeviceMemory, values: list[np.ndarray]) -> list:
    """Gives a shadow to each allocation that a store of the program may write."""
    shift = granule_shift(program, "global")
    shadowed = []
    for number in program.stored_parameters():
        pointer = int(values[number])
        if pointer >> OFFSET_BITS < FIRST_ALLOCATION:
            continue
        try:
            allocation, _ = memory.find(pointer)
        except DeviceMemoryError:
            continue  # a number that only looks like a pointer, or a fault that the access itself will show
        if allocation.shadow is None:
            allocation.shadow = Shadow(allocation.data.size, shift)
            shadowed.append(allocation)
    return shadowed
