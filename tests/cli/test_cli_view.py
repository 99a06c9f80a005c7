"""``generate --trace`` and ``--watch``, and ``view``."""

from __future__ import annotations

import json
import os
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from minipaged.view import Trace

TINY = ("--model", "tiny-draft", "--device", "reference", "--max-tokens", "6")


@pytest.fixture
def trace_file(cli, tmp_path):
    path = tmp_path / "trace.json"
    flags = ("--n", "3", "--temperature", "1", "--seed", "3", "--trace", path)
    code, out, err = cli("generate", *TINY, *flags, "--raw", "ROMEO:")
    assert code == 0 and out.count("---") == 2 and f"minipaged view {path}" in err
    return path


def test_a_trace_of_what_was_generated(trace_file):
    trace = Trace.load(trace_file)
    assert trace.about["model"] == "tiny-draft" and trace.about["device"] == "reference"
    assert len(trace) == 6 and len(trace.sequences) == 3
    assert [step.num_tokens for step in trace.steps][1:] == [3] * 5
    assert len(trace.steps[0].forked) == 2 and trace.end.num_used == 0


def test_pages_and_drawings(cli, trace_file, tmp_path):
    code, out, err = cli("view", trace_file)
    assert (code, out.strip()) == (0, str(tmp_path / "trace.html")) and "6 steps, 3 sequences" in err
    assert "<!doctype html>" in (tmp_path / "trace.html").read_text(encoding="utf-8")
    assert cli("view", trace_file, "--html", tmp_path / "other.html")[0] == 0
    assert (tmp_path / "other.html").read_bytes() == (tmp_path / "trace.html").read_bytes()
    for flags in (), ("--step", "2"):
        assert cli("view", trace_file, "--svg", tmp_path / "x.svg", *flags)[0] == 0
        ElementTree.parse(tmp_path / "x.svg")
    assert "Step 2" in (tmp_path / "x.svg").read_text(encoding="utf-8")
    assert cli("view", trace_file, "--chrome", tmp_path / "chrome.json")[0] == 0
    assert json.loads((tmp_path / "chrome.json").read_text(encoding="utf-8"))["traceEvents"]


def test_opening_in_a_browser(cli, trace_file, monkeypatch):
    import webbrowser

    opened = []
    monkeypatch.setattr(webbrowser, "open", lambda uri: opened.append(uri) or len(opened) == 1)
    assert cli("view", trace_file, "--open")[0] == 0
    assert opened == [trace_file.with_suffix(".html").as_uri()]
    code, _, err = cli("view", trace_file, "--open")
    assert code == 2 and "no browser could be started" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--step", "1"), "--step chooses what --svg draws"),
        (("--svg", "x.svg", "--step", "6"), "--step is 6; the trace has steps 0 to 5"),
        (("--svg", "x.svg", "--step", "-1"), "--step is -1"),
        (("--html", "trace.json"), "is the trace itself"),
        (("--html", "nowhere/x.html"), "cannot write 'nowhere/x.html': No such file"),
        (("--chrome", "x.json", "--open"), "--open shows pages and drawings"),
        (("--svg", "x.svg", "--html", "x.html"), "not allowed with argument"),
    ],
)
def test_what_view_refuses(cli, trace_file, monkeypatch, flags, message):
    monkeypatch.chdir(trace_file.parent)
    before = trace_file.read_bytes()
    code, out, err = cli("view", trace_file, *flags)
    assert code == 2 and out == "" and message in err
    assert trace_file.read_bytes() == before


def test_foreign_files(cli, tmp_path):
    (tmp_path / "x.json").write_text("{}")
    code, _, err = cli("view", tmp_path / "x.json")
    assert code == 2 and "is no trace of minipaged" in err
    code, _, err = cli("view", tmp_path / "y.json")
    assert code == 2 and "cannot read the trace" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--trace", "nowhere/trace.json"), "is not a place for a file"),
        (("--trace", "."), "is not a place for a file"),
        (("--watch",), "--watch draws on a terminal, and stderr is none"),
        (("--watch-delay", "1"), "--watch-delay is given without --watch"),
        (("--watch", "--watch-delay", "-1"), "is not a number of seconds from 0 to 60"),
    ],
)
def test_what_generate_refuses(cli, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = cli("generate", *TINY, *flags, "ROMEO:")
    assert code == 2 and out == "" and message in err
    assert not list(tmp_path.iterdir())


def test_watching_on_a_terminal(tmp_path):
    """In a real pseudo-terminal, whose last lines are the answer."""
    pty = pytest.importorskip("pty", reason="pseudo-terminals are Unix's")
    arguments = ["generate", *TINY, "--raw", "--watch", "--watch-delay", "0.01", "ROMEO:"]
    process, terminal = pty.fork()
    if process == 0:
        os.environ.update(TERM="xterm", NO_COLOR="1")
        os.execv(sys.executable, [sys.executable, "-m", "minipaged", *arguments])
    text = b""
    try:
        while part := os.read(terminal, 65536):
            text += part
    except OSError:
        pass  # the terminal is gone with its last process
    assert os.waitpid(process, 0)[1] == 0
    text = text.decode()
    assert "step 0 · " in text and "request-0" in text and "after 6 steps · 0 of " in text
    assert "\x1b[?25h" in text and not text.rpartition("\x1b[?25h")[2].startswith("\x1b")
