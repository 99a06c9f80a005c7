"""Block tables and pool as lines of text, drawn anew in place while the engine runs.

step 12 · 9 of 24 blocks in use, 4 of them shared; 3 cached and free, 12 free
request-0      37 tokens  decode      0  1  2
request-1      20 tokens  prefill 16  0  1  5
pool ██22█▒▒·····    █ used  2-9 shared  ▒ cached  · free
"""

from __future__ import annotations

import os
import shutil
import time

from minipaged.core.scheduler import Scheduler, SchedulerOutput
from minipaged.view import words
from minipaged.view.state import Snapshot, snapshot
from minipaged.view.svg import shorten

HUES = (75, 215, 114, 211, 80, 222, 141, 180)
"""Of the 256 colours of a terminal, one a sequence, readable on black and on white with black text on them."""
FRAMES_PER_SECOND = 20


class Style:
    """What a stream can show.

    Attributes:
        colour: whether colours may be used.
        used, cached, free, dots: the characters of the drawing.
    """

    def __init__(self, colour: bool, unicode: bool):
        self.colour = colour
        self.used, self.cached, self.free = "█▒·" if unicode else "#+."
        self.dots, self.point = ("…", "·") if unicode else ("..", "-")

    @classmethod
    def of(cls, stream) -> Style:
        """By the stream's encoding, and the environment's NO_COLOR."""
        try:
            "█▒·…".encode(stream.encoding or "ascii")
        except (UnicodeEncodeError, LookupError):
            return cls(not os.environ.get("NO_COLOR"), False)
        return cls(not os.environ.get("NO_COLOR"), True)

    def paint(self, text: str, number: int) -> str:
        """``text`` in the colour of sequence ``number``."""
        if not self.colour:
            return text
        return f"\x1b[30;48;5;{HUES[number % len(HUES)]}m{text}\x1b[0m"


def can_redraw(stream) -> bool:
    """Whether a stream is a terminal whose lines can be drawn again."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def frame(state: Snapshot, doing: dict[str, str], head: str, width: int, height: int, style: Style) -> list[str]:
    """A drawing of at most ``height`` lines of at most ``width`` characters.

    Args:
        doing: what each sequence does, by its id, in a word or two.
        head: the beginning of the first line.
    """
    lines = [_cut(f"{head} {style.point} {words.summary(state)}", width, style)]
    pool = _pool(state, width, style)
    room = max(height - len(lines) - 2, 2)
    pool = pool[: max(room // 2, room - len(state.sequences), 1)]
    rows = room - len(pool)
    shown = state.sequences[:rows] if len(state.sequences) <= rows else state.sequences[: max(rows - 1, 0)]
    name_width = min(max((len(s.sequence_id) for s in shown), default=0), max(width // 4, 8))
    for sequence in shown:
        lines.append(_row(sequence, doing.get(sequence.sequence_id, ""), name_width, width, style))
    if len(shown) < len(state.sequences):
        lines.append(_cut(f"and {len(state.sequences) - len(shown)} more sequences", width, style))
    legend = f"{style.used} used  2-9 shared  {style.cached} cached  {style.free} free"
    return [*lines, *pool, _cut(legend, width, style)][:height]


def _row(sequence, doing: str, name_width: int, width: int, style: Style) -> str:
    name = shorten(sequence.sequence_id, name_width) if style.dots == "…" else sequence.sequence_id[-name_width:]
    text = f"{name:<{name_width}} {sequence.num_tokens:>5} tokens {doing:<12} "
    if len(text) + 8 > width:
        text = f"{name:<{name_width}} "
    room = (width - len(text)) // 5 * 5
    ids = sequence.block_ids[-(room // 5) :] if room >= 5 else []
    if len(ids) < len(sequence.block_ids) and ids:
        cells = f"{style.dots:>4} " + "".join(style.paint(f"{b:>4}", sequence.number) + " " for b in ids[1:])
    else:
        cells = "".join(style.paint(f"{b:>4}", sequence.number) + " " for b in ids)
    return text[:width] + cells


def _pool(state: Snapshot, width: int, style: Style) -> list[str]:
    """A character a block, in the colour of the first that holds it."""
    holders = state.holders()
    lines = []
    for first in range(0, state.num_blocks, width):
        line = ""
        for block_id in range(first, min(first + width, state.num_blocks)):
            count = state.ref_cnts[block_id]
            if count and block_id in holders:
                sign = " " if count == 1 and style.colour else style.used if count == 1 else str(min(count, 9))
                line += style.paint(sign, holders[block_id][0].number)
            else:
                line += style.cached if block_id in state.cached else style.free
        lines.append(line)
    return lines


def _cut(text: str, width: int, style: Style) -> str:
    return text if len(text) <= width else text[: max(width - len(style.dots), 0)] + style.dots


class Painter:
    """Draws each step of a scheduler on a terminal, in place: an observer (see :mod:`minipaged.view.recording`).

    Args:
        scheduler: whose steps.
        stream: a terminal, for which :func:`can_redraw` holds.
        delay: seconds for which each step stays; 0: as many as can be seen.
    """

    def __init__(self, scheduler: Scheduler, stream, delay: float = 0.0):
        self._scheduler = scheduler
        self._stream = stream
        self._delay = delay
        self._style = Style.of(stream)
        self._num_lines = 0
        self._last = 0.0
        self._first_step = scheduler.num_steps

    def scheduled(self, plan: SchedulerOutput, started: float | None = None) -> None:
        """Draw the step that begins, unless the last drawing is too fresh to be seen."""
        now = time.monotonic()
        if not self._delay and now - self._last < 1 / FRAMES_PER_SECOND:
            return
        self._last = now
        self._draw(plan)
        if self._delay:
            time.sleep(self._delay)

    def updated(self, *times: float) -> None:
        """Nothing to draw."""

    def close(self) -> None:
        """Draw the state at the end, and leave it there."""
        self._draw(None)
        self._stream.write("\x1b[?25h" if self._num_lines else "")
        self._stream.flush()

    def _draw(self, plan: SchedulerOutput | None) -> None:
        width, height = shutil.get_terminal_size()
        doing = {}
        for sequence in plan.scheduled if plan else ():
            length = len(sequence.token_ids) - sequence.num_lookahead_tokens
            prompt = sequence.num_computed_tokens < self._scheduler.requests[sequence.request_id].num_prompt_tokens
            doing[sequence.request_id] = f"prefill {length}" if prompt or length > 1 else "decode"
        number = self._scheduler.num_steps - self._first_step
        head = f"step {number - 1}" if plan else f"after {words.count(number, 'step')}"
        lines = frame(snapshot(self._scheduler), doing, head, max(width - 1, 10), max(height - 1, 4), self._style)
        text = "\x1b[?25l" + (f"\x1b[{self._num_lines}A" if self._num_lines else "")
        text += "".join(f"\r\x1b[2K{line}\n" for line in lines)
        text += "\x1b[J"  # what an earlier, longer drawing left below
        self._num_lines = len(lines)
        self._stream.write(text)
        self._stream.flush()
