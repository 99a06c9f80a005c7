"""Command-line options generated from ``EngineConfig`` and ``SamplingParams``.

Names, types, defaults and help texts come from the dataclasses and their docstrings, so the command
line cannot drift from the Python API. Options that were not given are absent from the namespace:
the dataclass's own default (or the model's) applies.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import re
import typing

from minipaged import config
from minipaged.config import EngineConfig, SamplingParams

CHOICES = {
    "device": config.DEVICES,
    "dtype": config.DTYPES,
    "quantization": tuple(q for q in config.QUANTIZATIONS if q is not None),
    "kv_cache_dtype": config.KV_CACHE_DTYPES,
    "policy": config.POLICIES,
}
BYTES = ("kv_cache_memory", "swap_space")
DEFAULT_MAX_TOKENS = 256
"""On the command line ``max_tokens`` is this, or what is left of ``max_model_len`` if that is less."""


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags that every command takes, before or after its name."""
    # SUPPRESS: the subcommand's default must not undo what was given before the subcommand.
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )
    parser.add_argument(
        "--verbose", action="store_true", default=argparse.SUPPRESS, help="log what the engine decides, to stderr"
    )


def add_engine_options(parser: argparse.ArgumentParser, omit: tuple[str, ...] = ()) -> None:
    """Add a flag for each field of ``EngineConfig`` but those in ``omit``."""
    _add_fields(parser.add_argument_group("engine options"), EngineConfig, omit, show_defaults=True)


def add_sampling_options(parser: argparse.ArgumentParser, omit: tuple[str, ...] = ()) -> None:
    """Add a flag for each field of ``SamplingParams`` but those in ``omit``."""
    group = parser.add_argument_group(
        "sampling options",
        "What is not given follows the model's recommendation; without --max-tokens "
        f"an answer has at most {DEFAULT_MAX_TOKENS} tokens.",
    )
    _add_fields(group, SamplingParams, omit, show_defaults=False)


def given(args: argparse.Namespace, cls: type, omit: tuple[str, ...] = ()) -> dict:
    """The fields of ``cls`` that the command line set."""
    names = [f.name for f in dataclasses.fields(cls) if f.name not in omit]
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def given_sampling(args: argparse.Namespace) -> dict:
    """The fields of ``SamplingParams`` that the command line set; ``--beam-width`` asks for beam search.

    Raises :class:`InvalidParameterError` for bad values, so that no model is loaded in vain.
    """
    options = given(args, SamplingParams)
    if "beam_width" in options:
        options.setdefault("use_beam_search", True)
    SamplingParams(**options)
    return options


def _add_fields(group, cls: type, omit: tuple[str, ...], *, show_defaults: bool) -> None:
    hints, help_texts = typing.get_type_hints(cls), field_help(cls)
    for field in dataclasses.fields(cls):
        if field.name in omit:
            continue
        text = help_texts.get(field.name, "").replace("%", "%%").replace("``", "")
        if show_defaults and field.default is not None:
            text += f" (default: {field.default})"
        group.add_argument(
            "--" + field.name.replace("_", "-"),
            dest=field.name,
            default=argparse.SUPPRESS,
            help=text,
            **_argument_kind(field.name, hints[field.name]),
        )


def _argument_kind(name: str, hint) -> dict:
    """Keyword arguments of ``add_argument`` for a field of this type."""
    kinds = [kind for kind in typing.get_args(hint) or (hint,) if kind is not type(None)]
    if name in CHOICES:
        return {"choices": CHOICES[name]}
    if name in BYTES:
        return {"type": byte_size, "metavar": "BYTES"}
    if list[str] in kinds:
        return {"action": "append", "metavar": "TEXT"}
    if list[int] in kinds:
        return {"type": token_ids, "metavar": "ID,ID,..."}
    if dict[int, float] in kinds:
        return {"type": token_biases, "metavar": "ID=BIAS,..."}
    if dict in kinds:
        return {"type": json_object, "metavar": "JSON"}
    if bool in kinds and str in kinds:
        return {"type": truth_or_word, "metavar": "true|false|never"}
    (kind,) = kinds
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    metavar = {int: "N", float: "X", str: "NAME"}[kind]
    return {"type": kind, "metavar": metavar}


def field_help(cls: type) -> dict[str, str]:
    """The text on each field in the "Attributes:" section of the class's docstring."""
    section = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")[2]
    texts = {}
    for entry in re.split(r"\n(?=    \w)", "\n" + section.rstrip()):
        names, _, text = entry.strip().partition(": ")
        for name in names.split(", "):
            texts[name] = " ".join(text.split()).rstrip(".")
    return texts


def byte_size(text: str) -> int:
    """``"512M"`` to bytes; K, M, G and T are powers of 1024, ``"MB"`` and ``"MiB"`` mean the same."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)(?:i?B)?", text, re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write bytes, or a number with K, M, G or T: 512M")
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))


def truth_or_word(text: str) -> bool | str:
    """``"true"`` and ``"false"`` to a bool; other words stay as they are."""
    return {"true": True, "false": False}.get(text.lower(), text)


def token_ids(text: str) -> list[int]:
    """``"1,2,3"`` to a list of integers."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of token ids such as 1,2,3") from None


def token_biases(text: str) -> dict[int, float]:
    """``"12=-5,13=2"`` to a dict."""
    try:
        pairs = [part.split("=") for part in text.split(",")]
        return {int(token_id): float(bias) for token_id, bias in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of biases such as 12=-5,13=2") from None


def json_object(text: str) -> dict:
    """``'{"regex": "[a-z]+"}'`` to a dict."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value


def positive_ints(text: str) -> list[int]:
    """``"1,32"`` to a list of integers above 0."""
    values = token_ids(text)
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: each number must be at least 1")
    return values


def positive_int(text: str) -> int:
    """An integer above 0."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 1")
    return int(text)
