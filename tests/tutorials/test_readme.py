"""The map of the course: every step in both languages, every link, and the command that a machine runs too."""

import re

import pytest

from tutorials.source_format import FOLDER, source_paths

READMES = {"en": FOLDER / "README.md", "tr": FOLDER / "README.tr.md"}
LINK = re.compile(r"\]\(([^)\s]+)\)")


def rows(language):
    """``(notebook, minutes, steps needed)`` of each row of the map."""
    found = []
    for line in READMES[language].read_text(encoding="utf-8").splitlines():
        if line.startswith("| ["):
            step, _, minutes, needs = (cell.strip() for cell in line.strip("|").split("|"))
            found.append((LINK.search(step)[1], int(minutes), re.findall(r"\d\d", needs)))
    return found


@pytest.mark.parametrize("language", READMES)
def test_the_map_has_every_step_in_order_and_its_links_exist(language):
    assert [row[0] for row in rows(language)] == [f"{language}/{path.stem}.ipynb" for path in source_paths()]
    for link in LINK.findall(READMES[language].read_text(encoding="utf-8")):
        assert (FOLDER / link).exists(), link


def test_both_languages_map_the_same_and_no_step_takes_longer_than_15_minutes():
    english, turkish = rows("en"), rows("tr")
    assert [row[1:] for row in english] == [row[1:] for row in turkish]
    for number, (name, minutes, needs) in enumerate(english, 1):
        assert minutes <= 15, name
        assert all(int(step) < number for step in needs), name


def test_both_languages_give_the_same_commands():
    def commands(language):
        text = READMES[language].read_text(encoding="utf-8")
        lines = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)).replace("tutorials/tr", "tutorials/en")
        return [line.partition("#")[0].strip() for line in lines.splitlines()]

    assert commands("en") == commands("tr")


def test_a_step_says_how_long_it_takes_as_the_map_does():
    for path, (_, minutes, _) in zip(source_paths(), rows("en"), strict=True):
        head = " ".join(path.read_text(encoding="utf-8").split("# %% [markdown] tr")[0].replace("#", "").split())
        assert re.search(rf"[Aa]bout {minutes} minutes", head), f"{path.name} names other minutes than {minutes}"
