"""The parser of the tutorials' text sources refuses what it does not understand, with the line."""

from pathlib import Path

import pytest

from tutorials.source_format import Exercise, SourceError, parse

PATH = Path("01_example.py")
TITLE = "# %% [markdown] en\n# # Title\n#\n# Text.\n# %% [markdown] tr\n# # Başlık\n"
EXERCISE = """# %% [exercise] double
def double(x):
    raise NotImplementedError

# %% [solution] double
def double(x):
    return 2 * x

# %% [check] double
check("double", lambda f: f(2) == 4, double)
"""
WRONG = "# %% [wrong] double: a: b+\ndef double(x):\n    return x\n"


def test_a_step_is_read():
    step = parse(TITLE + "# %%\nx = 1\n\n# %% [varies]\nprint(x)\n" + EXERCISE + 3 * WRONG, PATH)
    assert [(en.text, tr.text) for en, tr in step.pairs()] == [("# Title\n\nText.", "# Başlık")]
    assert [cell.kind for cell in step.cells if not isinstance(cell, Exercise)] == ["en", "tr", "code", "varies"]
    (exercise,) = step.exercises
    assert exercise.name == "double" and len(exercise.wrong) == 3
    assert exercise.stub.text == "def double(x):\n    raise NotImplementedError"
    assert exercise.wrong[0].message == "a: b+" and exercise.wrong[0].line == 22


@pytest.mark.parametrize(
    "text, message",
    [
        ("x = 1\n" + TITLE, ":1: text before the first cell"),
        ("# %%\nx = 1\n" + TITLE, "a step begins with a text cell"),
        (TITLE + "# %% [markdown] de\n# Titel\n", ":7: .*no cell header"),
        (TITLE + "# %% code\nx\n", ":7: .*no cell header"),
        (TITLE + "# %%\n\n", ":7: the cell is empty"),
        (TITLE + "# %% [markdown] en\n# More.\n", ":7: an English cell without its Turkish"),
        (TITLE + "# %% [markdown] tr\n# Devam.\n", ":7: a Turkish cell without its English"),
        ("# %% [markdown] en\nx = 1\n# %% [markdown] tr\n# x\n", ":2: code in a text cell"),
        (TITLE + EXERCISE + 2 * WRONG, ":7: exercise double needs"),
        (TITLE + EXERCISE.replace("[check]", "[checks]") + 3 * WRONG, "no cell header"),
        (TITLE + WRONG, ":7: a \\[wrong\\] cell that follows no exercise"),
        (TITLE + EXERCISE.replace("[solution] double", "[solution] triple") + 3 * WRONG, "'triple' in exercise"),
    ],
)
def test_a_malformed_source_is_refused(text, message):
    with pytest.raises(SourceError, match=message):
        parse(text, PATH)
