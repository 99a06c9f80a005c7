"""Breaks a kernel's PTX in one place at a time, to learn whether the checks would notice.

Mutants of two sorts: an order is lost (a barrier, a ``cp.async`` wait or commit is deleted), or a guard is (a
conditional branch, a predicated instruction or a selection always goes one way). Each is run on the kernel's
example. It is *killed* by a fault of the interpreter or by a result that differs in any bit, and *survives*
otherwise. Survivors are listed with their reasons in ``mutation_survivors.json``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cuda_kernels.toolchain.compile import compile_ptx
from cuda_kernels.toolchain.examples import SMALL, Example, Sizes, example
from cuda_kernels.toolchain.interpreter import KernelFault, launch
from cuda_kernels.toolchain.memory import DeviceMemory

SURVIVORS = Path(__file__).with_name("mutation_survivors.json")
STEPS = 40_000  # basic blocks; the examples need a tenth of it

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
    ptx: str

    def __str__(self) -> str:
        return f"line {self.number}: {self.line} -> {self.change}"


def mutants(ptx: str, sorts: tuple[str, ...] = ("order", "guard")) -> Iterator[Mutant]:
    """All mutants of ``ptx``."""
    lines = ptx.split("\n")

    def mutant(sort: str, number: int, replacement: str, change: str) -> Mutant:
        text = "\n".join([*lines[:number], replacement, *lines[number + 1 :]])
        return Mutant(sort, re.sub(r"\s+", " ", lines[number]).strip(), change, number + 1, text)

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


def execute(subject: Example, ptx: str, max_steps: int = STEPS) -> list[np.ndarray]:
    """Runs ``ptx`` in the example's place; what all its arrays hold afterwards."""
    memory, names = DeviceMemory(), subject.kernel.body.__code__.co_varnames
    values = [
        memory.upload(each, names[number]) if isinstance(each, np.ndarray) else each
        for number, each in enumerate(subject.arguments)
    ]
    kernel = subject.kernel
    launch(ptx, kernel.entry, subject.grid, kernel.block, values, kernel.shared_bytes, True, memory, max_steps)
    pairs = zip(values, subject.arguments, strict=True)
    return [memory.read(value, each.shape, each.dtype) for value, each in pairs if isinstance(each, np.ndarray)]


def verdict(subject: Example, mutant: Mutant, expected: list[np.ndarray]) -> str:
    """``killed: why``, or ``survived``."""
    try:
        found = execute(subject, mutant.ptx)
    except KernelFault as fault:
        return f"killed: {fault.kind}"
    same = all(a.tobytes() == b.tobytes() for a, b in zip(found, expected, strict=True))
    return "survived" if same else "killed: another result"


def sweep(
    name: str, cc: tuple[int, int], sorts: tuple[str, ...] = ("order", "guard"), sizes: Sizes = SMALL
) -> Iterator[tuple[Mutant, str]]:
    """Every mutant of kernel ``name`` with its verdict."""
    subject = example(name, sizes, cc)
    ptx = compile_ptx(subject.kernel, cc)
    expected = execute(subject, ptx)
    for mutant in mutants(ptx, sorts):
        yield mutant, verdict(subject, mutant, expected)
