"""Ways to compute a model, written in a word: ``cpu:int8``, ``cpu:bfloat16:kv=int8``, ``reference``.

A mode is a device and, after colons in any order, a weight format (a ``dtype`` or a ``quantization``)
and the format of the KV cache. What is not said keeps its default.
"""

from __future__ import annotations

from minipaged.config import DEVICES, DTYPES, KV_CACHE_DTYPES, QUANTIZATIONS, EngineConfig
from minipaged.errors import ConfigError

SYNTAX = "DEVICE[:DTYPE][:QUANTIZATION][:kv=DTYPE]"
MODE_OPTIONS = ("device", "dtype", "quantization", "kv_cache_dtype")
_QUANTIZATIONS = tuple(name for name in QUANTIZATIONS if name)


def parse_mode(text: str) -> dict[str, str]:
    """The engine options that a mode stands for; :class:`ConfigError` names the part that is none."""
    device, *parts = text.split(":")
    if device not in DEVICES:
        raise ConfigError(f"mode {text!r} begins with {device!r}; it must be one of {', '.join(DEVICES)} ({SYNTAX}).")
    options = {"device": device}
    for part in parts:
        name, value = _option(text, part)
        if name in options:
            raise ConfigError(f"mode {text!r} gives {name} twice.")
        options[name] = value
    return options


def _option(text: str, part: str) -> tuple[str, str]:
    if part.startswith("kv="):
        value = part.removeprefix("kv=")
        if value not in KV_CACHE_DTYPES:
            raise ConfigError(f"mode {text!r}: kv is {value!r}; it must be one of {', '.join(KV_CACHE_DTYPES)}.")
        return "kv_cache_dtype", value
    if part in _QUANTIZATIONS:
        return "quantization", part
    if part in DTYPES:
        return "dtype", part
    known = ", ".join((*DTYPES, *_QUANTIZATIONS))
    raise ConfigError(f"mode {text!r} has the part {part!r}; it must be one of {known}, or kv=DTYPE.")


def check_modes(modes: list[str]) -> None:
    """Refuse, before anything is loaded, what is not a mode or cannot run here.

    Raises :class:`ConfigError` or :class:`~minipaged.errors.BackendUnavailableError`.
    """
    from minipaged import backends

    if len(set(modes)) < len(modes):
        raise ConfigError(f"modes {', '.join(modes)} name one twice; give each once.")
    for mode in modes:
        config = EngineConfig(**parse_mode(mode))
        backends.check_options(backends.choose(config.device), config)
