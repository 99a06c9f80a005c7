"""What a caller gave, as Python wants it; and what Python raises, as a status and a text."""

from __future__ import annotations

import json

from minipaged import errors

OK, INTERNAL, ARGUMENT, ENGINE, MEMORY, PACKAGE, NUMERICAL = 0, -1, -2, -3, -10, -12, -26
STATUS = [  # the first class that fits
    (errors.ConfigError, -13),
    (errors.InvalidParameterError, -14),
    (errors.PromptTooLongError, -16),
    (errors.PoolTooSmallError, -17),
    (errors.TokenRangeError, -18),
    (errors.RequestError, -15),
    (errors.ModelNotFoundError, -19),
    (errors.ModelFormatError, -20),
    (errors.UnsupportedModelError, -21),
    (errors.TokenizerError, -22),
    (errors.DownloadError, -23),
    (errors.BackendUnavailableError, -24),
    (errors.EngineClosedError, -25),
    (errors.NumericalError, NUMERICAL),
    (ImportError, PACKAGE),
    (MemoryError, MEMORY),
    (OSError, -19),
]


class CallError(Exception):
    """An error of the C interface itself."""

    def __init__(self, status: int, text: str):
        super().__init__(text)
        self.status = status


def explain(error: BaseException) -> tuple[int, bytes]:
    """Status and text of an exception."""
    if isinstance(error, CallError):
        status, text = error.status, str(error)
    else:
        status = next((status for kind, status in STATUS if isinstance(error, kind)), INTERNAL)
        named = status in (INTERNAL, PACKAGE, MEMORY)
        text = f"{type(error).__name__}: {error}" if named else str(error)
    return status, text.encode("utf-8", "replace")


def parse(text: str, what: str):
    """JSON, or a :class:`CallError` that says where it is malformed."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CallError(ARGUMENT, f"{what} is not valid JSON: {error}") from None


def options_of(fields: str, extra: str, what: str) -> dict:
    """The fields of a struct, and those of the JSON object in it, of which none may be in both."""
    options = parse(fields, what)
    rest = parse(extra, f"{what}.json") if extra.strip() else {}
    if not isinstance(rest, dict):
        raise CallError(ARGUMENT, f"{what}.json is a JSON {type(rest).__name__}; it must be an object.")
    twice = sorted(options.keys() & rest.keys())
    if twice:
        raise CallError(ARGUMENT, f"{twice[0]} is given twice, as a field of {what} and in its json.")
    return options | rest


def structured_outputs(kind: str, source: str):
    """``grammar_kind`` and ``grammar`` in the form that ``SamplingParams`` takes."""
    if kind == "json_object":
        return {kind: True}
    return {kind: parse(source, "grammar") if kind == "choice" else source}


def sampling_params(defaults, fields: str, extra: str):
    """The model's defaults, changed by what the caller gave."""
    options = options_of(fields, extra, "minipaged_sampling")
    if options.get("max_tokens") == 0:
        options["max_tokens"] = None
    if "grammar_kind" in options:
        options["structured_outputs"] = structured_outputs(options.pop("grammar_kind"), options.pop("grammar"))
    if isinstance(options.get("logit_bias"), dict):  # the keys of a JSON object are strings
        options["logit_bias"] = {int(k) if k.isdecimal() else k: v for k, v in options["logit_bias"].items()}
    return defaults.clone(**options)


def chat_text(model, text: str) -> str:
    """What the model's chat template makes of a conversation given as JSON."""
    given = parse(text, "the conversation")
    options = given if isinstance(given, dict) else {"messages": given}
    unknown = sorted(options.keys() - {"messages", "tools", "add_generation_prompt"})
    if unknown or not isinstance(options.get("messages"), list):
        raise CallError(
            ARGUMENT,
            "a conversation is a JSON list of messages, or an object with 'messages', 'tools' and "
            f"'add_generation_prompt'; {f'{unknown[0]!r} is unknown' if unknown else 'there are no messages'}.",
        )
    if model.chat_template is None:
        raise errors.TokenizerError(f"{model.name} has no chat template; submit plain text.")
    return model.chat_template.render(
        options["messages"],
        add_generation_prompt=options.get("add_generation_prompt", True),
        tools=options.get("tools"),
    )
