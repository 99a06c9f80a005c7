"""The glossary: one list of terms, rendered in both languages.

``glossary.txt`` holds a stanza per term, sorted by the English term; the lines of a stanza are in this order:

    block table
      tr: blok tablosu
      en means: The block ids of a sequence, in the order of its tokens.
      tr means: Bir dizinin bloklarının, belirteç sırasına göre kimlikleri.
      step: 03
      source: minipaged/core/block_table.py
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tutorials.source_format import FOLDER, SourceError, find_source

SOURCE = FOLDER / "glossary.txt"
FIELDS = ("tr", "en means", "tr means", "step", "source")
OUTPUTS = {"en": FOLDER / "GLOSSARY.md", "tr": FOLDER / "GLOSSARY.tr.md"}
_TURKISH = "abcçdefgğhıijklmnoöprsştuüvyz"

_HEADS = {
    "en": (
        "# Glossary",
        "Made by `python -m tutorials glossary` from [`glossary.txt`](glossary.txt). [Türkçesi](GLOSSARY.tr.md).",
        "| term | in Turkish | what it means | first in | source |",
    ),
    "tr": (
        "# Terimler",
        "`python -m tutorials glossary` komutuyla [`glossary.txt`](glossary.txt) dosyasından üretilir. "
        "[In English](GLOSSARY.md).",
        "| terim | İngilizcesi | anlamı | ilk geçtiği adım | kaynak |",
    ),
}


@dataclass
class Term:
    en: str
    tr: str
    means_en: str
    means_tr: str
    step: str  #: "03"
    source: str  #: path from the repository's root


def read_terms(path: Path = SOURCE) -> list[Term]:
    """The terms in the file's order. Raises :class:`SourceError` on a stanza that is not as described."""
    terms = []
    for stanza in path.read_text(encoding="utf-8").strip().split("\n\n"):
        head, *lines = stanza.split("\n")
        pairs = [line.strip().partition(": ")[::2] for line in lines]
        if tuple(key for key, _ in pairs) != FIELDS:
            raise SourceError(f"{path.name}: {head!r} has the lines {[key for key, _ in pairs]}, not {list(FIELDS)}.")
        terms.append(Term(head.strip(), *(value for _, value in pairs)))
    return terms


def render(terms: list[Term], language: str) -> str:
    """The glossary as Markdown, sorted as the language sorts."""
    title, note, head = _HEADS[language]
    rows = [title, "", note, "", head, "|---|---|---|---|---|"]
    key = (lambda term: term.en.lower()) if language == "en" else (lambda term: _turkish_key(term.tr))
    for term in sorted(terms, key=key):
        step = f"[{term.step}]({language}/{find_source(term.step).stem}.ipynb)"
        source = f"[`{term.source}`](../{term.source})"
        if language == "en":
            rows.append(f"| {term.en} | {term.tr} | {term.means_en} | {step} | {source} |")
        else:
            rows.append(f"| {term.tr} | {term.en} | {term.means_tr} | {step} | {source} |")
    return "\n".join(rows) + "\n"


def write_all() -> None:
    terms = read_terms()
    for language, path in OUTPUTS.items():
        path.write_text(render(terms, language), encoding="utf-8")


def _turkish_key(text: str) -> list[int]:
    lowered = text.replace("I", "ı").replace("İ", "i").lower()
    return [_TURKISH.find(letter) if letter in _TURKISH else ord(letter) - 1000 for letter in lowered]
