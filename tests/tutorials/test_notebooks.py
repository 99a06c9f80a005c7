"""Every notebook executes in a kernel of its own, as the learner's does, and prints what is stored."""

import pytest

from tutorials import notebook
from tutorials.run import run_step
from tutorials.source_format import LANGUAGES, read_step, source_paths

pytestmark = pytest.mark.tutorials
STEPS = [pytest.param(path, id=path.stem) for path in source_paths()]


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("path", STEPS)
def test_it_executes_and_prints_what_is_stored(path, language):
    step = read_step(path)
    target = notebook.notebook_path(step, language)
    executed = notebook.execute(notebook.make_notebook(step, language), target.parent)
    assert notebook.printed(executed) == notebook.printed(notebook.read(target))


@pytest.mark.parametrize("path", STEPS)
def test_it_runs_with_the_solutions_in_place(path):
    results = run_step(read_step(path), lambda exercise: exercise.solution)
    assert [result.outcome for result in results] == ["solved"] * len(results)
