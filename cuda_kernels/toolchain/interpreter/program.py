"""PTX text as a program: parameters, registers, memory symbols and a list of instructions.

Only what compilers make of one kernel is understood: one entry, no calls. Registers declared inside braces (as
inline assembly does) get names of their own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np

_KINDS = {"u": "u", "b": "u", "s": "i", "f": "f"}
#: NumPy's type for each PTX type; a predicate is a bool.
DTYPES = {
    kind + str(width): np.dtype(numpy_kind + str(width // 8))
    for kind, numpy_kind in _KINDS.items()
    for width in (8, 16, 32, 64)
    if (kind, width) != ("f", 8)
} | {"pred": np.dtype(bool)}


class PTXError(Exception):
    """The PTX holds something that the interpreter does not understand."""


@dataclass(frozen=True)
class Instruction:
    """``@!predicate opcode.modifiers operands``; ``target`` is the index that a branch goes to."""

    index: int
    text: str
    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]
    predicate: str | None = None
    negated: bool = False

    @property
    def type(self) -> str:
        return self.modifiers[-1]

    def has(self, modifier: str) -> bool:
        return modifier in self.modifiers

    @property
    def space(self) -> str | None:
        """The state space that a load or store names; None for a generic address."""
        for modifier in self.modifiers:
            if modifier.split("::")[0] in ("global", "shared", "local", "param", "const"):
                return modifier.split("::")[0]
        return None

    @property
    def vector(self) -> int:
        """Elements of a vector access, 1 of a scalar one."""
        return next((int(modifier[1]) for modifier in self.modifiers if modifier in ("v2", "v4")), 1)

    @property
    def access_bytes(self) -> int:
        """Bytes that one thread's load, store or copy moves."""
        if self.opcode == "cp":
            return int(self.operands[2])
        if self.opcode == "ldmatrix":
            return 16
        return DTYPES[self.type].itemsize * self.vector


@dataclass
class Program:
    """``shared`` and ``local`` map symbols to byte offsets; ``constants`` hold initialised global memory."""

    entry: str
    parameters: list[tuple[str, str]] = field(default_factory=list)  # name, type
    registers: dict[str, str] = field(default_factory=dict)  # name -> type
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)
    shared_bytes: int = 0  # static
    dynamic_shared: list[tuple[str, int]] = field(default_factory=list)  # name, alignment; they lie behind the static
    local: dict[str, int] = field(default_factory=dict)
    local_bytes: int = 0
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    max_threads: int | None = None

    def add_shared(self, name: str, num_bytes: int, alignment: int) -> None:
        self.shared_bytes = _place_aligned(self.shared_bytes, alignment)
        self.shared[name] = self.shared_bytes
        self.shared_bytes += num_bytes

    def add_local(self, name: str, num_bytes: int, alignment: int) -> None:
        self.local_bytes = -(-self.local_bytes // alignment) * alignment
        self.local[name] = self.local_bytes
        self.local_bytes += num_bytes


    def stored_parameters(self) -> list[int]:
        """Numbers of the 64-bit parameters from which addresses of global stores are computed."""
        names = {name: number for number, (name, type_) in enumerate(self.parameters) if type_.endswith("64")}
        made_from: dict[str, set[str]] = {}
        wanted: set[str] = set()
        for each in self.instructions:
            words = [set(re.findall(r"[%$\w@]+", operand)) for operand in each.operands]
            if each.opcode in ("st", "atom", "red") and each.space in ("global", None):
                wanted |= words[each.opcode == "atom"]
            elif each.opcode == "ld" and each.space == "param" or each.opcode not in ("ld", "st") and len(words) > 1:
                for target in words[0]:
                    made_from.setdefault(target, set()).update(*words[1:])
        reached: set[str] = set()
        while wanted:
            word = wanted.pop()
            reached.add(word)
            wanted |= made_from.get(word, set()) - reached
        return sorted(names[word] for word in reached if word in names)

def _place_aligned(offset: int, alignment: int) -> int:
    """The next offset that is a multiple of ``alignment`` but, below 16, of no more than that.

    A symbol that asks for too little alignment then fails here and not on a card some day.
    """
    offset = -(-offset // alignment) * alignment
    return offset + alignment if alignment < 16 and offset % (2 * alignment) == 0 else offset


def split_operands(text: str) -> tuple[str, ...]:
    """The operands between commas that stand in no bracket."""
    parts, depth, current = [], 0, ""
    for letter in text:
        depth += (letter in "{[(") - (letter in "}])")
        if letter == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += letter
    if current.strip():
        parts.append(current.strip())
    return tuple(parts)


_SYMBOL = re.compile(
    r"(?:\.(?:extern|visible|weak|common)\s+)*\.(?P<space>global|shared|const|local)\s+(?:\.align\s+(?P<align>\d+)\s+)?"
    r"\.(?P<type>\w+)\s+(?P<name>[\w$]+)(?P<array>\[(?P<count>\d*)\])?(?:\s*=\s*\{?(?P<values>[^;}]*)\}?)?\s*$",
    re.S,
)
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+(?:\.ptr\s+(?:\.\w+\s+)*?(?:\.align\s+\d+\s+)?)?([\w$]+)$"
)
_INSTRUCTION = re.compile(r"(?:@(!?)([%\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.S)
_LABEL = re.compile(r"([$\w]+):")


def parse(ptx: str) -> Program:
    """The program of the one entry in ``ptx``. Raises :class:`PTXError` for what it does not understand."""
    ptx = re.sub(r"//[^\n]*|/\*.*?\*/", "", ptx, flags=re.S)
    head = re.search(r"\.entry\s+([\w$]+)\s*\((.*?)\)", ptx, re.S)
    if head is None:
        raise PTXError("there is no .entry in the PTX")
    program = Program(head.group(1))
    for statement in ptx[: head.start()].split(";"):
        found = _SYMBOL.search(statement)
        if found:
            _add_symbol(program, found)
    for parameter in split_operands(head.group(2)):
        found = _PARAMETER.match(parameter)
        if found is None:
            raise PTXError(f"parameter not understood: {parameter}")
        program.parameters.append((found.group(2), found.group(1)))
    start = ptx.index("{", head.end())
    directives = re.search(r"\.maxntid\s+(\d+)", ptx[head.end() : start])
    program.max_threads = int(directives.group(1)) if directives else None
    _Body(program).read(ptx[start + 1 : _closing_brace(ptx, start)])
    for name, alignment in program.dynamic_shared:
        program.shared_bytes = program.shared[name] = _place_aligned(program.shared_bytes, alignment)
    return program


def _closing_brace(text: str, start: int) -> int:
    depth = 0
    for position in range(start, len(text)):
        depth += (text[position] == "{") - (text[position] == "}")
        if depth == 0:
            return position
    raise PTXError("the entry's body is not closed")


def _add_symbol(program: Program, found: re.Match) -> None:
    dtype, name, align = DTYPES[found["type"]], found["name"], int(found["align"] or 1)
    count = int(found["count"]) if found["count"] else 0 if found["array"] else 1
    num_bytes = count * dtype.itemsize
    if found["space"] == "shared" and found["array"] and not found["count"]:
        program.dynamic_shared.append((name, max(align, dtype.itemsize)))
    elif found["space"] == "shared":
        program.add_shared(name, num_bytes, max(align, dtype.itemsize))
    elif found["space"] == "local":
        program.add_local(name, num_bytes, max(align, dtype.itemsize))
    else:
        values = np.zeros(count, dtype)
        if found["values"]:
            given = [int(value, 0) for value in found["values"].split(",")]
            values[: len(given)] = given
        program.constants[name] = values


class _Body:
    """Reads the statements between the braces of an entry."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.scopes: list[dict[str, str]] = [{}]  # register as written -> as renamed
        self.num_scopes = 0

    def read(self, text: str) -> None:
        # A brace is a scope's only where a statement may begin; elsewhere it encloses a vector of registers.
        for statement in text.split(";"):
            self._statement(statement.strip())

    def _statement(self, text: str) -> None:
        while text:
            label = _LABEL.match(text)
            if text[0] == "{":
                self.num_scopes += 1
                self.scopes.append({})
                text = text[1:].lstrip()
            elif text[0] == "}":
                self.scopes.pop()
                text = text[1:].lstrip()
            elif label:
                self.program.labels[label.group(1)] = len(self.program.instructions)
                text = text[label.end() :].lstrip()
            else:
                break
        if text.startswith(".reg"):
            self._registers(text)
        elif text.startswith((".shared", ".local")):
            _add_symbol(self.program, _SYMBOL.match(text))
        elif text and not text.startswith((".loc", ".pragma", ".file", ".branchtargets")):
            self._instruction(text)

    def _registers(self, text: str) -> None:
        kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", text, re.S).groups()
        if kind not in DTYPES:
            raise PTXError(f"registers of type {kind}: {text}")
        for name in names.split(","):
            name, count = re.match(r"\s*([%$\w]+)(?:<(\d+)>)?\s*$", name).groups()
            for each in [f"{name}{i}" for i in range(int(count))] if count else [name]:
                own = each if len(self.scopes) == 1 else f"{each}@{self.num_scopes}"
                self.scopes[-1][each] = own
                self.program.registers[own] = kind

    def _instruction(self, text: str) -> None:
        found = _INSTRUCTION.match(text)
        if found is None:
            raise PTXError(f"instruction not understood: {text}")
        negated, predicate, opcode, operands = found.groups()
        opcode, *modifiers = re.split(r"(?<!:)\.", opcode)
        operands = split_operands(re.sub(r"[%$\w]+", self._rename, operands))
        instruction = Instruction(
            len(self.program.instructions),
            re.sub(r"\s+", " ", text),
            opcode,
            tuple(modifiers),
            operands,
            self._rename(predicate) if predicate else None,
            bool(negated),
        )
        self.program.instructions.append(instruction)

    def _rename(self, word) -> str:
        word = word if isinstance(word, str) else word.group(0)
        return next((scope[word] for scope in reversed(self.scopes) if word in scope), word)
