"""The page in a real browser: keys, what it says aloud, its width, and how long 10,000 steps take to open."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --virtual-time-budget=4000"
).split()

PROBE = """
<script>
(function () {
  const said = (id) => document.getElementById(id).textContent;
  const found = { errors: window.failures, ready: document.documentElement.dataset.ready, steps: [] };
  for (const [key, shift] of %s) {
    const event = new KeyboardEvent("keydown", { key, shiftKey: shift, bubbles: true, cancelable: true });
    document.getElementById("slider").dispatchEvent(event);
    found.steps.push([document.getElementById("slider").value, said("where"), said("live"), event.defaultPrevented]);
  }
  document.getElementById("as-table").open = true;
  setTimeout(() => {
    found.rows = document.querySelectorAll("#table tbody tr").length;
    found.widths = [document.documentElement.scrollWidth, window.innerWidth];
    found.unnamed = [...document.querySelectorAll("button, input, select")].filter(
      (element) => !(element.ariaLabel || element.textContent.trim() || element.labels.length)).length;
    const hasText = (element) => !["SCRIPT", "STYLE"].includes(element.tagName)
      && [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    const texts = [...document.querySelectorAll("body *")].filter(hasText);
    found.smallest = Math.min(...texts.map((element) => parseFloat(getComputedStyle(element).fontSize)));
    document.documentElement.dataset.found = JSON.stringify(found);
  }, 50);
})();
</script>
"""
KEYS = [
    ("ArrowRight", False),
    ("ArrowRight", True),
    ("ArrowLeft", False),
    ("End", False),
    ("ArrowRight", False),
    ("Home", False),
    ("ArrowLeft", False),
    ("PageDown", False),
    ("x", False),
]


def look(trace, tmp_path, width, keys=()):
    """What the probe finds on the page of a trace."""
    path = tmp_path / "page.html"
    trace.to_html(path)
    text = path.read_text(encoding="utf-8")
    watch = "<script>window.failures = []; addEventListener('error', (e) => failures.push(e.message));</script>"
    text = text.replace("</head>", watch + "</head>").replace("</body>", PROBE % json.dumps(list(keys)) + "</body>")
    path.write_text(text, encoding="utf-8")
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [BROWSER, *FLAGS, profile, f"--window-size={width},900", "--dump-dom", path.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, encoding="utf-8").stdout
    (found,) = re.findall(r'data-found="([^"]*)"', dom)
    return json.loads(html.unescape(found))


@pytest.mark.parametrize("width", [1280, 500])  # a headless window is not made narrower than 500
def test_keys_and_words(run, tmp_path, width):
    found = look(run.trace, tmp_path, width, KEYS)
    last = len(run.trace)
    assert found["errors"] == []
    assert [int(step[0]) for step in found["steps"]] == [1, 11, 10, last, last, 0, 0, 100, 100]
    assert [step[3] for step in found["steps"]] == [True] * 8 + [False]
    step = run.trace.at(11)
    assert found["steps"][1][1] == f"Step 11 of {last - 1}"
    assert found["steps"][1][2].startswith(f"Step 11: {step.num_used} of {step.num_blocks} blocks in use")
    assert step.events()[0] in found["steps"][1][2]
    assert found["steps"][3][2].startswith("The end: ")
    assert found["rows"] == len(run.trace.at(100).sequences) + 5
    assert found["widths"][0] <= found["widths"][1], "the page is wider than its window"
    assert found["unnamed"] == 0 and found["smallest"] >= 11.5


@pytest.mark.slow
def test_a_long_trace_opens_at_once(recorded_run, tmp_path):
    trace = recorded_run(0, num_steps=10_000, num_blocks=256, max_num_seqs=16, max_num_batched_tokens=64).trace
    found = look(trace, tmp_path, 1280)
    assert found["errors"] == [] and len(trace) == 10_000
    assert float(found["ready"]) < 2000  # milliseconds since the page began to load
