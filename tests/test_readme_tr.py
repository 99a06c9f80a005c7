"""README.tr.md says what README.md says: the same commands, the same tables, and links that lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ENGLISH, TURKISH = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.tr.md"))
FENCE = re.compile(r"```\w+\n.*?```", re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def tables(text: str) -> list[list[list[str]]]:
    """Every table as rows of cells."""
    found = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    return [[re.split(r"(?<!\\)\|", row.strip().strip("|")) for row in table.splitlines()] for table in found]


def test_its_code_stands_in_the_english_one_too():
    assert len(FENCE.findall(TURKISH)) >= 5
    for code in FENCE.findall(TURKISH):
        assert code in ENGLISH, code


def test_its_links_lead_somewhere():
    headings = {
        re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", ENGLISH, re.MULTILINE)
    }
    for link in LINK.findall(TURKISH):
        path, _, anchor = link.partition("#")
        assert (ROOT / path).exists(), link
        assert not anchor or anchor in headings, link


@pytest.mark.parametrize("first", ["`minipaged generate", "Llama 2/3"])
def test_the_tables_have_the_same_rows(first):
    """Of the commands, and of what works where: the same first cells, as far as they are code, and as many rows."""
    english, turkish = (
        next(table for table in tables(text) if table[2][0].strip().startswith(first)) for text in (ENGLISH, TURKISH)
    )
    assert len(english) == len(turkish)
    for en, tr in zip(english, turkish, strict=True):
        assert re.findall("`[^`]*`", en[0]) == re.findall("`[^`]*`", tr[0])
        if first != "`minipaged generate":
            words = {"yes": "evet", "emulated": "öykünmeyle", "not yet": "henüz değil"}
            for cell, cell_tr in zip(en[1:], tr[1:], strict=True):
                assert words.get(cell.strip(), cell_tr.strip()) == cell_tr.strip(), (en, tr)
