"""The colours of all pictures, for light and dark, in one place.

Text on every fill has a contrast above 4.5, and what is told by its colour alone (kinds of work, marks) one above 3
to the page, as WCAG 2.2 asks; tests/view/test_theme.py computes both.
"""

from __future__ import annotations

NUM_HUES = 8
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"

# name: (light, dark)
COLOURS = {
    "page": ("#ffffff", "#16191d"),
    "ink": ("#1c2026", "#eceff3"),
    "muted": ("#57606b", "#a3adb9"),
    "line": ("#c3cad3", "#49525d"),
    "empty": ("#f4f6f8", "#20252b"),
    # sequences, by number of arrival
    "hue0": ("#a9cbf5", "#27588f"),
    "hue1": ("#fbc78e", "#85500f"),
    "hue2": ("#a5dfb4", "#27683a"),
    "hue3": ("#f6b6cf", "#873a5d"),
    "hue4": ("#9fdfe3", "#1d666e"),
    "hue5": ("#f1e08a", "#6a5d10"),
    "hue6": ("#cdbdf3", "#574391"),
    "hue7": ("#dccab6", "#64503b"),
    # kinds of work
    "prefill": ("#5596df", "#2f68ab"),
    "decode": ("#43a560", "#2b7542"),
    "speculative": ("#9b80e0", "#6d55b3"),
    "cached": ("#c9dcf5", "#1f3a59"),
    "swapped": ("#ae9029", "#73661b"),
    "waiting": ("#8a949f", "#6f7a86"),
    "used": ("#6d7f94", "#7e92ab"),
    # marks
    "alarm": ("#c42b2b", "#ff8b80"),
    "copy": ("#8a3ab9", "#d9a6ff"),
    "new": ("#1666c0", "#7db8ff"),
}


def attributes(classes: list[str]) -> str:
    """SVG attributes with the light colours of classes: ``f-NAME`` fills, ``s-NAME`` strokes, ``bold`` a wide line."""
    found = {"fill": "none"}
    for name in classes:
        kind, _, colour = name.partition("-")
        if name == "bold":
            found["stroke-width"] = "2.5"
        else:
            found[{"f": "fill", "s": "stroke"}[kind]] = COLOURS[colour][0]
    return "".join(f' {name}="{value}"' for name, value in found.items())


def dark_rules() -> dict[str, str]:
    """CSS declarations with the dark colours by class, ``mp-f-NAME`` and ``mp-s-NAME``."""
    fills = {f"mp-f-{name}": f"fill:{dark}" for name, (_, dark) in COLOURS.items()}
    return fills | {f"mp-s-{name}": f"stroke:{dark}" for name, (_, dark) in COLOURS.items()}


def custom_properties(kind: int) -> str:
    """The colours as CSS custom properties (``--ink: …``), for a page."""
    return "".join(f"--{name}:{colours[kind]};" for name, colours in COLOURS.items())
