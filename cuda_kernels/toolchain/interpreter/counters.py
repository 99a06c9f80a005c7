"""What a launch executed and moved, for each PTX instruction and in all."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cuda_kernels.toolchain.interpreter.program import Instruction, Program

SECTOR_BYTES = 32
NUM_BANKS = 32

_SPECIAL = {"ex2", "lg2", "rcp", "sqrt", "rsqrt", "sin", "cos", "tanh"}
_CONTROL = {"bra", "ret", "exit"}
_WARP = {"shfl", "vote", "match", "redux", "activemask"}
_LOGIC = {"and", "or", "xor", "not", "shl", "shr", "shf", "bfe", "bfi", "prmt", "lop3", "popc", "clz", "brev", "bfind"}


def kind_of(instruction: Instruction) -> str:
    """The kind of work an instruction is, in the words of the report."""
    opcode = instruction.opcode
    if opcode in ("ld", "st", "atom", "red"):
        space = instruction.space or "generic"
        return {"ld": "load ", "st": "store ", "atom": "atomic ", "red": "atomic "}[opcode] + space
    if opcode == "cp":
        return "copy global to shared" if "shared" in instruction.modifiers else "copy control"
    if opcode in ("bar", "barrier"):
        return "warp barrier" if "warp" in instruction.modifiers else "barrier"
    for kind, opcodes in (("special function", _SPECIAL), ("control", _CONTROL), ("warp exchange", _WARP)):
        if opcode in opcodes:
            return kind
    if opcode in ("mma", "ldmatrix"):
        return "tensor core" if opcode == "mma" else "load matrix"
    if opcode in ("mov", "selp", "cvta"):
        return "move"
    if opcode == "cvt":
        return "conversion"
    if opcode == "setp":
        return "comparison"
    if opcode in _LOGIC:
        return "bits"
    return "float arithmetic" if instruction.type[0] == "f" else "integer arithmetic"


class Counters:
    """Totals of one launch or, by ``+``, of several of the same program.

    Per instruction (arrays as long as the program): ``warps`` executions by a warp, ``threads`` by a thread,
    ``taken`` those threads whose predicate held (of predicated instructions and selections), ``bytes`` asked for
    by threads, ``sectors`` of 32 bytes that this touched in global memory (each counted once for each warp's
    instruction), ``wavefronts`` that shared memory needed and ``ideal_wavefronts`` without bank conflicts.
    ``steps``: basic blocks that the interpreter ran one after the other.
    """

    FIELDS = ("warps", "threads", "taken", "bytes", "sectors", "wavefronts", "ideal_wavefronts")

    def __init__(self, program: Program) -> None:
        self.program = program
        self.steps = 0
        for name in self.FIELDS:
            setattr(self, name, np.zeros(len(program.instructions), np.int64))

    def __add__(self, other: Counters) -> Counters:
        if other.program is not self.program:
            raise ValueError("counters of different programs have no sum")
        total = Counters(self.program)
        total.steps = self.steps + other.steps
        for name in self.FIELDS:
            setattr(total, name, getattr(self, name) + getattr(other, name))
        return total

    def _where(self, *kinds: str) -> np.ndarray:
        return np.array([kind_of(each) in kinds for each in self.program.instructions], bool)

    @property
    def by_kind(self) -> dict[str, int]:
        """Warp-level executions of each kind of instruction, most first."""
        totals: dict[str, int] = {}
        for instruction, count in zip(self.program.instructions, self.warps.tolist(), strict=True):
            if count:
                totals[kind_of(instruction)] = totals.get(kind_of(instruction), 0) + count
        return dict(sorted(totals.items(), key=lambda item: -item[1]))

    @property
    def instructions(self) -> int:
        """Instructions executed, each counted once a warp."""
        return int(self.warps.sum())

    @property
    def load(self) -> Traffic:
        """Global memory to the chip: loads and asynchronous copies."""
        return self._traffic("load global", "copy global to shared", "load generic", "load const")

    @property
    def store(self) -> Traffic:
        return self._traffic("store global", "store generic")

    def _traffic(self, *kinds: str) -> Traffic:
        where = self._where(*kinds)
        return Traffic(*(int(getattr(self, name)[where].sum()) for name in ("warps", "bytes", "sectors")))

    @property
    def bank_conflicts(self) -> int:
        """Wavefronts of shared memory beyond those that the same accesses need at best."""
        return int((self.wavefronts - self.ideal_wavefronts).sum())


@dataclass(frozen=True)
class Traffic:
    """``requests`` by warps, ``bytes`` that threads asked for, 32-byte ``sectors`` that moved."""

    requests: int
    bytes: int
    sectors: int

    @property
    def sector_bytes(self) -> int:
        return self.sectors * SECTOR_BYTES

    @property
    def efficiency(self) -> float:
        """Bytes asked for by threads over bytes moved; above 1 where threads of a warp share what they read."""
        return self.bytes / self.sector_bytes if self.sectors else 1.0


def count_sectors(offsets: np.ndarray, lanes: np.ndarray) -> int:
    """Distinct 32-byte sectors that each warp touches: ``offsets`` in bytes, ``lanes`` ascending, both int64 [n]."""
    keys = ((lanes >> 5) << 36) | (offsets >> 5)
    step = np.diff(keys)
    if (step < 0).any():
        step = np.diff(np.sort(keys))
    return int(np.count_nonzero(step)) + 1


def count_wavefronts(offsets: np.ndarray, lanes: np.ndarray, num_bytes: int) -> tuple[int, int]:
    """Wavefronts of an access to shared memory, and how few it would need without bank conflicts.

    A wavefront serves each of the 32 banks (4 bytes wide) with one word, to any number of lanes. Accesses of 8
    bytes are served half warp by half warp, those of 16 bytes by quarter warps.
    """
    words_each = max(1, num_bytes // 4)
    _, group = np.unique(lanes // (32 // words_each), return_inverse=True)
    words = (offsets[:, None] // 4 + np.arange(words_each)).reshape(-1)
    distinct = np.unique((np.repeat(group, words_each) << 36) | words)
    load = np.zeros((group.max() + 1, NUM_BANKS), np.int64)
    np.add.at(load, (distinct >> 36, distinct % NUM_BANKS), 1)
    return int(load.max(1).sum()), len(load)
