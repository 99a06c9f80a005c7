"""Writing SVG by hand: shapes on a canvas, with the colours of the theme; no library is needed for it."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

from minipaged.errors import InvalidParameterError
from minipaged.view import theme

#: Characters that XML cannot carry, not even escaped.
_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class Picture:
    """A finished drawing. Jupyter shows it; ``str()`` is its SVG."""

    def __init__(self, svg: str):
        self._svg = svg

    def __str__(self) -> str:
        return self._svg

    def __repr__(self) -> str:
        return f"<Picture {len(self._svg)} bytes of SVG; .save(path) writes it, Jupyter shows it>"

    def _repr_svg_(self) -> str:
        return self._svg

    def save(self, path) -> None:
        """Write the SVG into a file. Raises :class:`InvalidParameterError` where that is impossible."""
        write_text(path, self._svg)


def write_text(path, text: str) -> None:
    """Write a file in UTF-8, or raise :class:`InvalidParameterError` with the reason."""
    try:
        Path(path).write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise InvalidParameterError(f"cannot write {str(path)!r}: {error.strerror}.") from None


def clean(text: str) -> str:
    """``text`` without what XML cannot carry."""
    return _FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", text)


def shorten(text: str, width: int) -> str:
    """``text`` cut in its middle to at most ``width`` characters; ends of ids are what tells them apart."""
    if len(text) <= width:
        return text
    tail = (width - 1) * 2 // 3
    return text[: width - 1 - tail] + "…" + text[-tail:]


class Canvas:
    """Collects shapes, and the height that they need.

    Classes name the theme's colours: ``f-NAME`` fills, ``s-NAME`` strokes. All lengths are in pixels.
    """

    def __init__(self, width: int = 760):
        self.width = width
        self._body: list[str] = []
        self._classes: set[str] = set()
        self._definitions: dict[str, str] = {}

    def rect(self, x, y, width, height, classes: str, *, radius=0, title: str | None = None, dash: bool = False):
        extra = f' rx="{_n(radius)}"' if radius else ""
        extra += ' stroke-dasharray="3 2.5"' if dash else ""
        shape = f'x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}"{extra}'
        self._add("rect", shape, classes, title)

    def circle(self, x, y, radius, classes: str):
        self._add("circle", f'cx="{_n(x)}" cy="{_n(y)}" r="{_n(radius)}"', classes)

    def path(self, data: str, classes: str, *, title: str | None = None):
        self._add("path", f'd="{data}"', classes, title)

    def line(self, x1, y1, x2, y2, classes: str):
        self._add("path", f'd="M{_n(x1)} {_n(y1)}L{_n(x2)} {_n(y2)}"', classes)

    def text(self, x, y, text: str, classes: str = "f-ink", *, size=13, anchor: str = "start", bold: bool = False):
        extra = "" if anchor == "start" else f' text-anchor="{anchor}"'
        extra += ' font-weight="600"' if bold else ""
        attributes = f'x="{_n(x)}" y="{_n(y)}" font-size="{_n(size)}"{extra}'
        self._body.append(f"<text {attributes}{self._class(classes)}>{escape(clean(text))}</text>")

    def hatch(self, name: str, colour: str) -> str:
        """A pattern of slanted lines in a colour; returns the attribute's value that fills with it."""
        self._definitions[name] = (
            f'<pattern id="mp-{name}" width="6" height="6" patternUnits="userSpaceOnUse" '
            f'patternTransform="rotate(45)"><path d="M0 0V6"{self._class(f"s-{colour}")} stroke-width="3"/></pattern>'
        )
        return f"url(#mp-{name})"

    def fill(self, x, y, width, height, paint: str):
        """A rectangle filled with a pattern (see :meth:`hatch`), over what is there."""
        self._body.append(f'<rect x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}" fill="{paint}"/>')

    def _add(self, tag: str, shape: str, classes: str, title: str | None = None):
        if title is None:
            self._body.append(f"<{tag} {shape}{self._class(classes)}/>")
        else:
            self._body.append(f"<{tag} {shape}{self._class(classes)}><title>{escape(clean(title))}</title></{tag}>")

    def _class(self, classes: str) -> str:
        """Attributes with the light colours, and the classes by which the style turns them into the dark ones.

        Attributes, because some sites that show notebooks take the style out of a picture, and because a rule for
        what has no fill would reach the filled shapes of other pictures in a page.
        """
        names = [f"mp-{name}" for name in classes.split() if name != "bold"]
        self._classes.update(names)
        colours = theme.attributes(classes.split())
        return f'{colours} class="{" ".join(names)}"'

    def picture(self, height: float, title: str, description: str) -> Picture:
        """The drawing. ``title`` and ``description`` are what a screen reader tells of it."""
        width, height = _n(self.width), _n(height)
        size = f'width="{_n(self.width - 1)}" height="{_n(float(height) - 1)}"'
        body = f'<rect x="0.5" y="0.5" {size} rx="8"{self._class("f-page s-line")}/>\n' + "\n".join(self._body)
        if self._definitions:
            body = f"<defs>{''.join(self._definitions.values())}</defs>\n{body}"
        key = hashlib.sha256(body.encode()).hexdigest()[:8]  # several pictures may stand in one page
        for name in self._definitions:
            body = body.replace(f"mp-{name}", f"mp-{key}-{name}")
        return Picture(
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'role="img" aria-labelledby="mp-{key}-t mp-{key}-d" font-family={quoteattr(theme.FONT)} '
            f'style="max-width:100%;height:auto">\n'
            f'<title id="mp-{key}-t">{escape(clean(title))}</title>\n'
            f'<desc id="mp-{key}-d">{escape(clean(description))}</desc>\n'
            f"<style>{self._style()}</style>\n{body}\n</svg>\n"
        )

    def _style(self) -> str:
        dark = theme.dark_rules()
        rules = "".join(f".{name}{{{dark[name]}}}" for name in sorted(self._classes))
        return f"@media (prefers-color-scheme:dark){{{rules}}}"


def _n(value: float) -> str:
    """A number with at most two decimals, the same on every machine."""
    return f"{round(float(value), 2):g}" if abs(value) < 1e5 else str(round(value))
