"""The live drawing fits its terminal and says what the state is."""

from __future__ import annotations

import io
import re

import pytest

from minipaged.view import terminal
from minipaged.view.terminal import Painter, Style, can_redraw, frame

PLAIN, ASCII, COLOUR = Style(False, True), Style(False, False), Style(True, True)
ESCAPE = re.compile(r"\x1b\[[\d;?]*[A-Za-z]")


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def screen(text):
    """The lines that a terminal would show in the end."""
    lines, at = [], 0
    for part in re.findall(r"\x1b\[(\d+)A|\x1b\[J|\r\x1b\[2K([^\n]*)\n", text.replace("\x1b[J", "")):
        if part[0]:
            at -= int(part[0])
        else:
            lines[at : at + 1] = [part[1]]
            at += 1
    return lines[:at]


@pytest.mark.parametrize("size", [(79, 23), (39, 10), (10, 4), (200, 60)])
@pytest.mark.parametrize("style", [PLAIN, ASCII, COLOUR])
def test_every_frame_fits(run, size, style):
    width, height = size
    for step in run.trace.steps:
        lines = frame(step, {}, f"step {step.index}", width, height, style)
        assert len(lines) <= height
        for line in lines:
            bare = ESCAPE.sub("", line)
            assert len(bare) <= width
            assert style.colour or bare == line
            assert style is not ASCII or bare.isascii()


def test_a_frame_shows_the_state(run):
    step = max(run.trace.steps, key=lambda step: len(step.sequences))
    doing = {work.sequence.sequence_id: work.kind for work in step.work}
    lines = frame(step, doing, "step", 120, 40, PLAIN)
    for sequence in step.sequences:
        (line,) = [line for line in lines if line.startswith(sequence.sequence_id + " ")]
        assert [int(number) for number in re.findall(r"\d+", line.split(" tokens ")[1])] == sequence.block_ids
    pool = "".join(
        "█" if n == 1 else str(n) if n else "▒" if b in step.cached else "·" for b, n in enumerate(step.ref_cnts)
    )
    assert pool in lines


def test_the_painter_draws_in_place(recorded_run, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(terminal.shutil, "get_terminal_size", lambda: (80, 24))
    run, stream = recorded_run(0, num_steps=4), Terminal()
    painter = Painter(run.scheduler, stream, delay=1e-6)
    for _ in range(8):
        plan = run.scheduler.schedule()
        painter.scheduled(plan)
        run.scheduler.update(plan, {s.request_id: [1] for s in plan.scheduled if s.samples})
        painter.updated()
    painter.close()
    lines = screen(stream.getvalue())
    assert lines[0].startswith("after 8 steps · ") and lines[-1].startswith("█ used")
    assert stream.getvalue().count("step 3 ") == 1
    assert stream.getvalue().endswith("\x1b[?25h")
    assert {s.sequence_id for s in terminal.snapshot(run.scheduler).sequences} <= {line.split()[0] for line in lines}


def test_what_a_stream_can_show(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert Style.of(Terminal()).colour and can_redraw(Terminal())
    assert not can_redraw(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not Style.of(Terminal()).colour
    monkeypatch.setattr(Terminal, "encoding", "ascii")
    assert Style.of(Terminal()).used == "#"
    monkeypatch.setenv("TERM", "dumb")
    assert not can_redraw(Terminal())
