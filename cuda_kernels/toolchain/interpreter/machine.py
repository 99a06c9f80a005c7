"""The threads of some blocks in lock step: their registers, their shared memory, and who runs next.

Every register is an array over all threads. One instruction runs for all threads that stand at the same place
and is written only for those (``mask``: True for all that still run, else bool [num_threads]). The threads at
the smallest program counter go first, so that those that left a branch early wait where the paths join.
Instructions are bound to the arrays of their operands once, when the machine is built.
"""

from __future__ import annotations

import re

import numpy as np

from cuda_kernels.toolchain.interpreter import (
    arithmetic,
    async_copy,
    bits,
    control,
    conversions,
    memory_access,
)
from cuda_kernels.toolchain.interpreter.counters import Counters
from cuda_kernels.toolchain.interpreter.faults import Clock, KernelFault
from cuda_kernels.toolchain.interpreter.program import DTYPES, Instruction, Program, PTXError

WARP = 32
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_BINDERS = {}
for _module in (arithmetic, bits, conversions, memory_access, async_copy):
    _BINDERS |= _module.BINDERS
MAX_STEPS = 2_000_000  # basic blocks; no kernel that ends comes near


class Machine:
    """``num_blocks`` blocks of ``block`` threads (x, y, z) of ``program``, to be loaded and run chunk after chunk."""

    def __init__(self, program: Program, num_blocks: int, block: tuple, shared_bytes: int, checks: bool) -> None:
        self.program, self.block, self.num_blocks, self.checks = program, block, num_blocks, checks
        self.on_access = None  # called with the accessor and its access, for each load and store
        self.threads_per_block = block[0] * block[1] * block[2]
        self.padded = -(-self.threads_per_block // WARP) * WARP
        self.num_threads = num_blocks * self.padded
        everyone = np.arange(self.num_threads)
        self.lane = everyone % WARP
        self.exists = everyone % self.padded < self.threads_per_block
        self.registers = {
            name: np.zeros(self.num_threads, bool if kind == "pred" else _UNSIGNED[DTYPES[kind].itemsize])
            for name, kind in program.registers.items()
        }
        self.parameters = {
            name: np.zeros(self.num_threads, _UNSIGNED[DTYPES[kind].itemsize]) for name, kind in program.parameters
        }
        self.symbols = {name: np.zeros(self.num_threads, np.uint64) for name in program.constants}
        self.carry = np.zeros(self.num_threads, bool)
        self.special = self._special_registers(everyone, shared_bytes)
        self.shared = memory_access.SharedMemory(self, program, shared_bytes)
        self.local = memory_access.LocalMemory(self, program)
        self.counters = Counters(program)
        self.warp_operations = {}  # what happens once all the lanes named have come, by the instruction's number
        self.num_instructions = len(program.instructions)
        self._bound = [self._bind(instruction) for instruction in program.instructions]
        self._leaders = self._find_leaders()
        self._flows_on = [control.binder(instruction) is None for instruction in program.instructions]

    def _special_registers(self, everyone, shared_bytes) -> dict[str, np.ndarray]:
        in_block = everyone % self.padded
        x, y, _ = self.block
        constant = {"%dynamic_smem_size": shared_bytes, "WARP_SZ": WARP, "%nwarpid": self.padded // WARP}
        constant |= {f"%ntid.{axis}": size for axis, size in zip("xyz", self.block, strict=True)}
        constant |= {"%total_smem_size": self.program.shared_bytes + shared_bytes}
        lane = (in_block % WARP).astype(np.int64)
        special = {
            "%tid.x": in_block % x,
            "%tid.y": in_block // x % y,
            "%tid.z": in_block // (x * y),
            "%laneid": lane,
            "%warpid": in_block // WARP,
            "%lanemask_eq": 1 << lane,
            "%lanemask_lt": (1 << lane) - 1,
            "%lanemask_le": (2 << lane) - 1,
            "%lanemask_gt": ~((2 << lane) - 1) & 0xFFFFFFFF,
            "%lanemask_ge": ~((1 << lane) - 1) & 0xFFFFFFFF,
        }
        special |= {name: np.full(self.num_threads, value) for name, value in constant.items()}
        for name in ("%ctaid", "%nctaid"):
            special |= {f"{name}.{axis}": np.zeros(self.num_threads, np.uint32) for axis in "xyz"}
        return {name: values.astype(np.uint32) for name, values in special.items()}

    # Operands, as views of the arrays that hold them

    def source(self, text: str, type_: str):
        """What an instruction reads: a view [num_threads] or, for a literal, a scalar of the type."""
        dtype = DTYPES[type_]
        array = self._array(text)
        if array is None:
            return _literal(text, dtype)
        if type_ == "pred":
            return array
        if array.itemsize < dtype.itemsize:
            raise PTXError(f"{text} is narrower than {type_}")
        return array.view(dtype)[:: array.itemsize // dtype.itemsize]  # the low end of a wider register

    def sources(self, instruction: Instruction, *numbers: int) -> list:
        return [self.source(instruction.operands[number], instruction.type) for number in numbers]

    def broadcast(self, text: str, type_: str) -> np.ndarray:
        """As :meth:`source`, but an array for a literal as well."""
        return np.broadcast_to(self.source(text, type_), (self.num_threads,))

    def destination(self, text: str, type_: str) -> np.ndarray:
        """The view that an instruction writes; a wider register takes the value extended by its sign or zeros."""
        dtype = DTYPES[type_]
        if text == "_":
            return np.zeros(self.num_threads, dtype)
        array = self.registers[text]
        if type_ == "pred" or array.itemsize == dtype.itemsize:
            return array.view(dtype)
        return array.view(np.dtype(dtype.kind + str(array.itemsize)))

    def predicate(self, text: str):
        """A function that returns the operand as bool [num_threads]; ``!`` negates."""
        if text.startswith("!"):
            array = self.registers[text[1:]]
            return lambda: ~array
        array = self.source(text, "pred")
        return lambda: array

    def address(self, text: str):
        """A function that returns the addresses ``[base + offset]`` as int64 [num_threads]."""
        base, offset = re.match(r"\[\s*([^\s+\]]+)\s*(?:\+\s*(-?\w+))?\s*\]$", text).groups()
        offset = int(offset or "0", 0)
        array = self._array(base)
        if array is None:
            fixed = np.full(self.num_threads, int(base, 0) + offset)
            return lambda: fixed
        return lambda: array.astype(np.int64) + offset

    def _array(self, text: str) -> np.ndarray | None:
        for names in (self.registers, self.special, self.symbols):
            if text in names:
                return names[text]
        for offsets in (self.program.shared, self.program.local):
            if text in offsets:
                return np.full(self.num_threads, offsets[text], np.uint64)
        return None

    # Running

    def load(self, grid: tuple, first_block: int, arguments: list[np.ndarray], memory, constants: dict) -> None:
        """Prepares the blocks from ``first_block`` of ``grid``: arguments, fresh shared memory, all at the start."""
        block_number = first_block + np.arange(self.num_threads) // self.padded
        x, y, _ = grid
        for axis, values in zip("xyz", (block_number % x, block_number // x % y, block_number // (x * y)), strict=True):
            self.special[f"%ctaid.{axis}"][...] = values
        for axis, size in zip("xyz", grid, strict=True):
            self.special[f"%nctaid.{axis}"][...] = size
        for array, value in zip(self.parameters.values(), arguments, strict=True):
            array[...] = value
        for name, pointer in constants.items():
            self.symbols[name][...] = pointer
        self.memory, self.grid, self.first_block = memory, grid, first_block
        self.clock = Clock(self.num_threads, self.padded, first_block * self.padded)
        self.shared.reset()
        self.local.reset()
        self.place = np.zeros(self.num_threads, np.int64)  # program counters
        self.state = np.full(self.num_threads, control.RUNS, np.int8)
        self.done = ~self.exists
        self.copy_group = np.zeros(self.num_threads, np.int64)  # cp.async groups committed by each thread
        self.counters = Counters(self.program)

    def run(self, max_steps: int) -> Counters:
        with np.errstate(all="ignore"):
            for _ in range(max_steps):
                ready = ~self.done & (self.state == control.RUNS)
                if ready.any():
                    self._step(ready)
                    self.counters.steps += 1
                elif self.done.all():
                    return self.counters
                elif not (control.release_warps(self) or control.release_blocks(self)):
                    places = sorted(set(self.place[~self.done].tolist()))
                    waiting = "; ".join(self.program.instructions[place].text for place in places)
                    raise KernelFault("deadlock", f"no thread can go on; they wait at: {waiting}")
        raise KernelFault("runaway", f"{self.program.entry} did not end within {max_steps} steps")

    def _step(self, ready: np.ndarray) -> None:
        """From the smallest program counter to the end of its basic block."""
        place = int(self.place.min(where=ready, initial=self.num_instructions))
        if place == self.num_instructions:
            self.done |= ready
            return
        at = ready & (self.place == place)
        mask = True if (at | self.done).all() else at
        counters, end = self.counters, self._leaders[place]
        self.active = at
        threads = int(at.sum())
        warps = threads // WARP if mask is True and threads == self.num_threads else self.count_warps(at)
        counters.threads[place:end] += threads
        counters.warps[place:end] += warps
        for number in range(place, end):
            self._bound[number](mask)
        if self._flows_on[end - 1]:
            np.copyto(self.place, end, where=mask)

    @staticmethod
    def count_warps(lanes: np.ndarray) -> int:
        return int(lanes.reshape(-1, WARP).any(1).sum())

    def lanes(self, mask) -> np.ndarray | slice:
        """The threads of ``mask`` that have not ended, to index arrays with."""
        if mask is True:
            return np.flatnonzero(~self.done) if self.done.any() else slice(None)
        return np.flatnonzero(mask)

    def all_of(self, mask) -> np.ndarray:
        """``mask`` as an array."""
        return ~self.done if mask is True else mask

    # Instructions

    def _find_leaders(self) -> list[int]:
        """For each place, where the basic block that it lies in ends."""
        starts = set(self.program.labels.values())
        for instruction in self.program.instructions:
            if control.binder(instruction):
                starts |= {instruction.index, instruction.index + 1}
        ends, end = [], self.num_instructions
        for place in reversed(range(self.num_instructions)):
            ends.append(end)
            if place in starts:
                end = place
        return ends[::-1]

    def _bind(self, instruction: Instruction):
        opcode = instruction.opcode
        if binder := control.binder(instruction):
            return binder(self, instruction)
        packed = bool(instruction.modifiers) and instruction.type in conversions.PACKED_TYPES and opcode != "cvt"
        binder = conversions.bind_half_pair if packed else _BINDERS.get(opcode)
        if binder is None:
            raise PTXError(f"the interpreter does not know: {instruction.text}")
        execute = binder(self, instruction)
        if instruction.predicate is None:
            return execute
        taken = self.guard(instruction)

        def guarded(mask):
            some = taken(mask)
            if some.any():
                execute(some)

        return guarded

    def guard(self, instruction: Instruction):
        """A function from a mask to the threads of it whose predicate lets the instruction happen."""
        if instruction.predicate is None:
            return self.all_of
        predicate = self.registers[instruction.predicate]

        def taken(mask):
            threads = self.all_of(mask) & (~predicate if instruction.negated else predicate)
            self.counters.taken[instruction.index] += np.count_nonzero(threads)
            return threads

        return taken

    # Words for faults

    def block_name(self, thread: int) -> str:
        return "({}, {}, {})".format(*(int(self.special[f"%ctaid.{axis}"][thread]) for axis in "xyz"))

    def who(self, thread: int) -> str:
        return f"block {self.block_name(thread)} thread {int(thread) % self.padded}"


def _literal(text: str, dtype: np.dtype):
    """An immediate operand as a scalar; ``0f`` and ``0d`` give a float's bits."""
    if dtype.kind == "b":
        return np.bool_(int(text, 0) != 0)
    if text[:2].lower() in ("0f", "0d"):
        bits = _UNSIGNED[4 if text[1].lower() == "f" else 8](int(text[2:], 16))
        return bits.view(dtype)
    try:
        value = int(text.rstrip("U"), 0)
    except ValueError:
        raise PTXError(f"operand not understood: {text}") from None
    bits = value & ((1 << 8 * dtype.itemsize) - 1)
    return np.array(bits, _UNSIGNED[dtype.itemsize]).view(dtype)[()]

