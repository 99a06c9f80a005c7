"""The text source of a step: both languages and the code that they share, in Jupyter's percent format.

A file ``source/NN_topic.py`` is a row of cells, each begun by a line ``# %%``:

    # %% [markdown] en            English text, each line a comment
    # %% [markdown] tr            the same in Turkish; stands right behind its English cell
    # %%                          code, the same in both languages
    # %% [varies]                 code whose printed text is not fixed: times, or what the engine's kernels count
    # %% [exercise] NAME          the stub that the learner completes
    # %% [solution] NAME          code that may stand in the stub's place and passes
    # %% [check] NAME             code that tells whether what stands in the stub's place is right
    # %% [wrong] NAME: REGEX      code for which the check says what REGEX finds; the solution is run before it,
                                  so that it need only define what is wrong

An exercise is followed by its solution, its check and at least three wrong answers, in this order.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
LANGUAGES = ("en", "tr")
MIN_WRONG_ANSWERS = 3
_HEADER = re.compile(r"# %%(?: \[(?P<kind>[a-z]+)\](?: (?P<argument>.+))?)?")


class SourceError(ValueError):
    """A source that is not as described above; the text says where and what."""


@dataclass
class Cell:
    """One cell of a source; ``line`` is that of its header, from 1."""

    kind: str  #: "en", "tr", "code", "varies", "exercise", "solution", "check" or "wrong"
    text: str
    line: int
    name: str = ""  #: of the exercise, for the last four kinds
    message: str = ""  #: of a wrong answer: a regular expression


@dataclass
class Exercise:
    """A stub with all that belongs to it."""

    name: str
    stub: Cell
    solution: Cell
    check: Cell
    wrong: list[Cell]


@dataclass
class Step:
    """A parsed source. ``cells`` are in order, with each exercise's cells gathered into one."""

    path: Path
    cells: list[Cell | Exercise] = field(default_factory=list)

    @property
    def name(self) -> str:
        """``NN_topic``."""
        return self.path.stem

    @property
    def exercises(self) -> list[Exercise]:
        return [cell for cell in self.cells if isinstance(cell, Exercise)]

    def pairs(self) -> Iterator[tuple[Cell, Cell]]:
        """The texts, English and Turkish."""
        texts = [cell for cell in self.cells if isinstance(cell, Cell) and cell.kind in LANGUAGES]
        return zip(texts[::2], texts[1::2], strict=True)


def source_paths() -> list[Path]:
    """All sources, in the order of the course."""
    return sorted((FOLDER / "source").glob("[0-9][0-9]_*.py"))


def find_source(number: str) -> Path:
    """The source of step ``"02"`` (or ``"2"``)."""
    found = [path for path in source_paths() if path.name.startswith(f"{int(number):02d}_")]
    if not found:
        raise SourceError(f"there is no step {number}; those there are: {', '.join(p.stem for p in source_paths())}.")
    return found[0]


def read_step(path: Path) -> Step:
    """Parse a file. Raises :class:`SourceError`."""
    return parse(path.read_text(encoding="utf-8"), path)


def parse(text: str, path: Path) -> Step:
    """Parse the text of a source. Raises :class:`SourceError`."""
    cells = _split(text, path)
    step = Step(path)
    i = 0
    while i < len(cells):
        cell = cells[i]
        if cell.kind == "exercise":
            exercise = _gather(cells[i:], path)
            step.cells.append(exercise)
            i += 3 + len(exercise.wrong)
        elif cell.kind in ("solution", "check", "wrong"):
            raise SourceError(f"{path.name}:{cell.line}: a [{cell.kind}] cell that follows no exercise.")
        elif cell.kind == "en":
            if i + 1 == len(cells) or cells[i + 1].kind != "tr":
                raise SourceError(f"{path.name}:{cell.line}: an English cell without its Turkish one right behind it.")
            step.cells += cells[i : i + 2]
            i += 2
        elif cell.kind == "tr":
            raise SourceError(f"{path.name}:{cell.line}: a Turkish cell without its English one right before it.")
        else:
            step.cells.append(cell)
            i += 1
    if not step.cells or getattr(step.cells[0], "kind", None) != "en":
        raise SourceError(f"{path.name}: a step begins with a text cell (its title).")
    return step


def _gather(cells: list[Cell], path: Path) -> Exercise:
    stub = cells[0]
    wrong = []
    for cell in cells[3:]:
        if cell.kind != "wrong":
            break
        wrong.append(cell)
    kinds = [cell.kind for cell in cells[:3]]
    if kinds != ["exercise", "solution", "check"] or len(wrong) < MIN_WRONG_ANSWERS:
        raise SourceError(
            f"{path.name}:{stub.line}: exercise {stub.name} needs, in this order, its solution, its check and at least "
            f"{MIN_WRONG_ANSWERS} wrong answers; what follows is {[cell.kind for cell in cells[1 : 3 + len(wrong)]]}."
        )
    for cell in [*cells[:3], *wrong]:
        if cell.name != stub.name:
            raise SourceError(f"{path.name}:{cell.line}: a [{cell.kind}] of {cell.name!r} in exercise {stub.name!r}.")
    return Exercise(stub.name, stub, cells[1], cells[2], wrong)


def _split(text: str, path: Path) -> list[Cell]:
    cells: list[Cell] = []
    lines: list[str] = []

    def close() -> None:
        if cells:
            cells[-1].text = _body(cells[-1], lines, path)
        elif any(line.strip() for line in lines):
            raise SourceError(f"{path.name}:1: text before the first cell.")
        lines.clear()

    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("# %%"):
            close()
            cells.append(_header(line, number, path))
        else:
            lines.append(line)
    close()
    return cells


def _header(line: str, number: int, path: Path) -> Cell:
    match = _HEADER.fullmatch(line.rstrip())
    kind, argument = (match["kind"] or "code", match["argument"] or "") if match else ("", "")
    if kind == "markdown" and argument in LANGUAGES:
        return Cell(argument, "", number)
    if kind in ("code", "varies") and not argument:
        return Cell(kind, "", number)
    if kind in ("exercise", "solution", "check") and argument.isidentifier():
        return Cell(kind, "", number, argument)
    if kind == "wrong" and ": " in argument:
        name, _, message = argument.partition(": ")
        return Cell(kind, "", number, name, message)
    raise SourceError(f"{path.name}:{number}: {line!r} is no cell header that is known.")


def _body(cell: Cell, lines: list[str], path: Path) -> str:
    if cell.kind not in LANGUAGES:
        text = "\n".join(line.rstrip() for line in lines).strip("\n")
    else:
        found = []
        for offset, line in enumerate(lines, 1):
            if line.strip() and not line.startswith("#"):
                raise SourceError(f"{path.name}:{cell.line + offset}: code in a text cell: {line!r}.")
            found.append(line[1:].removeprefix(" ").rstrip())
        text = "\n".join(found).strip("\n")
    if not text:
        raise SourceError(f"{path.name}:{cell.line}: the cell is empty.")
    return text
