"""Pictures that the course needs besides the engine's own: grids of cells, bars, shades."""

from __future__ import annotations

from minipaged.core.block_pool import BlockPool
from minipaged.core.block_table import BlockTable
from minipaged.view import Snapshot, draw_blocks
from minipaged.view.state import SequenceState
from minipaged.view.svg import Canvas, Picture
from minipaged.view.theme import NUM_HUES

MARGIN = 20


def draw_tables(pool: BlockPool, tables: dict[str, BlockTable], num_tokens: dict[str, int]) -> Picture:
    """Block tables by name, with the tokens that each holds, and their pool."""
    sequences = [
        SequenceState(number, name, num_tokens[name], num_tokens[name], num_tokens[name], table.block_ids.copy())
        for number, (name, table) in enumerate(tables.items())
    ]
    block_size = next(iter(tables.values())).block_size
    cached = {block.block_id for block in pool.cached.values()}
    return draw_blocks(Snapshot(block_size, sequences, [block.ref_cnt for block in pool.blocks], cached))


def draw_grid(title: str, rows: dict[str, list], *, cell: int = 18, note: str = "") -> Picture:
    """A row of cells for each name; a cell is ``None`` (empty) or ``(hue, text)``, hue from 0."""
    label = 20 + 8 * max(map(len, rows))
    longest = max(len(cells) for cells in rows.values())
    height = min(cell, 24)
    canvas = Canvas(max(360, 2 * MARGIN + label + longest * cell))
    y = _head(canvas, title, note)
    for name, cells in rows.items():
        canvas.text(MARGIN, y + height - 6, name, size=13)
        for column, content in enumerate(cells):
            x = MARGIN + label + column * cell
            if content is None:
                canvas.rect(x, y, cell - 2, height - 2, "f-empty s-line", dash=True)
                continue
            hue, text = content
            canvas.rect(x, y, cell - 2, height - 2, f"f-hue{hue % NUM_HUES} s-line", title=f"{name}, {column}: {text}")
            canvas.text(x + (cell - 2) / 2, y + height - 7, str(text), size=11, anchor="middle")
        y += height + 3
    return canvas.picture(y + 10, title, note or title)


def draw_shades(title: str, matrix, rows: list[str], columns: list[str], *, note: str = "") -> Picture:
    """A matrix of numbers from 0 to 1, each a square whose filled part has that area."""
    cell, label = 36, 20 + 8 * max(map(len, rows))
    canvas = Canvas(max(360, 2 * MARGIN + label + len(columns) * cell + 40))
    y = _head(canvas, title, note)
    for column, name in enumerate(columns):
        canvas.text(MARGIN + label + column * cell + cell / 2, y + 10, name, "f-muted", size=11, anchor="middle")
    y += 16
    for name, values in zip(rows, matrix, strict=True):
        canvas.text(MARGIN, y + cell - 9, name, size=13)
        for column, value in enumerate(values):
            x, side = MARGIN + label + column * cell, (cell - 3) * max(0.0, min(float(value), 1.0)) ** 0.5
            inset = (cell - 3 - side) / 2
            canvas.rect(x, y, cell - 3, cell - 3, "f-empty", title=f"{name}, {columns[column]}: {value:.2f}")
            if side > 0.5:
                canvas.rect(x + inset, y + inset, round(side, 1), round(side, 1), "f-new")
        y += cell
    return canvas.picture(y + 12, title, note or title)


def draw_bars(title: str, groups: dict[str, list[float]], labels: list[str], *, note: str = "") -> Picture:
    """For each label a bar of every group, side by side; the largest value fills the height."""
    height, bar, gap = 120, 14, 10
    step = len(groups) * bar + gap
    canvas = Canvas(max(420, 2 * MARGIN + len(labels) * step))
    y = _head(canvas, title, note)
    x = MARGIN
    for number, name in enumerate(groups):
        canvas.rect(x, y, 12, 12, f"f-hue{number} s-line")
        canvas.text(x + 17, y + 11, name, size=12)
        x += 34 + 7 * len(name)
    y += 24
    largest = max(max(values) for values in groups.values())
    for index, label in enumerate(labels):
        for number, (name, values) in enumerate(groups.items()):
            top = height * float(values[index]) / largest
            left = MARGIN + index * step + number * bar
            classes = f"f-hue{number} s-line"
            title_text = f"{label}, {name}: {values[index]:.3f}"
            canvas.rect(left, y + height - round(top, 1), bar - 2, round(top, 1), classes, title=title_text)
        centre = MARGIN + index * step + len(groups) * bar / 2
        canvas.text(centre, y + height + 15, label, size=11, anchor="middle")
    return canvas.picture(y + height + 28, title, note or title)


def _head(canvas: Canvas, title: str, note: str) -> float:
    canvas.text(MARGIN, 30, title, size=16, bold=True)
    if note:
        canvas.text(MARGIN, 49, note, "f-muted", size=12)
    return 66 if note else 48
