"""Run a step's code in this process: with stubs, with solutions, with wrong answers, or with a learner's file."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path

from tutorials import course
from tutorials.source_format import Cell, Exercise, Step


def namespace() -> dict:
    """A fresh one, as a notebook's kernel has it."""
    return {"__name__": "__main__"}


def run_cell(cell: Cell, path: Path, variables: dict) -> str:
    """Execute a cell and return what it printed; tracebacks show the source's own lines."""
    code = compile("\n" * cell.line + cell.text + "\n", str(path), "exec", dont_inherit=True)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, variables)
    return printed.getvalue()


def check_answer(exercise: Exercise, answer: Cell, path: Path, variables: dict) -> course.Result:
    """The result of the exercise's check with ``answer`` in the stub's place. ``variables`` stay as they are."""
    variables = dict(variables)
    if answer.kind == "wrong":
        run_cell(exercise.solution, path, variables)
    run_cell(answer, path, variables)
    with course.recorded() as results:
        run_cell(exercise.check, path, variables)
    if [result.name for result in results] != [exercise.name]:
        raise AssertionError(
            f"{path.name}:{exercise.check.line}: the check cell must call check({exercise.name!r}, ...) once; "
            f"it checked {[result.name for result in results]}."
        )
    return results[0]


def run_step(
    step: Step, answer: Callable[[Exercise], Cell], at_exercise: Callable[[Exercise, dict], None] = lambda *_: None
) -> list[course.Result]:
    """Run all cells in order with ``answer(exercise)`` in each stub's place.

    ``at_exercise(exercise, variables)`` is called before each exercise.
    """
    variables = namespace()
    results: list[course.Result] = []
    for cell in step.cells:
        if isinstance(cell, Exercise):
            at_exercise(cell, variables)
            run_cell(answer(cell), step.path, variables)
            with course.recorded() as found:
                run_cell(cell.check, step.path, variables)
            results += found
        elif cell.kind in ("code", "varies"):
            run_cell(cell, step.path, variables)
    return results


def run_learner(step: Step, path: Path) -> Iterator[course.Result]:
    """The results of a learner's notebook, or of a Python file that defines the exercises' names.

    A notebook's own cells are run; a Python file is run in the place of each stub.
    """
    if path.suffix == ".ipynb":
        from tutorials.notebook import code_cells

        variables = namespace()
        with course.recorded() as results:
            for cell in code_cells(path):
                run_cell(cell, path, variables)
        yield from results
    else:
        text = path.read_text(encoding="utf-8")
        yield from run_step(step, lambda exercise: Cell("code", text, 0))
