"""What the notebooks use besides minipaged: pictures in a cell's output, and checks that explain themselves."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from xml.etree import ElementTree

MARKS = {"solved": "✓", "unsolved": "…", "wrong": "✗"}


@dataclass
class Result:
    """What :func:`check` found; ``outcome`` is ``"solved"``, ``"unsolved"`` or ``"wrong"``."""

    name: str
    outcome: str
    message: str

    def __str__(self) -> str:
        return f"{MARKS[self.outcome]} {self.name}: {self.message}"


_recorders: list[list[Result]] = []


@contextlib.contextmanager
def recorded() -> Iterator[list[Result]]:
    """Collects the results of all checks inside."""
    results: list[Result] = []
    _recorders.append(results)
    try:
        yield results
    finally:
        _recorders.pop()


def check(name: str, examine: Callable, *answers) -> None:
    """Print whether an answer is right; never raises on account of the answer.

    Args:
        name: of the exercise.
        examine: called with ``answers``; an ``assert`` that fails in it says what is wrong.
        answers: what the learner wrote (a function, a class).
    """
    try:
        examine(*answers)
        result = Result(name, "solved", "correct.")
    except NotImplementedError:
        result = Result(name, "unsolved", "not written yet. Replace `raise NotImplementedError` and run both cells.")
    except AssertionError as error:
        result = Result(name, "wrong", str(error) or "an assertion of the check failed.")
    except Exception as error:
        result = Result(name, "wrong", f"it raised {type(error).__name__}: {error}{_where(error)}")
    for results in _recorders:
        results.append(result)
    print(result)


def show(picture, text: str = "") -> None:
    """Put a picture into the cell's output (outside a notebook: only see that it is well-formed).

    Args:
        picture: SVG as a string, or an object with ``_repr_svg_``.
        text: what it shows, for who cannot see it.
    """
    svg = picture if isinstance(picture, str) else picture._repr_svg_()
    ElementTree.fromstring(svg)
    ipython = sys.modules.get("IPython")
    if ipython is not None and ipython.get_ipython() is not None:
        from IPython.display import display

        display({"image/svg+xml": svg, "text/plain": text or "a picture"}, raw=True)


def _where(error: Exception) -> str:
    """The learner's own line that raised, as far as it is known: the last frame outside installed modules."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.line]
    return f" (at `{frames[-1].line}`)" if frames else ""
