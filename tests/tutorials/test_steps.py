"""Every step: its code runs, its checks tell right from wrong, its two languages say the same things."""

import re

import pytest

from tutorials import notebook
from tutorials.run import check_answer, run_step
from tutorials.source_format import FOLDER, LANGUAGES, read_step, source_paths

STEPS = [pytest.param(path, id=path.stem) for path in source_paths()]
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"```.*?```", re.DOTALL)
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


@pytest.mark.parametrize("path", STEPS)
def test_the_code_runs_and_the_checks_tell_right_from_wrong(path):
    step = read_step(path)
    if "from numba import cuda" in path.read_text(encoding="utf-8"):
        for package in ("numba_cuda", "cuda", "greenlet"):
            pytest.importorskip(package, reason=f"compiling CUDA kernels needs {package} (pip install minipaged[cuda])")

    def at_exercise(exercise, variables):
        solved = check_answer(exercise, exercise.solution, path, variables)
        assert solved.outcome == "solved", str(solved)
        for wrong in exercise.wrong:
            result = check_answer(exercise, wrong, path, variables)
            where = f"{path.name}:{wrong.line}: {result}"
            assert result.outcome == "wrong" and re.search(wrong.message, result.message), where

    results = run_step(step, lambda exercise: exercise.stub, at_exercise)
    assert [result.outcome for result in results] == ["unsolved"] * len(step.exercises)


@pytest.mark.parametrize("path", STEPS)
def test_the_code_prints_nothing_that_a_reader_of_one_language_needs_translated(path):
    """Stub docstrings and comments are English; Turkish letters in code would be a text in the wrong cell."""
    for cell in read_step(path).cells:
        if getattr(cell, "kind", None) in ("code", "varies"):
            assert not re.search("[ğışİçöüĞŞÇÖÜ]", cell.text), f"{path.name}:{cell.line}"


@pytest.mark.parametrize("path", STEPS)
def test_both_languages_have_the_same_headings_links_code_and_numbers(path):
    for en, tr in read_step(path).pairs():
        where = f"{path.name}:{en.line}"
        assert _headings(en.text) == _headings(tr.text), where
        assert _links(en.text) == _links(tr.text), where
        assert FENCE.findall(en.text) == FENCE.findall(tr.text), where
        assert _numbers(en.text) == _numbers(tr.text), where


@pytest.mark.parametrize("path", STEPS)
def test_links_lead_somewhere(path):
    for en, tr in read_step(path).pairs():
        for link in LINK.findall(en.text + tr.text):
            if not link.startswith(("https:", "#")):
                target = path.parent / link.partition("#")[0]
                assert target.exists() or _is_other_notebook(link), f"{path.name}:{en.line}: {link}"


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("path", STEPS)
def test_the_notebook_in_the_repository_is_made_from_the_source(path, language):
    step = read_step(path)
    built = notebook.notebook_path(step, language)
    rebuild = f"python -m tutorials build {step.name[:2]}"
    assert built.exists(), f"{built.name} is missing; run: {rebuild}"
    stored = notebook.read(built)
    assert notebook.sources(stored) == notebook.sources(notebook.make_notebook(step, language)), f"run: {rebuild}"
    errors = [out for cell in stored["cells"] for out in cell.get("outputs", []) if out["output_type"] == "error"]
    assert errors == []


def test_there_are_no_notebooks_without_a_source():
    names = {path.stem for path in source_paths()}
    assert {path.stem for language in LANGUAGES for path in (FOLDER / language).glob("*.ipynb")} <= names


def _headings(text):
    return [len(line) - len(line.lstrip("#")) for line in FENCE.sub("", text).splitlines() if line.startswith("#")]


def _is_other_notebook(link):
    """A link to another step of the same language: ``03_topic.ipynb``, beside this one once it is a notebook."""
    return all((FOLDER / language / link).exists() for language in LANGUAGES)


def _links(text):
    # The glossary and the map have a file for each language.
    return sorted(link.replace(".tr.md", ".md") for link in LINK.findall(text))


def _numbers(text):
    """Numbers in the prose, two digits or more, whatever separates their digits in the language."""
    prose = LINK.sub("", FENCE.sub("", text))
    return sorted(digits for digits in (re.sub("[.,]", "", n) for n in NUMBER.findall(prose)) if len(digits) > 1)
