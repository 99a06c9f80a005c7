"""The jinja2 environment in which chat templates run: what they expect, and nothing that does harm.

Templates come with models, from anywhere, so they are untrusted programs. They see plain data only,
cannot change it, cannot reach Python's internals, and cannot spin forever in ``range`` or ask for
huge values by a number (a product, a power, the width of a field). What they do expect is defined
by Hugging Face transformers (``apply_chat_template``): its whitespace rules, filters, functions and
tags.
"""

from __future__ import annotations

import functools
import json
import re
from datetime import datetime

import jinja2
import jinja2.ext
import jinja2.filters
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

# Numbers that all calls of range() in one rendering may give; items of a product, width of a field.
MAX_RANGE_TOTAL = 1_000_000
MAX_SIZE = 1_000_000
# A width or precision of more than five digits, or one taken from the arguments: "%999999d", "%*d".
HUGE_FIELD = re.compile(r"%[^%a-zA-Z]*(\d{6}|\*)|\{[^}]*\d{6}")


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """Compiles chat templates; see the module's text."""

    # Interception also keeps the compiler from computing with constants while parsing.
    intercepted_binops = frozenset(["*", "**", "%"])

    def __init__(self):
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols])
        for name in ("center", "indent", "batch", "slice"):
            self.filters[name] = _bounded(self.filters[name])
        self.filters["format"] = _checked_format
        self.filters["tojson"] = to_json
        self.globals["raise_exception"] = raise_exception
        self.globals["strftime_now"] = strftime_now

    def call_binop(self, context, operator, left, right):
        if operator == "*":
            for value, count in ((left, right), (right, left)):
                if isinstance(value, (str, list, tuple)) and isinstance(count, int):
                    _check_size(len(value) * count)
        elif operator == "**":
            _check_size(left)
            if abs(right) > 64:
                raise SecurityError(f"an exponent is {right}; the limit is 64")
        elif isinstance(left, str):
            _check_format(left)
        return super().call_binop(context, operator, left, right)

    def call(self, context, function, *args, **kwargs):
        if isinstance(getattr(function, "__self__", None), str):  # "x".center(10 ** 12)
            function = _bounded(function)
        return super().call(context, function, *args, **kwargs)

    def wrap_str_format(self, value):
        safe = super().wrap_str_format(value)
        if safe is None:
            return None
        _check_format(value.__self__)
        return _bounded(safe)


class GenerationTag(jinja2.ext.Extension):
    """``{% generation %}...{% endgeneration %}`` marks the assistant's words for training; here it
    is just its content."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _check_size(value) -> None:
    if isinstance(value, int) and abs(value) > MAX_SIZE:
        raise SecurityError(f"a size is {value:.3g}; the limit is {MAX_SIZE}")


def _check_format(text: str) -> None:
    if HUGE_FIELD.search(text):
        raise SecurityError(f"the format {text!r:.80} has a field that is too wide")


def _checked_format(value, *args, **kwargs):
    _check_format(str(value))
    return jinja2.filters.do_format(value, *args, **kwargs)


def _bounded(function):
    """``function``, refusing numbers that make it build something huge."""

    @functools.wraps(function)
    def checked(*args, **kwargs):
        for value in (*args, *kwargs.values()):
            _check_size(value)
        return function(*args, **kwargs)

    return checked


class RangeBudget:
    """``range`` for one rendering, with a limit on all its calls together: loops may be nested."""

    def __init__(self):
        self._left = MAX_RANGE_TOTAL

    def __call__(self, *args):
        numbers = range(*args)
        self._left -= len(numbers)
        if self._left < 0:
            raise SecurityError(f"range() gave more than {MAX_RANGE_TOTAL} numbers in all")
        return numbers


def raise_exception(message):
    """How a template refuses its input."""
    raise jinja2.TemplateError(message)


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """jinja2's own filter escapes HTML characters, which a language model should not see."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def strftime_now(format):
    """The current local time, for system prompts that name the date."""
    return datetime.now().strftime(format)


def expects_parts(tree: nodes.Template) -> bool:
    """Whether a template loops over a message's ``content``, so that it understands lists of parts."""
    names = {"content"}
    for assign in tree.find_all(nodes.Assign):
        if isinstance(assign.target, nodes.Name) and _is_content(assign.node, names):
            names.add(assign.target.name)
    return any(_is_content(loop.iter, names) for loop in tree.find_all(nodes.For))


def _is_content(node: nodes.Node, names: set[str]) -> bool:
    if isinstance(node, nodes.Filter):
        return node.node is not None and _is_content(node.node, names)
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
    return isinstance(node, nodes.Name) and node.name in names
