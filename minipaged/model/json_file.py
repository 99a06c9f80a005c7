"""The JSON files of a model directory."""

from __future__ import annotations

import json
from pathlib import Path

from minipaged.errors import ModelFormatError

MAX_BYTES = 4 << 20


def read_object(file: Path) -> dict:
    """The JSON object in ``file``; ``{}`` if there is no such file.

    Raises :class:`ModelFormatError` for a file that is too large or holds anything else.
    """
    if not file.is_file():
        return {}
    size = file.stat().st_size
    if size > MAX_BYTES:
        raise ModelFormatError(f"{file} has {size} bytes; the limit for a JSON file is {MAX_BYTES}.")
    try:
        value = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ModelFormatError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelFormatError(f"{file} holds a {type(value).__name__}; it must be a JSON object.")
    return value
