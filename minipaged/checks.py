"""Checks of options: each names the option, the value seen and the limit."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math

from minipaged.errors import InvalidParameterError

GRAMMARS = ("json", "json_object", "regex", "choice", "grammar")


def refuse_unknown(error: type[Exception]):
    """Class decorator: the dataclass's constructor raises ``error``, not ``TypeError``, for an option it
    does not know, and suggests the one that was meant."""

    def decorate(cls: type) -> type:
        construct = cls.__init__
        known = [f.name for f in dataclasses.fields(cls)]

        @functools.wraps(construct)
        def checked(self, *args, **options):
            for name in options:
                if name not in known:
                    close = difflib.get_close_matches(str(name), known, n=1)
                    hint = f"Did you mean {close[0]!r}?" if close else f"Known options: {', '.join(known)}."
                    raise error(f"unknown option {name!r}. {hint}")
            construct(self, *args, **options)

        cls.__init__ = checked
        return cls

    return decorate


def show(value) -> str:
    """``repr`` in a length that fits a message; Python refuses to print very long integers."""
    try:
        text = repr(value)
    except ValueError:
        return f"a {type(value).__name__} too long to print"
    return text if len(text) <= 200 else text[:200] + "..."


def check_choice(error, name, value, choices):
    """Raise ``error`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise error(f"{name} is {show(value)}; it must be one of {', '.join(map(repr, choices))}.")


def check_int(error, name, value, low=None, high=None, optional=False):
    """Raise ``error`` unless ``value`` is an integer within limits (``None`` too if ``optional``)."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise error(f"{name} is {show(value)}; it must be an integer.")
    _check_range(error, name, value, low, high)


def check_number(error, name, value, low=None, high=None, optional=False):
    """Raise ``error`` unless ``value`` is a finite number within limits (``None`` too if ``optional``)."""
    if value is None and optional:
        return
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or (isinstance(value, float) and not math.isfinite(value)):
        raise error(f"{name} is {show(value)}; it must be a finite number.")
    _check_range(error, name, value, low, high)


def _check_range(error, name, value, low, high):
    if low is not None and value < low:
        raise error(f"{name} is {show(value)}; it must be at least {low}.")
    if high is not None and value > high:
        raise error(f"{name} is {show(value)}; it must be at most {high}.")


def checked_grammar(value) -> dict:
    """``structured_outputs`` of the right form, a JSON schema parsed; whether the grammar itself is
    well-formed is found out at admission."""
    if not isinstance(value, dict) or len(value) != 1 or next(iter(value)) not in GRAMMARS:
        raise InvalidParameterError(
            f"structured_outputs is {show(value)}; it must be a dict with one of the keys {', '.join(GRAMMARS)}."
        )
    ((kind, grammar),) = value.items()
    wrong = InvalidParameterError(f"structured_outputs[{kind!r}] is {show(grammar)}; it must be {_FORMS[kind]}.")
    if kind == "json":
        try:
            schema = json.loads(grammar) if isinstance(grammar, str) else json.loads(json.dumps(grammar))
        except (TypeError, ValueError, RecursionError):
            raise wrong from None
        if not isinstance(schema, dict):
            raise wrong
        return {kind: schema}
    if kind == "json_object":
        fits = grammar is True
    elif kind == "choice":
        fits = isinstance(grammar, (list, tuple)) and grammar and all(isinstance(s, str) and s for s in grammar)
    else:
        fits = isinstance(grammar, str) and grammar
    if not fits:
        raise wrong
    return {kind: list(grammar) if kind == "choice" else grammar}


_FORMS = {
    "json": "a JSON schema, as a dict or as text that holds an object",
    "json_object": "True",
    "regex": "a regular expression that is not empty",
    "choice": "a list of strings, at least one and none empty",
    "grammar": "the text of a grammar",
}
