"""The checks explain themselves, and the command line tells what a learner has solved."""

import json
import re
import sys

import pytest

from tutorials import course, notebook
from tutorials.__main__ import main
from tutorials.run import check_answer, namespace
from tutorials.source_format import find_source, read_step


def examine(function):
    assert function(2) == 4, f"double(2) is {function(2)}; it must be 4."


def not_written(x):
    raise NotImplementedError


def raises(x):
    return x["a key"]


@pytest.mark.parametrize(
    "answer, outcome, text",
    [
        (lambda x: 2 * x, "solved", "✓ double: correct."),
        (not_written, "unsolved", "… double: not written yet."),
        (lambda x: x, "wrong", "✗ double: double(2) is 2; it must be 4."),
        (raises, "wrong", "✗ double: it raised TypeError: 'int' object is not subscriptable (at `return x["),
    ],
)
def test_check_prints_what_is_wrong_and_never_raises(capsys, answer, outcome, text):
    with course.recorded() as results:
        course.check("double", examine, answer)
    assert results[0].outcome == outcome
    assert capsys.readouterr().out.startswith(text)


def test_show_refuses_what_is_not_svg():
    course.show("<svg xmlns='http://www.w3.org/2000/svg'/>")
    with pytest.raises(SyntaxError):
        course.show("<svg>")


def solved_source(step):
    return "\n\n".join(exercise.solution.text for exercise in step.exercises)


@pytest.mark.parametrize("kind", [".py", ".ipynb"])
def test_the_command_line_checks_answers(tmp_path, capsys, kind):
    step = read_step(find_source("02"))
    path = tmp_path / f"mine{kind}"
    made = notebook.make_notebook(step, "tr")
    if kind == ".py":
        path.write_text(solved_source(step))
    else:
        for exercise in step.exercises:
            for cell in made["cells"]:
                if "".join(cell["source"]) == exercise.stub.text:
                    cell["source"] = exercise.solution.text.splitlines(keepends=True)
        path.write_text(json.dumps(made))
    assert main(["check", "2", str(path)]) == 0
    assert capsys.readouterr().out.count("✓") == len(step.exercises)
    assert main(["check", "02"]) == 1  # the notebook as it is in the repository
    assert "not written yet" in capsys.readouterr().out


def test_an_unknown_step_is_named(capsys):
    assert main(["check", "99"]) == 2
    assert "there is no step 99" in capsys.readouterr().err


@pytest.mark.parametrize("text, message", [("def Allocator(:", "SyntaxError"), ("x = 1", "NameError: .*Allocator")])
def test_a_file_that_cannot_be_checked_is_named(tmp_path, capsys, text, message):
    path = tmp_path / "answers.py"
    path.write_text(text)
    assert main(["check", "02", str(path)]) == 2
    assert re.search(f"error: .*answers.py: {message}", capsys.readouterr().err)


def test_the_first_cell_finds_the_course_around_the_notebook(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError, match="minipaged's folder is not in .* clone the repository there, or upload it"):
        exec(notebook.SETUP, {})
    (tmp_path / "minipaged-main" / "tutorials" / "course").mkdir(parents=True)
    exec(notebook.SETUP, {})
    assert sys.path[-1] == str(tmp_path / "minipaged-main")


def test_a_check_cell_that_checks_nothing_is_seen():
    step = read_step(find_source("02"))
    exercise = step.exercises[0]
    exercise.check.text = "pass"
    with pytest.raises(AssertionError, match="must call check"):
        check_answer(exercise, exercise.stub, step.path, namespace())
