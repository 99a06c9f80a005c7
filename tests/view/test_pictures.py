"""Pictures are valid SVG, say what the state is, and are the same each time."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest

from minipaged.config import SamplingParams
from minipaged.core.factory import make_scheduler
from minipaged.core.request import Request
from minipaged.core.scheduler import SchedulerConfig
from minipaged.errors import InvalidParameterError
from minipaged.view import Trace, draw_blocks, draw_timeline, snapshot
from minipaged.view.state import SequenceState, Snapshot

SVG = "{http://www.w3.org/2000/svg}"


def parse(picture):
    """The root of a picture, which is well-formed, named, and complete in itself."""
    root = ElementTree.fromstring(str(picture))
    assert root.tag == f"{SVG}svg" and root.get("role") == "img"
    names = {element.get("id"): element.text for element in root if element.tag in (f"{SVG}title", f"{SVG}desc")}
    assert root.get("aria-labelledby").split() == list(names) and all(names.values())
    assert not re.search(r"href|url\((?!#)|@import|<script", str(picture))
    width, height = map(float, root.get("viewBox").split()[2:])
    for element in root.iter():
        for name, limit in (("x", width), ("y", height)):
            if element.tag in (f"{SVG}rect", f"{SVG}text") and element.get(name):
                assert 0 <= float(element.get(name)) <= limit
    for element in root.iter():  # with the style taken out, as some sites do, it still has its light colours
        if element.tag in (f"{SVG}rect", f"{SVG}circle", f"{SVG}text"):
            assert element.get("fill"), ElementTree.tostring(element)
    classes = {name for element in root.iter() for name in (element.get("class") or "").split()}
    style = root.find(f"{SVG}style").text
    assert all(f".{name}{{" in style for name in classes) and "prefers-color-scheme:dark" in style
    return root


def texts(picture):
    return [element.text for element in parse(picture).iter(f"{SVG}text")]


def titles(picture):
    return [element.text for element in parse(picture).iter(f"{SVG}title")]


def cells_of(picture):
    """By sequence id, the physical blocks drawn in its row."""
    rows: dict[str, list[int]] = {}
    for title in titles(picture):
        if match := re.match(r"(.+), logical block (\d+): physical block (\d+)", title):
            rows.setdefault(match[1], []).append(int(match[3]))
            assert len(rows[match[1]]) == int(match[2]) + 1
    return rows


def test_the_picture_is_the_live_state(recorded_run):
    """Of a scheduler without any model."""
    run = recorded_run(2, num_steps=17)
    scheduler = run.scheduler
    picture = draw_blocks(scheduler)
    running = {r.request_id: r.block_table.block_ids for r in scheduler.running}
    assert running and cells_of(picture) == running
    for block in scheduler.pool.blocks:
        (title,) = [t for t in titles(picture) if re.match(rf"block {block.block_id}:", t)]
        assert (f"ref_cnt {block.ref_cnt}" in title) == (block.ref_cnt > 0)
        assert ("cache" in title) == (block.block_hash is not None)
    pool = scheduler.pool
    assert f"{pool.num_blocks - pool.num_free} of 18 blocks in use" in texts(picture)[1]
    assert str(draw_blocks(scheduler)) == str(picture) == picture._repr_svg_()


def test_every_step_can_be_drawn(run):
    for step in run.trace.steps:
        picture = draw_blocks(step)
        assert cells_of(picture) == {s.sequence_id: s.block_ids for s in step.sequences if s.is_running}
        assert texts(picture)[0] == f"Step {step.index}"
        if step.copies:
            assert f"copy-on-write: block {step.copies[0][0]} is copied to" in str(picture)
        assert ("evicted, used anew" in texts(picture)) == bool(step.evicted)
    parse(draw_blocks(run.trace.end, "The end"))


def test_names_cannot_break_a_picture():
    scheduler = make_scheduler(SchedulerConfig(4, 4, 16, 2, 8))
    name = "<script>&\"'\x00\ud800]]>" + "x" * 200
    scheduler.add(Request(name, [1, 2, 3], SamplingParams(max_tokens=2)))
    scheduler.schedule()
    assert "<script>" in " ".join(titles(draw_blocks(scheduler, title="a < b & \x07")))


@pytest.mark.parametrize("num_blocks", [1, 128, 129, 5000, 100_000])
def test_pools_of_any_size(num_blocks):
    sequences = [
        SequenceState(i, f"r{i}", 9, 9, 9, list(range(i * 200, min(i * 200 + 200, num_blocks)))) for i in range(30)
    ]
    held = {b for s in sequences for b in s.block_ids}
    counts = [int(b in held) for b in range(num_blocks)]
    picture = draw_blocks(Snapshot(4, sequences, counts, {num_blocks - 1}))
    parse(picture)
    assert len(str(picture)) < 2_500_000
    assert num_blocks < 5000 or "are not drawn" in str(picture)


def test_what_cannot_be_drawn_is_refused():
    for source in (None, 3, "x", []):
        with pytest.raises(InvalidParameterError, match="has no block tables to draw; give a Scheduler"):
            draw_blocks(source)


def test_a_step_and_a_snapshot_are_their_own_source(run):
    step = run.trace.at(4)
    assert snapshot(step) is step


def test_the_timeline_shows_each_step(run):
    picture = draw_timeline(run.trace, "What happened", start=0, stop=16)
    assert texts(picture)[0] == "What happened"
    for step in run.trace.steps[:16]:
        for work in step.work:
            assert any(
                t.startswith(f"step {step.index}: {work.num_tokens - work.num_lookahead_tokens} computed")
                for t in titles(picture)
            )
        assert sum(t == f"step {step.index}: preempted" for t in titles(picture)) == len(step.preempted)
    assert str(draw_timeline(run.trace)) == str(draw_timeline(Trace.from_json(run.trace.to_json())))


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (3, 3), (0, 10_000), (5, 2)])
def test_steps_that_do_not_exist_have_no_timeline(run, start, stop):
    with pytest.raises(InvalidParameterError, match=r"the trace has steps \[0, 120\)"):
        draw_timeline(run.trace, start=start, stop=stop)


def test_a_long_timeline_stays_small(recorded_run):
    trace = recorded_run(1, num_steps=900).trace
    picture = draw_timeline(trace)
    parse(picture)
    assert "a column is 5 steps" in str(picture) and len(str(picture)) < 400_000


def test_saving(run, tmp_path):
    picture = draw_timeline(run.trace)
    picture.save(tmp_path / "x.svg")
    assert (tmp_path / "x.svg").read_text(encoding="utf-8") == str(picture)
    with pytest.raises(InvalidParameterError, match="cannot write .*No such file"):
        picture.save(tmp_path / "nowhere" / "x.svg")
