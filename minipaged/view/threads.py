"""``draw_threads``: which thread of a warp touches which bytes, and what moves for it.

global memory, a row a cache line of 128 bytes = 4 sectors of 32
+0    [ 0][ 1][ 2] … [ 7] | [ 8] …        a cell an element; in it the thread that asks for it
+128  [ 8]░░░░░░░░░░░░░░░ |               a sector moves whole: what nobody asked for is hatched

shared memory, a row 128 bytes = one word in each of 32 banks; a bank serves one word in a wavefront
"""

from __future__ import annotations

from collections.abc import Iterable

from minipaged.errors import InvalidParameterError
from minipaged.view import words
from minipaged.view.svg import Canvas, Picture, shorten

WIDTH, MARGIN, LABEL = 760, 20, 68
SECTOR, LINE = 32, 128
ROW, MAX_ROWS, MAX_PANELS = 24, 34, 8
THREAD_HUES = 4
"""Threads are coloured by eights: 0-7, 8-15, 16-23, 24-31, so that their order is seen at once."""


def draw_threads(accesses, title: str | None = None, *, warp: int = 0) -> Picture:
    """Draw how the threads of one warp touch memory, instruction by instruction.

    Args:
        accesses: one, or several, of :func:`cuda_kernels.toolchain.accesses.record_accesses`; the first 8 are drawn.
        title: above the drawing.
        warp: which warp of the block.

    Raises:
        InvalidParameterError: there is nothing to draw: no access, or none of this warp.
    """
    given = list(accesses) if isinstance(accesses, Iterable) else [accesses]
    for access in given:
        if not hasattr(access, "of_warp"):
            raise InvalidParameterError(
                f"a {type(access).__name__} is no access; give what cuda_kernels.toolchain.accesses.record_accesses "
                "returns, or some of it."
            )
    drawn = [part for access in given if (part := access.of_warp(warp)).threads]
    if not drawn:
        raise InvalidParameterError(f"warp {warp} does nothing in the {words.count(len(given), 'access')} given.")
    title = "Threads and memory" if title is None else title
    canvas = Canvas(WIDTH)
    canvas.text(MARGIN, 32, title, size=17, bold=True)
    canvas.text(MARGIN, 53, f"warp {warp}; in each cell the thread that touches it", "f-muted")
    y, sentences = 66, []
    for access in drawn[:MAX_PANELS]:
        y, sentence = _panel(canvas, access, y)
        sentences.append(sentence)
    if len(drawn) > MAX_PANELS:
        canvas.text(MARGIN, y + 18, f"and {len(drawn) - MAX_PANELS} more accesses", "f-muted")
        y += 24
    y = _legend(canvas, any(not a.is_shared for a in drawn), y + 10)
    return canvas.picture(y + 12, title, " ".join(sentences))


def _panel(canvas: Canvas, access, y: float) -> tuple[float, str]:
    """One access; returns where the next begins, and the access in words."""
    sentence = _sentence(access)
    canvas.text(MARGIN, y + 20, shorten(access.instruction, 84), size=14, bold=True)
    canvas.text(MARGIN, y + 39, sentence, "f-muted")
    per_line = LINE if access.is_shared else min(LINE, max(SECTOR, 32 * access.num_bytes))
    cells = _cells(access)
    lines = sorted({(offset + byte) // per_line for offset in cells for byte in range(access.num_bytes)})
    y += 48
    if access.is_shared:
        y = _banks(canvas, y)
    previous = None
    for line in lines[:MAX_ROWS]:
        if previous is not None and line > previous + 1:
            skipped = words.count((line - previous - 1) * per_line, "byte")
            canvas.text(MARGIN + LABEL, y + 10, f"… {skipped}", "f-muted", size=11)
            y += 14
        _line(canvas, access, cells, line, per_line, y)
        y += ROW + 3
        previous = line
    if len(lines) > MAX_ROWS:
        canvas.text(MARGIN + LABEL, y + 14, f"and {len(lines) - MAX_ROWS} more lines", "f-muted")
        y += 20
    return y + 8, sentence


def _sentence(access) -> str:
    verb, does = ("write", "writes") if access.writes else ("read", "reads")
    count = len(access.threads)
    total = count * access.num_bytes
    who = f"thread {access.threads[0]} {does}" if count == 1 else f"{count} threads {verb}"
    each = words.count(access.num_bytes, "byte") + (" each" if count > 1 else "")
    what = f"{who} {each} of {access.memory}"
    if access.is_shared:
        needed, ideal = access.wavefronts
        return f"{what}: {words.count(needed, 'wavefront')}, {ideal} without bank conflicts."
    if access.memory == "local memory":
        return f"{what}."
    moved = access.sectors * SECTOR
    return f"{what}: {total} bytes asked for, {words.count(access.sectors, 'sector')} = {moved} bytes moved."


def _cells(access) -> dict[int, list[int]]:
    """By offset, the threads that touch the bytes there."""
    cells: dict[int, list[int]] = {}
    for thread, offset in zip(access.threads, access.offsets, strict=True):
        cells.setdefault(offset, []).append(thread % 32)
    return cells


def _banks(canvas: Canvas, y: float) -> float:
    scale = (WIDTH - 2 * MARGIN - LABEL) / LINE
    canvas.text(MARGIN, y + 10, "bank", "f-muted", size=11)
    for bank in range(0, 32, 2):
        canvas.text(MARGIN + LABEL + (4 * bank + 2) * scale, y + 10, str(bank), "f-muted", size=11, anchor="middle")
    return y + 15


def _line(canvas: Canvas, access, cells: dict[int, list[int]], line: int, per_line: int, y: float) -> None:
    scale = (WIDTH - 2 * MARGIN - LABEL) / per_line
    start, left = line * per_line, MARGIN + LABEL
    canvas.text(MARGIN, y + 16, f"+{start:,}", "f-muted", size=12)
    touched = {(offset + byte) // SECTOR for offset in cells for byte in range(access.num_bytes)}
    for sector in range(start // SECTOR, (start + per_line) // SECTOR):
        x, width = left + (sector * SECTOR - start) * scale, SECTOR * scale
        moves = sector in touched and not access.is_shared
        canvas.rect(x, y, width, ROW, "f-page s-ink" if moves else "f-empty s-line")
        if moves:
            canvas.fill(x + 1, y + 1, width - 2, ROW - 2, canvas.hatch("hatch", "line"))
    for offset, threads in cells.items():
        first, last = max(offset, start), min(offset + access.num_bytes, start + per_line)
        if first >= last:
            continue
        x, width = left + (first - start) * scale, (last - first) * scale
        group = f"f-hue{min(threads) // 8 % THREAD_HUES}"
        who = words.listing(threads)
        name = f"thread {who}: bytes {offset:,} to {offset + access.num_bytes - 1:,}"
        canvas.rect(x + 0.5, y + 1, width - 1, ROW - 2, group, title=name)
        label = str(threads[0]) if len(threads) == 1 else f"×{len(threads)}"
        if width > 6.5 * len(label):
            canvas.text(x + width / 2, y + 16, label, size=11 if width < 20 else 12, anchor="middle")


def _legend(canvas: Canvas, has_sectors: bool, y: float) -> float:
    x = MARGIN
    for group in range(THREAD_HUES):
        text = f"threads {8 * group}-{8 * group + 7}"
        canvas.rect(x, y, 16, 16, f"f-hue{group}")
        canvas.text(x + 22, y + 13, text, "f-muted", size=12)
        x += 34 + 7 * len(text)
    if has_sectors:
        y += 22
        canvas.rect(MARGIN, y, 16, 16, "f-page s-ink")
        canvas.fill(MARGIN + 1, y + 1, 14, 14, canvas.hatch("hatch", "line"))
        text = "a sector of 32 bytes that moves; hatched: nobody asked for it"
        canvas.text(MARGIN + 22, y + 13, text, "f-muted", size=12)
    return y + 24
