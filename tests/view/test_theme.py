"""Colours can be told from each other by those who see little contrast."""

from __future__ import annotations

import pytest

from minipaged.view import theme


def luminance(colour):
    """WCAG 2.2, relative luminance."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(first, second):
    """WCAG 2.2, contrast ratio."""
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("kind", [0, 1], ids=["light", "dark"])
def test_contrasts(kind):
    colours = {name: pair[kind] for name, pair in theme.COLOURS.items()}
    fills = [f"hue{number}" for number in range(theme.NUM_HUES)] + ["prefill", "decode", "speculative", "swapped"]
    for name in ("page", "empty", "cached", *fills):
        assert contrast(colours["ink"], colours[name]) >= 4.5, name
    for name in ("page", "empty"):
        assert contrast(colours["muted"], colours[name]) >= 4.5, name
    for name in ("prefill", "decode", "speculative", "swapped", "waiting", "used", "alarm", "copy", "new"):
        assert contrast(colours[name], colours["page"]) >= 3, name


def test_both_themes_name_the_same_colours():
    for name, (light, dark) in theme.COLOURS.items():
        assert theme.attributes([f"f-{name}", "bold"]) == f' fill="{light}" stroke-width="2.5"'
        assert theme.attributes([f"s-{name}"]) == f' fill="none" stroke="{light}"'
        assert theme.dark_rules()[f"mp-f-{name}"] == f"fill:{dark}"
    for kind in (0, 1):
        assert theme.custom_properties(kind).count("--") == len(theme.COLOURS)
