"""Writing for people: sizes, tables, dim notes on stderr; and for pipes: text as it comes."""

from __future__ import annotations

import os
import sys


def write(text: str) -> None:
    """Write to stdout and flush, so that a reader sees each piece when it exists."""
    sys.stdout.write(text)
    sys.stdout.flush()


def note(message: str) -> None:
    """A remark on stderr, dim on a terminal; stdout stays free for results."""
    dim = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    print(f"\x1b[2m{message}\x1b[0m" if dim else message, file=sys.stderr, flush=True)


def human_bytes(count: float) -> str:
    """``94371840`` to ``"90.0 MiB"``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def human_count(count: float) -> str:
    """``134515008`` to ``"134.5M"``."""
    for unit in ("", "K", "M", "B"):
        if count < 1000:
            return f"{count:.0f}" if not unit else f"{count:.1f}{unit}"
        count /= 1000
    return f"{count:.1f}T"


def table(headers: list[str], rows: list[list[object]], right: tuple[int, ...] = ()) -> str:
    """Columns padded to their widest cell; those in ``right`` are aligned to the right."""
    cells = [[str(cell) for cell in row] for row in [headers, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]
    lines = []
    for row in cells:
        padded = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(padded).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def fields(pairs: list[tuple[str, object]]) -> str:
    """``name  value`` lines with the values aligned."""
    width = max(len(name) for name, _ in pairs)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in pairs)
