"""``draw_timeline``: who got how many tokens in which step.

tokens a step   ▂█▂▂▃        of the budget max_num_batched_tokens
request-0       ▇▇ █ █ █     a row a sequence, a column a step; colours say what kind of work
request-1        ─ ▇ █ █     (a line: it waits)
"""

from __future__ import annotations

from dataclasses import dataclass, field

from minipaged.errors import InvalidParameterError
from minipaged.view import words
from minipaged.view.svg import Canvas, Picture, shorten

WIDTH, MARGIN, LABEL = 760, 20, 128
ROW, BARS = 22, 56
MAX_ROWS, MAX_COLUMNS = 48, 196
KINDS = ("preempted", "swapped", "speculative", "cached", "prefill", "decode", "waiting")
"""What a cell can be, the most telling first: that is what a column of several steps shows."""
NAMES = {
    "prefill": "prefill: computes its prompt",
    "decode": "decode: 1 token",
    "speculative": "guesses verified too",
    "cached": "tokens from the prefix cache",
    "swapped": "back from host memory",
    "preempted": "preempted: loses its blocks",
    "waiting": "waiting",
}


@dataclass
class _Cell:
    kind: str
    num_tokens: int = 0
    title: str = ""
    cached: bool = False


@dataclass
class _Row:
    name: str
    cells: dict[int, _Cell] = field(default_factory=dict)


def draw_timeline(trace, title: str | None = None, *, start: int = 0, stop: int | None = None) -> Picture:
    """Draw who got how many tokens, step by step.

    Args:
        trace: a :class:`~minipaged.view.trace.Trace`.
        title: above the drawing.
        start, stop: draw the steps ``[start, stop)``. Of more than 196 steps each column stands for several.

    Raises:
        InvalidParameterError: there are no such steps.
    """
    stop = len(trace) if stop is None else stop
    if not 0 <= start < stop <= len(trace):
        raise InvalidParameterError(f"steps [{start}, {stop}) are asked for; the trace has steps [0, {len(trace)}).")
    title = "Timeline" if title is None else title
    group = -(-(stop - start) // MAX_COLUMNS)
    rows, totals = _collect(trace, start, stop, group)
    num_columns = -(-(stop - start) // group)
    canvas = Canvas(WIDTH)
    width = min((WIDTH - 2 * MARGIN - LABEL) / num_columns, 30)
    canvas.text(MARGIN, 32, title, size=17, bold=True)
    each = "" if group == 1 else f"; a column is {group} steps"
    about = f"{words.count(stop - start, 'step')}, {words.count(len(rows), 'sequence')}{each}"
    canvas.text(MARGIN, 53, about, "f-muted")
    y = _bars(canvas, totals, trace.about.get("max_num_batched_tokens"), width, 70)
    y = _axis(canvas, start, num_columns, group, width, y)
    shown = list(rows.values())[:MAX_ROWS]
    for row in shown:
        _row(canvas, row, width, y)
        y += ROW + 3
    if len(shown) < len(rows):
        canvas.text(MARGIN, y + 14, f"and {len(rows) - len(shown)} more sequences", "f-muted")
        y += 20
    y = _legend(canvas, rows, y + 10)
    return canvas.picture(y + 12, title, _describe(about, rows))


# -- what is drawn ----------------------------------------------------------------------------------


def _collect(trace, start: int, stop: int, group: int) -> tuple[dict[int, _Row], list[dict[str, int]]]:
    """Rows by sequence number, and by column the tokens computed of each kind (means over its steps)."""
    rows: dict[int, _Row] = {}
    totals: list[dict[str, int]] = []
    for index in range(start, stop):
        step = trace.steps[index]
        column = (index - start) // group
        if column == len(totals):
            totals.append({"prefill": 0, "decode": 0, "speculative": 0})
        busy = {}
        for work in step.work:
            busy[work.sequence.number] = _cell(work, index)
            totals[column][work.kind] += work.num_tokens - work.num_lookahead_tokens
            totals[column]["speculative"] += work.num_lookahead_tokens
        for sequence in step.sequences:
            row = rows.setdefault(sequence.number, _Row(sequence.sequence_id))
            cell = busy.get(sequence.number)
            if sequence.sequence_id in step.preempted:
                cell = _Cell("preempted", title=f"step {index}: preempted")
            elif cell is None:
                state = "has blocks, but computes nothing" if sequence.is_running else "waits"
                cell = _Cell("waiting", title=f"step {index}: {state}")
            known = row.cells.get(column)
            if known is None or KINDS.index(cell.kind) < KINDS.index(known.kind):
                row.cells[column] = cell
    for number, total in enumerate(totals):
        steps = min(group, stop - start - number * group)
        totals[number] = {kind: count / steps for kind, count in total.items()}
    return rows, totals


def _cell(work, index: int) -> _Cell:
    parts = [f"{work.num_tokens - work.num_lookahead_tokens} computed"]
    kind = work.kind
    if work.num_lookahead_tokens:
        kind = "speculative"
        parts.append(f"{work.num_lookahead_tokens} guessed, {work.num_accepted_tokens} right")
    if work.num_cached_tokens:
        parts.append(f"{work.num_cached_tokens} from the prefix cache")
    if work.num_swapped_tokens:
        kind = "swapped"
        parts.append(f"{work.num_swapped_tokens} from host memory")
    return _Cell(kind, work.num_tokens, f"step {index}: {', '.join(parts)}", work.num_cached_tokens > 0)


# -- drawing ----------------------------------------------------------------------------------------


def _bars(canvas: Canvas, totals: list[dict[str, float]], budget: int | None, width: float, y: float) -> float:
    """Tokens of each step, against the budget."""
    most = max(sum(total.values()) for total in totals) or 1
    left = MARGIN + LABEL
    canvas.text(MARGIN, y + 14, "tokens a step", "f-muted", size=12)
    note = f"at most {most:g}" if most == round(most) else f"at most {most:.1f}"
    canvas.text(MARGIN, y + 30, note, "f-muted", size=12)
    if budget:
        canvas.text(MARGIN, y + 46, f"(budget {budget})", "f-muted", size=12)
    for column, total in enumerate(totals):
        top = y + BARS
        for kind, count in total.items():
            height = BARS * count / most
            if count:
                top -= height
                x, gap = left + column * width, 1 if width > 4 else 0
                canvas.rect(x, top, width - gap, height, f"f-{kind}", title=f"{count:g} {kind}")
    canvas.line(left, y + BARS, left + len(totals) * width, y + BARS, "s-line")
    return y + BARS


def _axis(canvas: Canvas, start: int, num_columns: int, group: int, width: float, y: float) -> float:
    """Step numbers, as many as there is room for."""
    every = next(n for n in (1, 2, 5, 10, 20, 25, 50, 100, 200) if n * width >= 34)
    canvas.text(MARGIN, y + 15, "step", "f-muted", size=12)
    for column in range(0, num_columns, every):
        x = MARGIN + LABEL + (column + 0.5) * width
        canvas.text(x, y + 15, str(start + column * group), "f-muted", size=11, anchor="middle")
    return y + 22


def _row(canvas: Canvas, row: _Row, width: float, y: float) -> None:
    canvas.text(MARGIN, y + 15, shorten(row.name, 17), size=12)
    left = MARGIN + LABEL
    for first, last, cell in _runs(row, merge=width < 9):
        x, length = left + first * width, (last - first + 1) * width
        _draw_cell(canvas, cell, x, y, length, numbered=width >= 15 and first == last)


def _runs(row: _Row, merge: bool):
    """``(first column, last column, cell)``; neighbours of one kind are drawn as one where columns are narrow."""
    columns = sorted(row.cells)
    at = 0
    while at < len(columns):
        end, cell = at, row.cells[columns[at]]
        joins = merge or cell.kind == "waiting"
        while joins and end + 1 < len(columns) and columns[end + 1] == columns[end] + 1:
            following = row.cells[columns[end + 1]]
            if (following.kind, following.cached) != (cell.kind, cell.cached):
                break
            end += 1
        title = cell.title if end == at else f"steps {columns[at]}-{columns[end]}: {cell.kind}"
        yield columns[at], columns[end], _Cell(cell.kind, cell.num_tokens, title, cell.cached)
        at = end + 1


def _draw_cell(canvas: Canvas, cell: _Cell, x, y, width, numbered: bool) -> None:
    gap = 1 if width > 4 else 0
    middle = y + ROW / 2
    if cell.kind == "waiting":
        canvas.rect(x, middle - 1.5, width - gap, 3, "f-waiting", title=cell.title)
        return
    if cell.kind == "preempted":
        canvas.rect(x, y, width - gap, ROW, "f-page s-alarm", title=cell.title)
        if width >= 7:
            half = min(width / 2 - 3, 5)
            cx = x + (width - gap) / 2
            canvas.line(cx - half, middle - half, cx + half, middle + half, "s-alarm bold")
            canvas.line(cx - half, middle + half, cx + half, middle - half, "s-alarm bold")
        return
    canvas.rect(x, y, width - gap, ROW, f"f-{cell.kind}", radius=2 if width > 8 else 0, title=cell.title)
    if cell.cached:
        canvas.rect(x, y, width - gap, 6, "f-cached")
        canvas.fill(x, y, width - gap, 6, canvas.hatch("hatch", "muted"))
    if numbered and cell.num_tokens < 10 ** (width // 8):
        text_y = y + (19 if cell.cached else 16)
        canvas.text(x + (width - gap) / 2, text_y, str(cell.num_tokens), size=12, anchor="middle")


def _legend(canvas: Canvas, rows: dict[int, _Row], y: float) -> float:
    cells = [cell for row in rows.values() for cell in row.cells.values()]
    kinds = [kind for kind in NAMES if any(cell.kind == kind or (kind == "cached" and cell.cached) for cell in cells)]
    x = MARGIN
    for kind in kinds:
        text = NAMES[kind]
        width = 34 + 6.8 * len(text)
        if x + width > WIDTH - MARGIN:
            x, y = MARGIN, y + 24
        shown = "prefill" if kind == "cached" else kind
        _draw_cell(canvas, _Cell(shown, cached=kind == "cached"), x, y - 2, 18, numbered=False)
        canvas.text(x + 24, y + 13, text, "f-muted", size=12)
        x += width
    return y + 24


def _describe(about: str, rows: dict[int, _Row]) -> str:
    """The drawing for those who cannot see it."""
    lines = [about + "."]
    for row in list(rows.values())[:MAX_ROWS]:
        counts: dict[str, int] = {}
        for cell in row.cells.values():
            counts[cell.kind] = counts.get(cell.kind, 0) + 1
        columns = ", ".join(f"{kind} {count}" for kind, count in counts.items())
        lines.append(f"{row.name}: columns {min(row.cells)} to {max(row.cells)}, {columns}.")
    return " ".join(lines)
