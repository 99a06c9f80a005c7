"""Chat messages to the text that a model was trained to continue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from minipaged.errors import InvalidParameterError, ModelFormatError, TokenizerError
from minipaged.model.json_file import read_object
from minipaged.model.tokenizer import MAX_FILE_BYTES, special_tokens

TOOL_TEMPLATE = "tool_use"


class ChatTemplate:
    """A model's chat template: a jinja2 program that renders messages to text.

    The text holds the special tokens the model wants, BOS included: encode it with
    ``add_special_tokens=False``. A template is compiled when first used, so that a faulty one does
    not keep a model from plain generation.

    Args:
        source: the template; or several by name (``{"default": ..., "tool_use": ...}``, or a list
            of ``{"name": ..., "template": ...}``), of which ``"tool_use"`` is taken when tools are given.
        special_tokens: what the template may name, such as ``{"bos_token": "<s>"}``.
    """

    def __init__(self, source: str | Mapping[str, str] | list, special_tokens: Mapping[str, str] | None = None):
        self.templates = _named_templates(source)
        self.special_tokens = dict(special_tokens or {})
        self._compiled: dict[str, tuple] = {}

    @classmethod
    def from_directory(cls, path: str | Path) -> ChatTemplate | None:
        """The template of a model directory, or ``None`` if it has none.

        ``chat_template.jinja`` (with others in ``additional_chat_templates/``) comes before
        ``chat_template.json``, and that before ``tokenizer_config.json``.
        """
        path = Path(path)
        config = read_object(path / "tokenizer_config.json")
        source = read_object(path / "chat_template.json").get("chat_template") or config.get("chat_template")
        files = {file.stem: file for file in sorted((path / "additional_chat_templates").glob("*.jinja"))}
        if (path / "chat_template.jinja").is_file():
            files["default"] = path / "chat_template.jinja"
        if files:
            source = {name: _read_text(file) for name, file in files.items()}
        if not source:
            return None
        settings = {**read_object(path / "special_tokens_map.json"), **config}
        return cls(source, special_tokens(settings))

    def render(
        self,
        messages: Sequence[Mapping],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping] | None = None,
        documents: Sequence[Mapping] | None = None,
        **variables,
    ) -> str:
        """The text of a conversation, ending (if asked) where the assistant's answer begins.

        Args:
            messages: each with a ``role`` and usually ``content``: a string, or a list of parts
                ``{"type": "text", "text": ...}`` (joined by newlines for templates that know only strings).
            add_generation_prompt: append what introduces an answer.
            tools: JSON schemas of functions that the model may call.
            documents: texts for retrieval, for templates that know them.
            **variables: anything else the template reads, such as ``enable_thinking=False``.

        Raises:
            InvalidParameterError: the messages are no such list.
            TokenizerError: the template is faulty, or refuses these messages (its own words are quoted).
        """
        template, takes_parts = self._compile(self._choose(tools))
        from minipaged.model.chat_sandbox import RangeBudget

        scope = {
            **self.special_tokens,
            "messages": _plain_messages(messages, takes_parts),
            "tools": _plain(tools, "tools"),
            "documents": _plain(documents, "documents"),
            "add_generation_prompt": add_generation_prompt,
            **_plain(variables, "a template variable"),
            "range": RangeBudget(),
        }
        try:
            return template.render(scope)
        except Exception as error:  # a template is a program: it can fail in any way
            raise TokenizerError(f"the chat template refused these messages: {_describe(error)}") from None

    def _choose(self, tools) -> str:
        if tools and TOOL_TEMPLATE in self.templates:
            return TOOL_TEMPLATE
        if "default" in self.templates:
            return "default"
        raise TokenizerError(
            f"the model has chat templates named {', '.join(map(repr, self.templates))}, but none named 'default'."
        )

    def _compile(self, name: str) -> tuple:
        if name not in self._compiled:
            import jinja2

            from minipaged.model.chat_sandbox import ChatEnvironment, expects_parts

            source = self.templates[name]
            environment = ChatEnvironment()
            try:
                self._compiled[name] = environment.from_string(source), expects_parts(environment.parse(source))
            except jinja2.TemplateSyntaxError as error:
                raise TokenizerError(f"the chat template is faulty in line {error.lineno}: {error.message}") from None
            except Exception as error:
                raise TokenizerError(f"the chat template cannot be compiled: {_describe(error)}") from None
        return self._compiled[name]


def _named_templates(source) -> dict[str, str]:
    if isinstance(source, str):
        source = {"default": source}
    if isinstance(source, list):
        try:
            source = {entry["name"]: entry["template"] for entry in source}
        except (TypeError, KeyError):
            raise TokenizerError("chat_template is a list; each entry must have a name and a template.") from None
    if not isinstance(source, Mapping) or not source:
        raise TokenizerError(f"chat_template is a {type(source).__name__}; it must be text or named texts.")
    for name, text in source.items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise TokenizerError(f"chat template {name!r} is a {type(text).__name__}; it must be text.")
    return dict(source)


def _plain_messages(messages, takes_parts: bool) -> list[dict]:
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise InvalidParameterError(
            f"messages is a {type(messages).__name__}; it must be a list like "
            '[{"role": "user", "content": "Hello"}].'
        )
    if not messages:
        raise InvalidParameterError("messages is empty; a conversation needs at least one message.")
    return [_plain_message(message, i, takes_parts) for i, message in enumerate(messages)]


def _plain_message(message, index: int, takes_parts: bool) -> dict:
    where = f"messages[{index}]"
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InvalidParameterError(f"{where} is {message!r:.200}; it must be an object with a role.")
    plain = _plain(message, where)
    content = plain.get("content")
    if isinstance(content, list):
        texts = [_part_text(part, f"{where}['content'][{i}]") for i, part in enumerate(content)]
        if not takes_parts:
            plain["content"] = "\n".join(texts)
    elif content is not None and not isinstance(content, str):
        raise InvalidParameterError(f"{where}['content'] is a {type(content).__name__}; it must be text or a list.")
    return plain


def _part_text(part, where: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise InvalidParameterError(
            f"{where} is {part!r:.200}; only text is supported: {{'type': 'text', 'text': ...}}."
        )
    return part["text"]


def _plain(value, where: str, depth: int = 0):
    """A copy in JSON's types only: a template must not get hold of objects with methods."""
    if depth > 100:
        raise InvalidParameterError(f"{where} is nested more than 100 levels deep.")
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {_plain(key, where, depth + 1): _plain(item, where, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, where, depth + 1) for item in value]
    raise InvalidParameterError(
        f"{where} holds a {type(value).__name__}; a chat template takes strings, numbers, lists and objects."
    )


def _read_text(file: Path) -> str:
    size = file.stat().st_size
    if size > MAX_FILE_BYTES:
        raise ModelFormatError(f"{file} has {size} bytes; the limit is {MAX_FILE_BYTES}.")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{file} is not UTF-8 text: {error}") from None


def _describe(error: Exception) -> str:
    text = str(getattr(error, "message", None) or error)
    return text if type(error).__name__ == "TemplateError" else f"{type(error).__name__}: {text}"
