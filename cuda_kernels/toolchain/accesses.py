"""Which thread of a block touches which bytes, load by load and store by store, as a kernel runs in the interpreter."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cuda_kernels.kernel import Kernel
from cuda_kernels.toolchain.interpreter import run
from cuda_kernels.toolchain.interpreter.counters import count_sectors, count_wavefronts

WARP = 32


@dataclass(frozen=True)
class Access:
    """One execution of one PTX instruction that reads or writes memory, by the threads of a block.

    Attributes:
        index, instruction: the PTX instruction's number and text.
        memory: name of the allocation (the kernel's parameter), ``"shared memory"`` or ``"local memory"``.
        writes: whether it is a store.
        num_bytes: each thread's.
        threads: those that take part, ascending.
        offsets: of each thread's bytes, from the beginning of the memory.
    """

    index: int
    instruction: str
    memory: str
    writes: bool
    num_bytes: int
    threads: tuple[int, ...]
    offsets: tuple[int, ...]

    @property
    def is_shared(self) -> bool:
        return self.memory == "shared memory"

    def of_warp(self, warp: int) -> Access:
        """The part of one warp's 32 threads."""
        pairs = [(t, o) for t, o in zip(self.threads, self.offsets, strict=True) if t // WARP == warp]
        threads, offsets = zip(*pairs, strict=True) if pairs else ((), ())
        return Access(self.index, self.instruction, self.memory, self.writes, self.num_bytes, threads, offsets)

    @property
    def sectors(self) -> int:
        """32-byte sectors that move, warp by warp, as :class:`Counters` counts them."""
        return count_sectors(np.array(self.offsets), np.array(self.threads)) if self.threads else 0

    @property
    def wavefronts(self) -> tuple[int, int]:
        """Wavefronts that shared memory needs, and how few they would be without bank conflicts."""
        if not self.threads:
            return 0, 0
        return count_wavefronts(np.array(self.offsets), np.array(self.threads), self.num_bytes)


def record_accesses(kernel: Kernel, grid, args, cc=(8, 0), block: int = 0, each: int = 1) -> list[Access]:
    """Runs a kernel (as :func:`~cuda_kernels.toolchain.interpreter.run`), and tells what one block's threads touch.

    Args:
        block: number of the thread block, in the order of the grid.
        each: how many executions of each instruction are kept, the first ones.
    """
    found: list[Access] = []
    counts: dict[int, int] = {}

    def note(accessor, access):
        machine = accessor.machine
        here = access.lanes // machine.padded + machine.first_block == block
        if not here.any() or counts.get(accessor.instruction.index, 0) >= each:
            return
        counts[accessor.instruction.index] = counts.get(accessor.instruction.index, 0) + 1
        lanes, offsets = access.lanes[here], access.offsets[here]
        if access.memory in (machine.shared, machine.local):
            offsets = offsets - access.memory.base[lanes]
        found.append(
            Access(
                accessor.instruction.index,
                accessor.instruction.text,
                access.memory.name,
                accessor.writes,
                accessor.num_bytes,
                tuple((lanes % machine.padded).tolist()),
                tuple(offsets.tolist()),
            )
        )

    run(kernel, grid, args, cc, on_access=note)
    return found
