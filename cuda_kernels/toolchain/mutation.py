"""Breaks a kernel's PTX in one place at a time, to learn whether the checks would notice.

Mutants of two sorts: an order is lost (a barrier, a ``cp.async`` wait or commit is deleted), or a guard is (a
conditional branch, a predicated instruction or a selection always goes one way). Each is run on the launches of
``mutation_cases.py``, one after the other. Where a guard already goes that way for every thread, the mutant is the
same program; one that is so in every launch counts as *not exercised*. A mutant is *killed* by a fault of the
interpreter or by a result that differs in any bit, and *survives* otherwise: those are listed with their reasons
in ``mutation_survivors.json``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cuda_kernels.toolchain.compile import compile_ptx
from cuda_kernels.toolchain.examples import Example
from cuda_kernels.toolchain.interpreter import Counters, KernelFault, launch
from cuda_kernels.toolchain.interpreter.machine import MAX_STEPS
from cuda_kernels.toolchain.interpreter.program import parse
from cuda_kernels.toolchain.memory import DeviceMemory
from cuda_kernels.toolchain.mutation_cases import cases

SURVIVORS = Path(__file__).with_name("mutation_survivors.json")
PATIENCE = 4  # times the basic blocks of the original: who needs more is taken to run forever

_ORDER = re.compile(r"^\s*(bar\.sync|bar\.warp\.sync|barrier\.sync|cp\.async\.(?:wait_group|wait_all|commit_group))\b")
_GUARD = re.compile(r"^(\s*)@(!?%p\d+)\s+(.*)$")
_SELECT = re.compile(r"^(\s*)selp\.(\w+)\s+(\S+),\s*(\S+),\s*(\S+),\s*(\S+);")


@dataclass(frozen=True)
class Mutant:
    """``line`` is a line of the PTX, ``change`` what replaced it; ``sort`` is ``order`` or ``guard``."""

    sort: str
    line: str
    change: str
    number: int  # of the line in the PTX
    instruction: int  # its number in the program
    ptx: str

    def __str__(self) -> str:
        return f"line {self.number}: {self.line} -> {self.change}"


def mutants(ptx: str, sorts: tuple[str, ...] = ("order", "guard")) -> Iterator[Mutant]:
    """All mutants of ``ptx``."""
    lines = ptx.split("\n")
    instructions = _instructions_of_lines(ptx, lines)

    def mutant(sort: str, number: int, replacement: str, change: str) -> Mutant:
        text = "\n".join([*lines[:number], replacement, *lines[number + 1 :]])
        line = re.sub(r"\s+", " ", lines[number]).strip()
        return Mutant(sort, line, change, number + 1, instructions[number], text)

    for number, line in enumerate(lines):
        if "order" in sorts and _ORDER.match(line):
            yield mutant("order", number, "", "deleted")
        if "guard" in sorts:
            guard, select = _GUARD.match(line), _SELECT.match(line)
            if guard:
                yield mutant("guard", number, f"{guard[1]}{guard[3]}", "always")
                yield mutant("guard", number, "", "never")
            elif select:
                target = f"{select[1]}mov.{select[2]} {select[3]}, "
                yield mutant("guard", number, f"{target}{select[4]};", "always the first")
                yield mutant("guard", number, f"{target}{select[5]};", "always the second")


def _instructions_of_lines(ptx: str, lines: list[str]) -> dict[int, int]:
    """For each line that holds an instruction, the number of its first one in the program."""
    found, at, column = {}, 0, 0
    for instruction in parse(ptx).instructions:
        while (start := re.sub(r"\s+", " ", lines[at]).find(instruction.text, column)) < 0:
            at, column = at + 1, 0
        column = start + len(instruction.text)
        found.setdefault(at, instruction.index)
    return found


def execute(subject: Example, ptx: str, max_steps: int = MAX_STEPS) -> tuple[list[np.ndarray], Counters]:
    """Runs ``ptx`` in the example's place; what all its arrays hold afterwards, and the counters."""
    memory, names = DeviceMemory(), subject.kernel.body.__code__.co_varnames
    values = [
        memory.upload(each, names[number]) if isinstance(each, np.ndarray) else each
        for number, each in enumerate(subject.arguments)
    ]
    kernel = subject.kernel
    counters = launch(
        ptx, kernel.entry, subject.grid, kernel.block, values, kernel.shared_bytes, True, memory, max_steps
    )
    pairs = zip(values, subject.arguments, strict=True)
    arrays = [memory.read(value, each.shape, each.dtype) for value, each in pairs if isinstance(each, np.ndarray)]
    return arrays, counters


def exercised(mutant: Mutant, counters: Counters) -> bool:
    """Whether some thread of the example goes another way in the mutant than in the original."""
    if mutant.sort == "order":
        return bool(counters.warps[mutant.instruction])
    taken, threads = (int(each[mutant.instruction]) for each in (counters.taken, counters.threads))
    return taken < threads if mutant.change in ("always", "always the first") else taken > 0


def verdict(subject: Example, mutant: Mutant, expected: list[np.ndarray], counters: Counters) -> str:
    """``killed: why``, or ``survived``; ``expected`` and ``counters`` are the original's."""
    try:
        found, _ = execute(subject, mutant.ptx, PATIENCE * counters.steps)
    except KernelFault as fault:
        return f"killed: {fault.kind}"
    same = all(a.tobytes() == b.tobytes() for a, b in zip(found, expected, strict=True))
    return "survived" if same else "killed: another result"


def sweep(name: str, cc: tuple[int, int], sorts: tuple[str, ...] = ("order", "guard")) -> Iterator[tuple[Mutant, str]]:
    """Every mutant of kernel ``name`` with its verdict."""
    subjects = list(cases(name, cc))
    ptx = compile_ptx(subjects[0].kernel, cc)
    assert all(compile_ptx(subject.kernel, cc) == ptx for subject in subjects)
    runs = [(subject, *execute(subject, ptx)) for subject in subjects]
    for mutant in mutants(ptx, sorts):
        found = "not exercised"
        for subject, expected, counters in runs:
            if exercised(mutant, counters):
                found = verdict(subject, mutant, expected, counters)
                if found != "survived":
                    break
        yield mutant, found
