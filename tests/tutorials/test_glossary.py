"""The glossary: well-formed, sorted, rendered, and its links lead somewhere."""

import re

import pytest

from tutorials import glossary
from tutorials.source_format import FOLDER, LANGUAGES, SourceError, find_source, read_step

ROOT = FOLDER.parent


def test_terms_are_sorted_and_their_sources_and_steps_exist():
    terms = glossary.read_terms()
    names = [term.en for term in terms]
    assert names == sorted(set(names), key=str.lower)
    for term in terms:
        assert (ROOT / term.source).exists(), f"{term.en}: {term.source} is not there"
        assert re.fullmatch(r"\d\d", term.step) and find_source(term.step)
        assert term.means_en.endswith(".") and term.means_tr.endswith("."), term.en


def test_a_step_introduces_its_terms_in_both_languages():
    for term in glossary.read_terms():
        pairs = list(read_step(find_source(term.step)).pairs())
        english = " ".join(en.text for en, _ in pairs).replace("\n", " ").lower()
        turkish = " ".join(tr.text for _, tr in pairs).replace("\n", " ")
        assert term.en.lower().replace("`", "") in english.replace("`", ""), f"{term.en!r} is not in step {term.step}"
        lowered = turkish.replace("İ", "i").replace("I", "ı").lower()
        assert _stem(term.tr) in lowered, f"{term.tr!r} is not in step {term.step}"


def _stem(term):
    """Turkish nouns change their last letters before a suffix (yük, yükü; tablosu, tablosunun)."""
    lowered = term.replace("İ", "i").replace("I", "ı").lower()
    return lowered[:-1] if len(lowered) > 4 else lowered


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_rendered_glossary_is_up_to_date_and_its_links_exist(language):
    text = glossary.OUTPUTS[language].read_text(encoding="utf-8")
    assert text == glossary.render(glossary.read_terms(), language), "run: python -m tutorials glossary"
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert (FOLDER / link).exists(), link


def test_a_malformed_stanza_is_named(tmp_path):
    path = tmp_path / "glossary.txt"
    path.write_text("block\n  tr: blok\n  step: 02\n")
    with pytest.raises(SourceError, match="'block' has the lines"):
        glossary.read_terms(path)
