"""What the notebooks use besides minipaged: pictures in a cell's output, and checks that explain themselves."""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
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


def golden() -> list[dict]:
    """What Hugging Face transformers computes with ``tiny``, made by nothing of ours.

    For each prompt ``prompt``, ``prompt_ids`` and ``target``: ``greedy_ids``, and under
    ``top5_last_prompt_position`` the largest logits with ``id`` and ``logit``.
    """
    path = Path(__file__).resolve().parents[2] / "tests" / "fixtures" / "tiny_golden.json"
    return json.loads(path.read_text(encoding="utf-8"))["prompts"]


def _where(error: Exception) -> str:
    """The line that raised, the learner's own as far as that is known: the last one outside installed packages."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.line and "site-packages" not in f.filename]
    return f" (at `{frames[-1].line}`)" if frames else ""
