"""``draw_blocks``: block tables (logical to physical) and the pool, of one moment.

    ┌ request-0   37 tokens   [ 4 ][ 5 ][ 9 ]      a row a sequence; a cell a logical block, in it
    │ request-1   12 tokens   [ 4 ]                the id of the physical block that holds its KV
    ├──────────────────────────────────────
    └ pool  [0][1][2][3][4 ×2][5] …                a cell a physical block: who holds it, how often

Colours are the sequences'; a block that several hold has the colours of all of them.
"""

from __future__ import annotations

import textwrap

from minipaged.view import words
from minipaged.view.state import SequenceState, Snapshot, Step, snapshot
from minipaged.view.svg import Canvas, Picture, shorten
from minipaged.view.theme import NUM_HUES

WIDTH, MARGIN, LABEL = 760, 20, 168
TABLE_CELL, TABLE_GAP, TABLE_HEIGHT = 40, 4, 32
CELL, CELL_HEIGHT, GAP, PER_LINE = 40, 46, 5, 16  # of the pool
MAX_LINES_EACH, MAX_SEQUENCES, MAX_EVENTS = 4, 24, 12
DETAILED, SMALL_CELL, MAX_POOL_CELLS = 128, 11, 4096
"""Pools (as far as they were used) of more than ``DETAILED`` blocks are drawn with small cells without text."""


def draw_blocks(source, title: str | None = None) -> Picture:
    """Draw the block tables and the pool of a scheduler, an engine, an LLM, or one step of a trace.

    Of a step it shows the state while the step was computed, with the copies and evictions made for it.

    Args:
        source: see :func:`~minipaged.view.state.snapshot`.
        title: above the drawing.

    Raises:
        InvalidParameterError: ``source`` has no block tables.
    """
    state = snapshot(source)
    if title is None:
        title = f"Step {state.index}" if isinstance(state, Step) else "Block tables and pool"
    canvas = Canvas(WIDTH)
    canvas.text(MARGIN, 32, title, size=17, bold=True)
    canvas.text(MARGIN, 53, words.summary(state), "f-muted", size=13)
    y = _tables(canvas, state, 84)
    y = _pool(canvas, state, y + 18)
    y = _legend(canvas, state, y + 12)
    y = _events(canvas, state, y + 8)
    return canvas.picture(y + 12, title, words.describe(state))


def hue(sequence: SequenceState) -> str:
    """Name of a sequence's colour in the theme."""
    return f"hue{sequence.number % NUM_HUES}"


# -- block tables ---------------------------------------------------------------------------------


def _tables(canvas: Canvas, state: Snapshot, y: float) -> float:
    canvas.text(MARGIN, y, "Block tables", bold=True, size=14)
    canvas.text(MARGIN + LABEL, y, f"logical block → physical block, {state.block_size} tokens each", "f-muted")
    y += 14
    shown = state.sequences[:MAX_SEQUENCES]
    for sequence in shown:
        y = _table(canvas, state, sequence, y)
    if not shown:
        canvas.text(MARGIN, y + 14, "no sequences", "f-muted")
        y += 24
    if len(state.sequences) > len(shown):
        canvas.text(MARGIN, y + 12, f"and {len(state.sequences) - len(shown)} more sequences", "f-muted")
        y += 22
    return y


def _table(canvas: Canvas, state: Snapshot, sequence: SequenceState, y: float) -> float:
    canvas.rect(MARGIN, y + 3, 6, TABLE_HEIGHT - 6, f"f-{hue(sequence)}", radius=2)
    canvas.text(MARGIN + 13, y + 14, shorten(sequence.sequence_id, 20), size=13, bold=True)
    tokens = words.count(sequence.num_tokens, "token")
    status = "" if sequence.is_running else (", preempted" if sequence.num_preemptions else ", waiting")
    canvas.text(MARGIN + 13, y + 29, tokens + status, "f-muted", size=12)
    per_line = int((WIDTH - 2 * MARGIN - LABEL) // (TABLE_CELL + TABLE_GAP))
    room = per_line * MAX_LINES_EACH
    drawn = sequence.block_ids
    if len(drawn) > room:
        drawn = drawn[: room - 1]
    for index, block_id in enumerate(drawn):
        line, column = divmod(index, per_line)
        x, top = MARGIN + LABEL + column * (TABLE_CELL + TABLE_GAP), y + line * (TABLE_HEIGHT + TABLE_GAP)
        _table_cell(canvas, state, sequence, index, block_id, x, top)
    if len(drawn) < len(sequence.block_ids):
        x = MARGIN + LABEL + (per_line - 1) * (TABLE_CELL + TABLE_GAP)
        rest = f"+{len(sequence.block_ids) - len(drawn)}"
        canvas.text(x + 4, y + (MAX_LINES_EACH - 1) * (TABLE_HEIGHT + TABLE_GAP) + 21, rest, "f-muted")
    lines = max(1, -(-len(drawn) // per_line))
    return y + lines * (TABLE_HEIGHT + TABLE_GAP) + 4


def _table_cell(canvas: Canvas, state: Snapshot, sequence: SequenceState, index: int, block_id: int, x, y) -> None:
    """One logical block: its physical block, and below it how many of its slots hold KV."""
    size = state.block_size
    computed = min(max(sequence.num_computed_tokens - index * size, 0), size)
    end = min(max(sequence.num_computed_tokens + sequence.num_scheduled_tokens - index * size, 0), size)
    written = f", {end - computed} of them written in this step" if end > computed else ""
    name = f"{sequence.sequence_id}, logical block {index}: physical block {block_id}, {end} of {size} slots{written}"
    copied = isinstance(state, Step) and any(block_id == target for _, target in state.copies)
    frame = "s-copy bold" if copied else "s-line"
    canvas.rect(x, y, TABLE_CELL, TABLE_HEIGHT, f"f-{hue(sequence)} {frame}", radius=3, title=name)
    canvas.text(x + TABLE_CELL / 2, y + 19, str(block_id), size=14 if block_id < 1000 else 11, anchor="middle")
    bar = TABLE_CELL - 8
    canvas.rect(x + 4, y + TABLE_HEIGHT - 8, bar, 4, "f-page")
    if computed:
        canvas.rect(x + 4, y + TABLE_HEIGHT - 8, bar * computed / size, 4, "f-muted")
    if end > computed:
        canvas.rect(x + 4 + bar * computed / size, y + TABLE_HEIGHT - 8, bar * (end - computed) / size, 4, "f-new")


# -- pool -----------------------------------------------------------------------------------------


def _pool(canvas: Canvas, state: Snapshot, y: float) -> float:
    end = _end_of_pool(state)
    canvas.text(MARGIN, y, "Pool", bold=True, size=14)
    drawn = min(end, MAX_POOL_CELLS)
    note = "with the number of tables that hold each" if drawn <= DETAILED else "framed where several tables hold one"
    canvas.text(MARGIN + 44, y, f"physical blocks, {note}", "f-muted")
    y += 24 if isinstance(state, Step) and state.copies else 12  # arrows bow above the first row
    y += _detailed(canvas, state, drawn, y) if drawn <= DETAILED else _dense(canvas, state, drawn, y)
    notes = []
    if drawn < end:
        inside = sum(state.ref_cnts[b] > 0 for b in range(drawn, end))
        notes.append(f"blocks {drawn}-{end - 1} are not drawn: {inside} in use")
    if end < state.num_blocks:
        notes.append(f"blocks {end}-{state.num_blocks - 1} are free")
    if notes:
        canvas.text(MARGIN, y + 14, "; ".join(notes), "f-muted")
        y += 20
    return y


def _end_of_pool(state: Snapshot) -> int:
    """How many blocks are drawn: all of a small pool, of a large one those up to the last that holds anything."""
    if state.num_blocks <= DETAILED:
        return state.num_blocks
    return max((b for b in range(state.num_blocks) if state.ref_cnts[b] or b in state.cached), default=-1) + 1


def _detailed(canvas: Canvas, state: Snapshot, num_blocks: int, y: float) -> float:
    """A cell with text for each block; an arrow where a block is copied to one in the same row."""
    holders, copies = state.holders(), state.copies if isinstance(state, Step) else []
    evicted = set(state.evicted) if isinstance(state, Step) else set()
    source_of = {target: source for source, target in copies}
    corners = {}
    for block_id in range(num_blocks):
        line, column = divmod(block_id, PER_LINE)
        x, top = corners[block_id] = MARGIN + column * (CELL + GAP), y + line * (CELL_HEIGHT + GAP)
        _pool_cell(canvas, state, block_id, holders.get(block_id, []), source_of.get(block_id), x, top)
        if block_id in evicted:
            canvas.path(f"M{x + 1:g} {top + CELL_HEIGHT - 14:g}v13h13Z", "f-alarm")
    for source, target in copies:
        if max(source, target) < num_blocks and source // PER_LINE == target // PER_LINE:
            _arrow(canvas, corners[source][0] + CELL / 2, corners[target][0] + CELL / 2, corners[source][1])
    return max(1, -(-num_blocks // PER_LINE)) * (CELL_HEIGHT + GAP)


def _pool_cell(canvas: Canvas, state: Snapshot, block_id: int, holders: list, source: int | None, x, y) -> None:
    ref_cnt, cached = state.ref_cnts[block_id], block_id in state.cached
    _paint(canvas, holders, x, y, CELL, CELL_HEIGHT)
    frame = "s-copy bold" if source is not None else "s-muted" if cached and not ref_cnt else "s-line"
    fill = "" if holders else "f-cached " if cached else "f-empty "
    name = f"block {block_id}: {_state_of(ref_cnt, cached)}"
    if holders:
        name += f", held by {words.listing([sequence.sequence_id for sequence in holders])}"
    canvas.rect(x, y, CELL, CELL_HEIGHT, f"{fill}{frame}", radius=3, title=name, dash=not ref_cnt)
    ink = "f-ink" if ref_cnt or cached else "f-muted"
    canvas.text(x + 5, y + 16, str(block_id), ink, size=13 if block_id < 1000 else 11)
    if source is not None:
        canvas.text(x + 5, y + 29, f"←{source}", size=11, bold=True)
    if ref_cnt:
        canvas.text(x + CELL - 5, y + CELL_HEIGHT - 5, f"×{ref_cnt}", size=12, anchor="end", bold=ref_cnt > 1)
    if cached:
        canvas.circle(x + CELL - 7, y + 7, 3, "f-ink")


def _state_of(ref_cnt: int, cached: bool) -> str:
    if ref_cnt:
        return f"ref_cnt {ref_cnt}" + (", in the prefix cache" if cached else "")
    return "free, its KV is cached" if cached else "free"


def _paint(canvas: Canvas, holders: list[SequenceState], x, y, width, height) -> None:
    """The colours of those that hold a block, side by side; of the first six."""
    shown = holders[:6]
    for index, sequence in enumerate(shown):
        part = width / len(shown)
        canvas.rect(x + index * part, y, part, height, f"f-{hue(sequence)}")


def _arrow(canvas: Canvas, x1, x2, y) -> None:
    """From the top of one cell over its neighbours to the top of another."""
    bow = y - min(18, 5 + abs(x2 - x1) / 8)
    canvas.path(f"M{x1:g} {y:g}C{x1:g} {bow:g} {x2:g} {bow:g} {x2:g} {y - 2:g}", "s-copy bold")
    canvas.path(f"M{x2 - 4.5:g} {y - 5:g}L{x2:g} {y + 2:g}L{x2 + 4.5:g} {y - 5:g}Z", "f-copy")


def _dense(canvas: Canvas, state: Snapshot, num_blocks: int, y: float) -> float:
    """A large pool: small cells, with a frame around those that are shared."""
    step = SMALL_CELL + 1
    per_line = (WIDTH - 2 * MARGIN) // step
    holders = state.holders()
    for block_id in range(num_blocks):
        line, column = divmod(block_id, per_line)
        x, top = MARGIN + column * step, y + line * step
        ref_cnt, cached = state.ref_cnts[block_id], block_id in state.cached
        _paint(canvas, holders.get(block_id, [])[:3], x, top, SMALL_CELL, SMALL_CELL)
        fill = "" if ref_cnt else ("f-cached " if cached else "f-empty ")
        frame = "s-ink" if ref_cnt > 1 else "s-line"
        name = f"block {block_id}: {_state_of(ref_cnt, cached)}"
        canvas.rect(x, top, SMALL_CELL, SMALL_CELL, fill + frame, title=name, dash=cached and not ref_cnt)
    return -(-num_blocks // per_line) * step + 4


# -- what the marks mean, and what happened -------------------------------------------------------


def _legend(canvas: Canvas, state: Snapshot, y: float) -> float:
    """What the marks mean; those that do not occur are left out."""
    step = state if isinstance(state, Step) else None
    entries = [("used", "in use: ×tables"), ("shared", "shared")]
    dense = _end_of_pool(state) > DETAILED
    if state.cached and not dense:
        entries.append(("cached", "in the prefix cache"))
    if state.cached:
        entries.append(("cached_free", "cached, free"))
    entries += [("free", "free"), ("slots", "slots with KV")]
    if any(sequence.num_scheduled_tokens for sequence in state.sequences):
        entries.append(("written", "written in this step"))
    if step and step.copies:
        entries.append(("copy", "copy-on-write, ←from"))
    if step and step.evicted and not dense:
        entries.append(("evicted", "evicted, used anew"))
    x = MARGIN
    for mark, text in entries:
        width = 30 + 7 * len(text)
        if x + width > WIDTH - MARGIN:
            x, y = MARGIN, y + 22
        _mark(canvas, mark, x, y)
        canvas.text(x + 23, y + 13, text, "f-muted", size=12)
        x += width
    return y + 22


def _mark(canvas: Canvas, mark: str, x, y) -> None:
    if mark == "slots" or mark == "written":
        canvas.rect(x, y + 6, 16, 5, "f-muted" if mark == "slots" else "f-new")
        return
    if mark == "copy":
        canvas.rect(x + 1, y + 2, 14, 14, "f-hue0 s-copy bold", radius=2)
        return
    if mark in ("used", "shared"):
        canvas.rect(x, y + 1, 16, 16, "f-hue0")
        if mark == "shared":
            canvas.rect(x + 8, y + 1, 8, 16, "f-hue1")
    fill = {"cached_free": "f-cached ", "free": "f-empty ", "cached": "f-page ", "evicted": "f-hue0 "}.get(mark, "")
    canvas.rect(x, y + 1, 16, 16, fill + "s-line", radius=2, dash=mark in ("free", "cached_free"))
    if mark in ("cached", "cached_free"):
        canvas.circle(x + 11.5, y + 5.5, 2.5, "f-ink")
    if mark == "evicted":
        canvas.path(f"M{x + 1:g} {y + 6:g}v10h10Z", "f-alarm")


def _events(canvas: Canvas, state: Snapshot, y: float) -> float:
    if not isinstance(state, Step):
        return y
    lines = words.events(state)
    canvas.text(MARGIN, y + 14, "In this step", bold=True, size=14)
    y += 18
    shown = lines if len(lines) <= MAX_EVENTS else lines[: MAX_EVENTS - 1]
    if len(shown) < len(lines):
        shown = [*shown, f"and {len(lines) - len(shown)} more events"]
    for event in shown:
        for number, line in enumerate(textwrap.wrap(event, 104)):
            canvas.text(MARGIN + 8, y + 15, ("• " if number == 0 else "   ") + line, size=12)
            y += 18
    return y
