"""Loads, stores and atomics, with every check on the way to the bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from cuda_kernels.toolchain.interpreter.counters import count_sectors, count_wavefronts
from cuda_kernels.toolchain.interpreter.faults import KernelFault, Shadow
from cuda_kernels.toolchain.interpreter.program import DTYPES, Instruction, Program
from cuda_kernels.toolchain.memory import LOCAL_WINDOW, OFFSET_BITS, SHARED_WINDOW, DeviceMemoryError

_WINDOWS = {SHARED_WINDOW >> OFFSET_BITS: "shared", LOCAL_WINDOW >> OFFSET_BITS: "local"}
_HALF_ALLOCATION = 1 << (OFFSET_BITS - 1)


def granule_shift(program: Program, space: str) -> int:
    """log2 of the smallest access of ``program`` to ``space``: how finely a shadow of it must look."""
    sizes = [16]
    for each in program.instructions:
        if each.opcode in ("ld", "st", "atom", "red") and each.space in (space, None):
            sizes.append(DTYPES[each.type].itemsize)
        elif each.opcode == "cp" and len(each.operands) > 2:
            sizes.append(each.access_bytes)
    return min(sizes).bit_length() - 1


class SharedMemory:
    """Shared memory of all blocks of a machine, one after the other; what nobody wrote holds 0xFF."""

    name = "shared memory"

    def __init__(self, machine, program: Program, dynamic_bytes: int) -> None:
        self.limit = program.shared_bytes + dynamic_bytes
        self.stride = -(-self.limit // 128) * 128  # so that every block begins at bank 0
        self.data = np.full(max(16, machine.num_blocks * self.stride), 0xFF, np.uint8)
        self.base = np.arange(machine.num_threads) // machine.padded * self.stride
        self.shift = granule_shift(program, "shared")
        self.checks = machine.checks and self.limit > 0
        self.copies: list = []  # those under way: see async_copy.py

    def reset(self) -> None:
        self.data[...] = 0xFF
        self.shadow = Shadow(self.data.size, self.shift) if self.checks else None
        self.copies.clear()


class LocalMemory:
    """Each thread's own memory: what did not fit into registers, and arrays indexed at run time."""

    name = "local memory"
    shadow = None

    def __init__(self, machine, program: Program) -> None:
        self.limit = program.local_bytes
        self.stride = -(-self.limit // 16) * 16
        self.data = np.zeros(max(16, machine.num_threads * self.stride), np.uint8)
        self.base = np.arange(machine.num_threads) * self.stride

    def reset(self) -> None:
        self.data[...] = 0xFF


@dataclass
class _Access:
    """A part of an instruction's access that lies in one memory, inside its bounds.

    ``where`` picks the part out of the accessing lanes; ``offsets`` are into ``memory.data``.
    """

    memory: object
    where: np.ndarray | slice
    lanes: np.ndarray
    offsets: np.ndarray


class Accessor:
    """Turns the addresses of one instruction into checked and counted accesses."""

    def __init__(self, machine, instruction: Instruction, space: str | None, num_bytes: int, writes: bool) -> None:
        self.machine, self.instruction, self.space = machine, instruction, space
        self.num_bytes, self.writes = num_bytes, writes
        self.verb = "write" if writes else "read"
        self._wavefronts: dict[bytes, tuple[int, int]] = {}

    def fault(self, kind: str, lane, text: str) -> KernelFault:
        return KernelFault(
            kind,
            f"{self.machine.who(int(lane))}: {self.verb} of {self.num_bytes} bytes {text}: "
            f"{self.instruction.text} (instruction {self.instruction.index})",
        )

    def resolve(self, lanes: np.ndarray, addresses: np.ndarray) -> Iterator[_Access]:
        """The parts of an access at ``addresses``, each within one memory."""
        misaligned = addresses & (self.num_bytes - 1) != 0
        if misaligned.any():
            at = np.flatnonzero(misaligned)[0]
            hint = "; a shared array that is read in words needs alignment=16" if self.space == "shared" else ""
            raise self.fault("misaligned", lanes[at], f"at {hex(addresses[at])}{hint}")
        if self.space in ("shared", "local"):
            yield self._in_window(self.space, lanes, addresses, slice(None))
            return
        tags = (addresses + _HALF_ALLOCATION) >> OFFSET_BITS  # a little below its start still names an allocation
        if (tags == tags[0]).all():
            yield self._in_allocation(int(tags[0]), lanes, addresses, slice(None))
            return
        for tag in np.unique(tags).tolist():
            where = np.flatnonzero(tags == tag)
            yield self._in_allocation(tag, lanes[where], addresses[where], where)

    def _in_window(self, space: str, lanes, offsets, where) -> _Access:
        memory = self.machine.shared if space == "shared" else self.machine.local
        outside = (offsets < 0) | (offsets + self.num_bytes > memory.limit)
        if outside.any():
            at = np.flatnonzero(outside)[0]
            raise self.fault(
                "out of bounds", lanes[at], f"at offset {int(offsets[at])} of {memory.name}, which has {memory.limit}"
            )
        return _Access(memory, where, lanes, offsets + memory.base[lanes])

    def _in_allocation(self, tag: int, lanes, addresses, where) -> _Access:
        offsets = addresses - (tag << OFFSET_BITS)
        if self.space is None and tag in _WINDOWS:
            return self._in_window(_WINDOWS[tag], lanes, offsets, where)
        try:
            allocation, _ = self.machine.memory.find(tag << OFFSET_BITS)
        except DeviceMemoryError as error:
            raise self.fault("out of bounds", lanes[0], f"at {hex(addresses[0])}: {error}") from None
        size = allocation.data.size
        outside = (offsets < 0) | (offsets + self.num_bytes > size)
        if outside.any():
            at = np.flatnonzero(outside)[0]
            text = f"at offset {int(offsets[at])} of {allocation.name}, which has {size}"
            raise self.fault("out of bounds", lanes[at], text)
        return _Access(allocation, where, lanes, offsets)

    def check(self, access: _Access) -> None:
        """Order and initialisation; remembers the access for the checks of later ones."""
        if not self.machine.checks:
            return
        memory, shadow = access.memory, access.memory.shadow
        if not self.writes and shadow is None and getattr(memory, "written", None) is not None:
            self._check_written(access)
        if shadow is None:
            return
        at, count = shadow.granules(access.offsets, self.num_bytes)
        lanes = np.repeat(access.lanes, count) if count > 1 else access.lanes
        clock = self.machine.clock
        if shadow.copy_under_way[at].any():
            lane = lanes[np.flatnonzero(shadow.copy_under_way[at])[0]]
            raise self.fault("copy under way", lane, "where a cp.async has not been waited for")
        others = shadow.unordered_writer(clock, lanes, at)
        if others.any():
            self._race(access, lanes, at, others, shadow.writer[at], "written")
        if self.writes:
            others = shadow.unordered_reader(clock, lanes, at)
            if others.any():
                first, thread = shadow.first_reader[at], clock.thread[lanes]
                self._race(access, lanes, at, others, np.where(first == thread, shadow.last_reader[at], first), "read")
            several = shadow.write(clock, lanes, at)
            if several.any():
                self._race(access, lanes, at, several, shadow.writer[at], "written by the same instruction")
        else:
            if memory is self.machine.shared:
                if (shadow.writer[at] < 0).any():
                    lane = lanes[np.flatnonzero(shadow.writer[at] < 0)[0]]
                    raise self.fault("never written", lane, f"of {memory.name} that nobody wrote")
            elif memory.written is not None:
                self._check_written(access)
            shadow.read(clock, lanes, at)

    def _check_written(self, access: _Access) -> None:
        flags, indices = _written_flags(access, self.num_bytes)
        for at in indices:
            missing = flags[at] != _ALL_WRITTEN[flags.itemsize]
            if missing.any():
                first = np.flatnonzero(missing)[0]
                offset = int(access.offsets[first])
                raise self.fault("never written", access.lanes[first], f"at offset {offset} of {access.memory.name}")

    def _race(self, access, lanes, at, where, others, verb) -> None:
        machine = self.machine
        first = np.flatnonzero(where)[0]
        lane, other = int(lanes[first]), int(others[first])
        offset = int(at[first]) << access.memory.shadow.shift
        if access.memory is machine.shared:
            offset -= int(machine.shared.base[lane])
        block, thread = divmod(other, machine.padded)
        whose = f"thread {thread}" + (f" of block number {block}" if access.memory is not machine.shared else "")
        raise self.fault(
            "race", lane, f"at offset {offset} of {access.memory.name}, {verb} by {whose} with no barrier between"
        )

    def count(self, access: _Access) -> None:
        counters, index = self.machine.counters, self.instruction.index
        counters.bytes[index] += access.lanes.size * self.num_bytes
        if access.memory is self.machine.shared:
            needed, ideal = self._count_wavefronts(access)
            counters.wavefronts[index] += needed
            counters.ideal_wavefronts[index] += ideal
        elif access.memory is not self.machine.local:
            counters.sectors[index] += count_sectors(access.offsets, access.lanes)

    def _count_wavefronts(self, access: _Access) -> tuple[int, int]:
        offsets = access.offsets - (access.offsets[0] & ~3)  # a shift by whole words only renumbers the banks
        key = offsets.tobytes() + (b"" if access.lanes.size == self.machine.num_threads else access.lanes.tobytes())
        if key not in self._wavefronts:
            if len(self._wavefronts) > 1000:
                self._wavefronts.clear()
            self._wavefronts[key] = count_wavefronts(offsets, access.lanes, self.num_bytes)
        return self._wavefronts[key]

    def accesses(self, lanes: np.ndarray, addresses: np.ndarray) -> Iterator[_Access]:
        for access in self.resolve(lanes, addresses):
            self.check(access)
            if self.machine.checks:
                self.count(access)
            if self.machine.on_access is not None:
                self.machine.on_access(self, access)
            yield access


def _elements(memory, dtype: np.dtype) -> np.ndarray:
    """The memory as elements of ``dtype`` (an end that is smaller than one is left out)."""
    return memory.data[: memory.data.size // dtype.itemsize * dtype.itemsize].view(dtype)


def lanes_and_addresses(machine, mask, address):
    lanes = machine.lanes(mask)
    addresses = address()[lanes]
    return (np.arange(machine.num_threads) if isinstance(lanes, slice) else lanes), addresses


def _names(operand: str) -> list[str]:
    """The registers of ``{a, b}``, or the one register."""
    return [name.strip() for name in operand.strip("{}").split(",")]


def bind_load(machine, instruction: Instruction):
    names = _names(instruction.operands[0])
    targets = [machine.destination(name, instruction.type) for name in names]
    if instruction.space == "param":
        parameter = machine.parameters[instruction.operands[1].strip("[] ")].view(DTYPES[instruction.type])
        return lambda mask: np.copyto(targets[0], parameter, where=mask)
    dtype = DTYPES[instruction.type]
    address = machine.address(instruction.operands[1])
    accessor = Accessor(machine, instruction, instruction.space, instruction.access_bytes, writes=False)

    def load(mask):
        lanes, addresses = lanes_and_addresses(machine, mask, address)
        for access in accessor.accesses(lanes, addresses):
            elements, first = _elements(access.memory, dtype), access.offsets // dtype.itemsize
            for number, target in enumerate(targets):
                target[access.lanes] = elements[first + number]

    return load


def bind_store(machine, instruction: Instruction):
    dtype = DTYPES[instruction.type]
    values = [machine.broadcast(name, instruction.type) for name in _names(instruction.operands[1])]
    address = machine.address(instruction.operands[0])
    accessor = Accessor(machine, instruction, instruction.space, instruction.access_bytes, writes=True)

    def store(mask):
        lanes, addresses = lanes_and_addresses(machine, mask, address)
        for access in accessor.accesses(lanes, addresses):
            elements, first = _elements(access.memory, dtype), access.offsets // dtype.itemsize
            for number, value in enumerate(values):
                elements[first + number] = value[access.lanes]
            _mark_written(access, accessor.num_bytes)

    return store


_ALL_WRITTEN = {1: 1, 2: 0x0101, 4: 0x01010101, 8: 0x0101010101010101}


def _written_flags(access: _Access, num_bytes: int):
    """The flags of an access, up to eight bytes' at once as one integer, and the indices of these integers."""
    size = min(num_bytes, 8)
    written = access.memory.written
    flags = written[: written.size // size * size].view(f"u{size}")
    return flags, [access.offsets // size + number for number in range(num_bytes // size)]


def _mark_written(access: _Access, num_bytes: int) -> None:
    if getattr(access.memory, "written", None) is not None:
        flags, indices = _written_flags(access, num_bytes)
        for at in indices:
            flags[at] = _ALL_WRITTEN[flags.itemsize]


_ATOMIC = {
    "add": lambda old, value: old + value,
    "min": min,
    "max": max,
    "and": lambda old, value: old & value,
    "or": lambda old, value: old | value,
    "xor": lambda old, value: old ^ value,
    "exch": lambda old, value: value,
    "inc": lambda old, value: type(old)(0) if old >= value else old + type(old)(1),
    "dec": lambda old, value: value if old == 0 or old > value else old - type(old)(1),
}


def bind_atomic(machine, instruction: Instruction):
    """``atom`` and ``red``, thread after thread. They are exempt from the check of races."""
    returns = instruction.opcode == "atom"
    operands = instruction.operands[1:] if returns else instruction.operands
    target = machine.destination(instruction.operands[0], instruction.type) if returns else None
    address = machine.address(operands[0])
    values = [machine.broadcast(name, instruction.type) for name in operands[1:]]
    dtype = DTYPES[instruction.type]
    accessor = Accessor(machine, instruction, instruction.space, dtype.itemsize, writes=True)
    combine = None if instruction.has("cas") else next(_ATOMIC[m] for m in instruction.modifiers if m in _ATOMIC)

    def update(mask):
        lanes, addresses = lanes_and_addresses(machine, mask, address)
        for access in accessor.resolve(lanes, addresses):
            if machine.checks:
                accessor.count(access)
            elements = _elements(access.memory, dtype)
            for lane, at in zip(access.lanes.tolist(), (access.offsets // dtype.itemsize).tolist(), strict=True):
                old, value = elements[at], values[0][lane]
                if combine is None:
                    elements[at] = values[1][lane] if old == value else old
                else:
                    elements[at] = combine(old, value)
                if target is not None:
                    target[lane] = old
            _mark_written(access, dtype.itemsize)

    return update


def bind_nothing(machine, instruction: Instruction):
    """Fences and prefetches: in lock step every store is visible at once."""
    return lambda mask: None


def bind_address_conversion(machine, instruction: Instruction):
    """``cvta``: between a window's own addresses and generic ones."""
    target = machine.destination(instruction.operands[0], instruction.type)
    value = machine.source(instruction.operands[1], instruction.type)
    window = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW}.get(instruction.space, 0)
    window = target.dtype.type(window)
    operation = np.subtract if instruction.has("to") else np.add
    return lambda mask: operation(value, window, out=target, where=mask)


BINDERS = {
    "ld": bind_load,
    "st": bind_store,
    "atom": bind_atomic,
    "red": bind_atomic,
    "cvta": bind_address_conversion,
    **dict.fromkeys(("membar", "fence", "prefetch", "prefetchu", "discard"), bind_nothing),
}
