"""A trace as one self-contained page: template, style and scripts of ``page/`` with the trace inside."""

from __future__ import annotations

from html import escape
from importlib.resources import files

from minipaged.view import theme


def to_html(trace, title: str | None = None) -> str:
    """The page's text. It asks nothing of any server, and says so in its content security policy."""
    title = title or " ".join(["Trace", *(str(trace.about[key]) for key in ("model",) if key in trace.about)])
    page = files("minipaged.view") / "page"
    parts = {name: (page / name).read_text(encoding="utf-8") for name in ("page.html", "page.css", *SCRIPTS)}
    light, dark = (theme.custom_properties(kind) for kind in (0, 1))
    style = f":root{{color-scheme:light dark;{light}}}\n@media (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"
    values = {
        "TITLE": escape(title),
        "STYLE": style + parts["page.css"],
        "TRACE": trace.to_json().replace("<", "\\u003c"),  # no text can end the script element
        "SCRIPT": "\n".join(parts[name] for name in SCRIPTS),
    }
    text = parts["page.html"]
    before, *rest = text.split("{{")
    return before + "".join(values[name] + after for name, _, after in (part.partition("}}") for part in rest))


SCRIPTS = ("replay.js", "draw.js", "viewer.js")
