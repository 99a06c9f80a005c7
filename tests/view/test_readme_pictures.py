"""The README's pictures are what its command makes, and its text tells what they show."""

from __future__ import annotations

from pathlib import Path

import pytest

from minipaged.view import pictures

FOLDER = Path(__file__).resolve().parents[2] / pictures.FOLDER


@pytest.fixture(scope="module")
def trace():
    return pictures.record()


def test_made_again_they_are_the_same(tmp_path, capsys):
    assert pictures.main([str(tmp_path)]) == 0
    for path in FOLDER.iterdir():
        assert (tmp_path / path.name).read_text(encoding="utf-8") == path.read_text(encoding="utf-8")
    assert len(capsys.readouterr().out.splitlines()) == len(list(FOLDER.iterdir())) == len(list(tmp_path.iterdir()))


def test_the_text_beside_them_is_true(trace):
    step = next(step for step in trace.steps if step.copies)
    assert step.num_blocks == 32 and len(step.work) == 5
    assert {work.kind for work in step.work} == {"decode"}
    tables = {sequence.sequence_id: sequence.block_ids for sequence in step.sequences}
    assert [name for name, ids in tables.items() if ids[:3] != [0, 1, 2]] == ["request-3"]
    assert step.ref_cnts[:3] == [4, 4, 4] and step.ref_cnts[11:13] == [3, 3]
    assert step.copies == [(13, 15), (13, 16)]
    assert [b for b in step.cached if step.ref_cnts[b] == 0] == [3, 4, 5, 6, 7]


def test_all_that_the_timeline_tells_of_happens(trace):
    assert (len(trace), len(trace.sequences)) == (36, 6)
    work = [work for step in trace.steps for work in step.work]
    assert any(each.num_cached_tokens for each in work)
    assert sum(each.kind == "prefill" and each.sequence.sequence_id == "request-0" for each in work) == 2
    assert [name for step in trace.steps for name in step.preempted] == ["request-3"]
