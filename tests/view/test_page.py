"""The page holds its trace, asks nothing of anybody, and its scripts see the same states as Python does."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from minipaged.errors import InvalidParameterError
from minipaged.view import Trace
from minipaged.view.words import summary

PAGE = Path(__file__).resolve().parents[2] / "minipaged" / "view" / "page"
NODE = shutil.which("node")

COMPARE = """
const fs = require("fs");
const { Steps, events, summary } = require(process.argv[1]);
const trace = JSON.parse(fs.readFileSync(0, "utf-8"));
const steps = new Steps(trace, 16);
const plain = (state) => ({
  events: state.isStep ? events(state) : [], summary: summary(state),
  refs: [...state.refCnts], cached: [...state.cached].sort((a, b) => a - b),
  sequences: state.sequences.map((s) =>
    [s.number, s.id, s.prompt, s.known, s.computed, s.table, s.scheduled, s.preemptions]),
  work: state.work.map((w) => [w.sequence.id, w.kind, w.tokens, w.start, w.guesses, w.accepted, w.cached, w.swapped]),
  total: state.isStep ? steps.totals[state.index] : [],
});
const found = [];  // backwards, so that every state comes from a checkpoint
for (let index = steps.length; index >= 0; index -= 1) found.push(plain(steps.at(index)));
console.log(JSON.stringify({ steps: found.reverse(), highest: steps.highest }));
"""


class Outline(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.elements, self.stack, self.names = [], [], {}
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))


@pytest.fixture(scope="module")
def page(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "trace.html"
    run.trace.to_html(path, "A <trace> & more")
    return path.read_text(encoding="utf-8")


def test_the_page_is_complete_in_itself(page):
    outline = Outline(page)
    assert "default-src 'none'" in page and "{{" not in page.partition("<script>")[0]
    for _, attributes in outline.elements:
        assert not {"src", "href"} & set(attributes)
    assert not re.search(r"https?://|fetch\(|XMLHttpRequest|import\(", page)
    assert "<title>A &lt;trace&gt; &amp; more</title>" in page


def test_everything_on_the_page_has_a_name(page):
    outline = Outline(page)
    ids = {attributes["id"] for _, attributes in outline.elements if "id" in attributes}
    for tag, attributes in outline.elements:
        for reference in (attributes.get("aria-labelledby"), attributes.get("for")):
            assert reference is None or reference in ids
        if tag == "button":
            assert attributes.get("aria-label") or attributes["id"] == "play"
        if tag == "input":
            assert attributes["aria-label"]
    assert any(attributes.get("aria-live") == "polite" for _, attributes in outline.elements)
    assert dict(outline.elements)["html"]["lang"] == "en"
    for script in ("viewer.js", "draw.js"):  # what the scripts look for is there
        text = (PAGE / script).read_text(encoding="utf-8")
        assert set(re.findall(r'byId\("([\w-]+)"\)', text)) <= ids


def test_the_trace_can_be_read_back_from_the_page(page, run):
    (text,) = re.findall(r'<script type="application/json" id="trace">(.*?)</script>', page, re.DOTALL)
    assert "<" not in text
    assert Trace.from_json(text).to_json() == run.trace.to_json()


def test_an_id_cannot_leave_the_page(run, tmp_path):
    data = json.loads(run.trace.to_json())
    data["sequences"][0][0] = "</script><script>alert(1)</script>"
    Trace.from_json(json.dumps(data)).to_html(tmp_path / "trace.html")
    assert "<script>alert" not in (tmp_path / "trace.html").read_text(encoding="utf-8")
    with pytest.raises(InvalidParameterError, match="cannot write"):
        run.trace.to_html(tmp_path / "nowhere" / "trace.html")


@pytest.mark.skipif(NODE is None, reason="running the page's scripts needs node")
@pytest.mark.parametrize("seed", range(3))
def test_the_scripts_see_what_python_sees(recorded_run, seed):
    trace = recorded_run(seed, num_steps=150, num_host_blocks=6, policy="priority").trace
    script = str(PAGE / "replay.js")
    result = subprocess.run(
        [NODE, "-e", COMPARE, script], input=trace.to_json(), capture_output=True, text=True, check=True
    )
    found = json.loads(result.stdout)
    states = [*trace.steps, trace.end]
    assert len(found["steps"]) == len(states)
    for other, state in zip(found["steps"], states, strict=True):
        assert other["summary"] == summary(state)
        assert other["refs"] == state.ref_cnts and other["cached"] == sorted(state.cached)
        assert other["sequences"] == [
            [
                s.number,
                s.sequence_id,
                s.num_prompt_tokens,
                s.num_tokens,
                s.num_computed_tokens,
                s.block_ids,
                s.num_scheduled_tokens,
                s.num_preemptions,
            ]
            for s in state.sequences
        ]
    for other, step in zip(found["steps"], trace.steps, strict=False):
        assert other["events"] == step.events()
        assert other["work"] == [
            [
                w.sequence.sequence_id,
                w.kind,
                w.num_tokens,
                w.num_computed_tokens,
                w.num_lookahead_tokens,
                w.num_accepted_tokens,
                w.num_cached_tokens,
                w.num_swapped_tokens,
            ]
            for w in step.work
        ]
        assert sum(other["total"][:3]) == step.num_tokens
        assert other["total"][3:] == [step.num_used, step.num_cached_free]
    assert found["highest"] == max(
        b for state in states for b, n in enumerate(state.ref_cnts) if n or b in state.cached
    )


def test_a_file_for_perfetto(run, tmp_path):
    run.trace.to_chrome(tmp_path / "chrome.json")
    events = json.loads((tmp_path / "chrome.json").read_text(encoding="utf-8"))["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert all(isinstance(event["ts"], int) and event["dur"] >= 0 for event in spans)
    steps = [event for event in spans if event["name"].startswith("step ")]
    assert [event["args"]["tokens"] for event in steps] == [step.num_tokens for step in run.trace.steps]
    named = {(event["pid"], event["tid"]) for event in events if event["name"] == "thread_name"}
    assert {(event["pid"], event["tid"]) for event in spans} <= named
    for step, event in zip(run.trace.steps, [event for event in events if event["ph"] == "C"], strict=True):
        assert sum(event["args"].values()) == step.num_blocks
    instants = [event["name"] for event in events if event["ph"] == "i"]
    assert instants.count("preempted") == sum(len(step.preempted) for step in run.trace.steps)
