"""Stop strings in streamed text, against an offline answer."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipaged.sampling.stop import StopChecker

TEXT = st.text(alphabet="abé🙂", max_size=40)
STOPS = st.lists(st.text(alphabet="abé🙂", min_size=1, max_size=5), max_size=4)


def offline(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """Shortest prefix of the text that ends with a stop string; of several, the longest string."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


def pieces(text: str, cuts: list[int]):
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[a:b] for a, b in zip(places, places[1:], strict=False)]


@given(TEXT, STOPS, st.lists(st.integers(0, 40)), st.booleans())
def test_any_chunking_gives_the_offline_answer(text, stops, cuts, include):
    checker = StopChecker(stops, include)
    emitted, stopped = "", None
    for piece in pieces(text, cuts):
        out, stopped = checker.push(piece)
        emitted += out
        if stopped is not None:
            break
    emitted += checker.flush()
    assert (emitted, stopped) == offline(text, stops, include)


@given(TEXT, STOPS, st.lists(st.integers(0, 40)), st.booleans())
def test_holds_back_exactly_what_may_begin_a_stop_string(text, stops, cuts, include):
    checker = StopChecker(stops, include)
    seen = emitted = ""
    for piece in pieces(text, cuts):
        seen += piece
        out, stopped = checker.push(piece)
        emitted += out
        if stopped is not None:
            return
        starts = [n for n in range(1, len(seen) + 1) if any(s.startswith(seen[-n:]) for s in stops)]
        held = 0 if include else max(starts, default=0)
        assert emitted == seen[: len(seen) - held]


@pytest.mark.parametrize(
    "text,stops,expected",
    [
        ("one two three", ["three", "two"], ("one ", "two")),  # the first in the text, not in the list
        ("xabcy", ["abc", "b"], ("xa", "b")),  # complete first
        ("xabcy", ["bc", "abc"], ("x", "abc")),  # complete together: the longest
        ("aaab", ["aab"], ("a", "aab")),  # overlapping beginnings
        ("ababac", ["abac"], ("ab", "abac")),
        ("abcabd", ["abd", "bca"], ("a", "bca")),
        ("stop", ["stop"], ("", "stop")),
        ("sto", ["stop"], ("sto", None)),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_examples(text, stops, expected, size):
    checker = StopChecker(stops)
    emitted, stopped = "", None
    for start in range(0, len(text), size):
        out, stopped = checker.push(text[start : start + size])
        emitted += out
        if stopped:
            break
    assert (emitted + checker.flush(), stopped) == expected


def test_included_stop_string_ends_the_text_and_nothing_is_held():
    checker = StopChecker(["END"], include_in_output=True)
    assert checker.push("so EN") == ("so EN", None)
    assert checker.push("D and more") == ("D", "END")


def test_after_the_stop_nothing_more_is_given_out():
    checker = StopChecker(["."])
    assert checker.push("a.b") == ("a", ".")
    assert checker.push("more.") == ("", ".")
    assert checker.flush() == ""


def test_without_stop_strings_text_passes_at_once():
    checker = StopChecker([])
    assert checker.push("text") == ("text", None)
    assert checker.flush() == ""


def test_long_repetitive_stop_strings_cost_linear_time():
    """A search that compares suffixes afresh for each token would take minutes here."""
    checker = StopChecker(["a" * 20_000 + "b", "a" * 19_999 + "c"])
    started = time.perf_counter()
    emitted = "".join(checker.push("aaaa")[0] for _ in range(10_000))
    assert len(emitted) == 40_000 - 20_000
    assert time.perf_counter() - started < 5
