"""Text to token ids and back: Hugging Face's ``tokenizers``, with ids and errors made explicit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import tokenizers

from minipaged.errors import ModelNotFoundError, TokenizerError
from minipaged.model.detokenizer import (
    BYTE_TOKEN,
    IncrementalDetokenizer,
    byte_level_bytes,
    check_token_id,
    decoder_kinds,
)
from minipaged.model.json_file import read_object

__all__ = ["IncrementalDetokenizer", "Tokenizer"]

# The names under which configuration files give special tokens.
SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MAX_FILE_BYTES = 256 << 20


class Tokenizer:
    """A ``tokenizers.Tokenizer`` with the special tokens of its model.

    Args:
        backend: the tokenizer proper; truncation and padding are switched off.
        bos_token_id: the token that begins a text, if the model has one.
        eos_token_ids: the tokens that end a text.
        prepend_bos: put ``bos_token_id`` first in ``encode``, as older checkpoints ask for with
            ``add_bos_token``. Ignored if the tokenizer's own post-processor adds special tokens.

    Attributes:
        special_token_ids: ids that ``skip_special_tokens`` leaves out of decoded text.
        prepend_bos: whether ``encode`` itself puts ``bos_token_id`` first.
        byte_level: tokens are strings of bytes (byte-level BPE), not pieces of text.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token_id: int | None = None,
        eos_token_ids: Iterable[int] = (),
        prepend_bos: bool = False,
    ):
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.bos_token_id = bos_token_id
        self.eos_token_ids = tuple(dict.fromkeys(eos_token_ids))
        added = backend.get_added_tokens_decoder()
        self.special_token_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        kinds = decoder_kinds(backend)
        self.byte_level = "ByteLevel" in kinds
        self._byte_fallback = "ByteFallback" in kinds
        self.prepend_bos = prepend_bos and bos_token_id is not None and backend.num_special_tokens_to_add(False) == 0
        self._token_bytes: dict[int, bytes] = {}
        self._anchor: tuple[int, int] | None = None

    @classmethod
    def from_directory(cls, path: str | Path) -> Tokenizer:
        """Read ``tokenizer.json`` and, where they exist, ``tokenizer_config.json``,
        ``special_tokens_map.json``, ``generation_config.json`` and ``config.json`` (for EOS ids).

        Raises :class:`TokenizerError` for files that are malformed or contradict each other.
        """
        path = Path(path)
        file = path / "tokenizer.json"
        if not file.is_file():
            raise ModelNotFoundError(
                f"{path} holds no tokenizer.json; save one with transformers' "
                "`AutoTokenizer.from_pretrained(...).save_pretrained(...)`."
            )
        backend = load_backend(file)
        settings = {**read_object(path / "special_tokens_map.json"), **read_object(path / "tokenizer_config.json")}
        _add_special_tokens(backend, settings, path)
        tokens = special_tokens(settings)
        bos, eos = (
            backend.token_to_id(tokens[name]) if name in tokens else None for name in ("bos_token", "eos_token")
        )
        generation = read_object(path / "generation_config.json")
        declared = generation if generation.get("eos_token_id") is not None else read_object(path / "config.json")
        eos_ids = _as_ids(declared.get("eos_token_id"), path) + ([] if eos is None else [eos])
        return cls(
            backend, bos_token_id=bos, eos_token_ids=eos_ids, prepend_bos=settings.get("add_bos_token") is True
        )

    @property
    def vocab_size(self) -> int:
        """Number of tokens, the added ones included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def eos_token_id(self) -> int | None:
        """The first of ``eos_token_ids``."""
        return self.eos_token_ids[0] if self.eos_token_ids else None

    def check_fits(self, num_embeddings: int) -> None:
        """Raise :class:`TokenizerError` if ids of this tokenizer have no row in the embedding.

        Tokens added on top of the vocabulary may lie outside (Gemma 3's text models keep the image
        token of their larger siblings, one past the end): a prompt that holds one is refused then.
        """
        largest = max(self.backend.get_vocab(with_added_tokens=False).values(), default=-1)
        if largest >= num_embeddings:
            raise TokenizerError(
                f"the tokenizer's vocabulary goes up to id {largest}, but the model's embedding has only "
                f"{num_embeddings} rows; tokenizer and weights do not belong together."
            )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The token ids of ``text``, with BOS and such as the model wants unless told otherwise.

        Special tokens written out in ``text`` are recognised. Raises :class:`TokenizerError` for
        text that is no valid Unicode (lone surrogates).
        """
        check_text(text)
        try:
            ids = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except Exception as error:  # the library raises plain Exception
            raise TokenizerError(f"the tokenizer failed on this text: {error}") from None
        if add_special_tokens and self.prepend_bos:
            ids.insert(0, self.bos_token_id)
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ``token_ids``; bytes that are no UTF-8 become U+FFFD, unknown ids nothing.

        Text is never "cleaned up" (spaces before punctuation stay), so that encoding it gives the
        same tokens again as often as possible.
        """
        for token_id in token_ids:
            check_token_id(token_id)
        return self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def decode_continuation(self, token_ids: Sequence[int]) -> str:
        """What ``token_ids`` add to a text that is not empty: leading spaces are kept.

        They are decoded behind a token of plain text, which is then cut off.
        """
        if self._anchor is None:
            self._anchor = self._find_anchor()
        anchor, length = self._anchor
        return self.backend.decode([anchor, *token_ids], skip_special_tokens=False)[length:]

    def token_text(self, token_id: int) -> str:
        """The text of one token within a text, for display; U+FFFD for a part of a character."""
        check_token_id(token_id)
        if self.byte_level:
            return self.token_bytes(token_id).decode("utf-8", "replace")
        return self.decode_continuation([token_id])

    def has_token(self, token_id: int) -> bool:
        """Whether the id has a token; a model's vocabulary may be padded beyond its tokenizer's."""
        check_token_id(token_id)
        return self.backend.id_to_token(token_id) is not None

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token of a byte-level vocabulary; ``b""`` for an id without a token."""
        found = self._token_bytes.get(token_id)
        if found is None:
            check_token_id(token_id)
            found = self._token_bytes[token_id] = byte_level_bytes(self.backend.id_to_token(token_id) or "")
        return found

    def byte_value(self, token_id: int) -> int | None:
        """The byte that a byte-fallback token (``<0x41>``) stands for; ``None`` for any other token."""
        if not self._byte_fallback:
            return None
        check_token_id(token_id)
        match = BYTE_TOKEN.fullmatch(self.backend.id_to_token(token_id) or "")
        return int(match[1], 16) if match else None

    def _find_anchor(self) -> tuple[int, int]:
        """A token whose text is plain wherever it stands, and the length of that text."""
        for token, token_id in self.backend.get_vocab(with_added_tokens=False).items():
            if token.isalnum() and token.isascii() and self.backend.decode([token_id]) == token:
                return token_id, len(token)
        raise TokenizerError("the tokenizer has no token of plain letters; its text cannot be decoded in pieces.")


def load_backend(file: Path) -> tokenizers.Tokenizer:
    """Read a ``tokenizer.json`` (errors: :func:`parse_backend`)."""
    size = file.stat().st_size
    if size > MAX_FILE_BYTES:
        raise TokenizerError(f"{file} has {size} bytes; the limit is {MAX_FILE_BYTES}.")
    return parse_backend(file.read_bytes(), file)


def parse_backend(data: bytes, file: Path) -> tokenizers.Tokenizer:
    """Parse a ``tokenizer.json``; every way in which that fails is a :class:`TokenizerError`."""
    try:
        return tokenizers.Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises plain Exception
        raise TokenizerError(f"{file} is not a valid tokenizer: {error}") from None
    except BaseException as error:
        # A panic of the library's Rust code is no Exception, but it is no reason to die either.
        if type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(f"{file} is not a valid tokenizer: {error}") from None


def special_tokens(settings: Mapping) -> dict[str, str]:
    """The special tokens a configuration names, e.g. ``{"bos_token": "<s>"}``.

    Values are strings, or objects with the string under ``content``.
    """
    found = {}
    for name in SPECIAL_TOKEN_NAMES:
        value = settings.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            found[name] = value
    return found


def check_text(text: str) -> None:
    """Raise :class:`TokenizerError` for what is no text, or has no UTF-8 form."""
    if not isinstance(text, str):
        raise TokenizerError(f"a {type(text).__name__} is not text; a str is needed.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"the text is not valid Unicode: lone surrogate U+{ord(text[error.start]):04X} at position {error.start}. "
            "Decode bytes with errors='replace' before passing them."
        ) from None


def _add_special_tokens(backend: tokenizers.Tokenizer, settings: dict, path: Path) -> None:
    """Mark as special what the configuration files call special.

    ``tokenizer.json`` usually says so itself; in older checkpoints only the other files do.
    """
    declared = settings.get("added_tokens_decoder") or {}
    if not isinstance(declared, dict):
        raise TokenizerError(f"{path}: added_tokens_decoder is a {type(declared).__name__}; it must be an object.")
    try:
        added = sorted((int(key), dict(value)) for key, value in declared.items())
    except (TypeError, ValueError):
        raise TokenizerError(f"{path}: added_tokens_decoder must map token ids to objects.") from None
    known = backend.get_added_tokens_decoder()
    for token_id, fields in added:
        content = fields.get("content")
        if not isinstance(content, str) or not content:
            raise TokenizerError(f"{path}: added token {token_id} has no content.")
        special = fields.get("special") is True
        if token_id in known and (known[token_id].special or not special):
            continue
        flags = {key: fields[key] is True for key in ("lstrip", "rstrip", "single_word", "normalized") if key in fields}
        token = tokenizers.AddedToken(content, special=special, **flags)
        (backend.add_special_tokens if special else backend.add_tokens)([token])
        if backend.token_to_id(content) != token_id:
            raise TokenizerError(
                f"{path}: added token {content!r} is declared with id {token_id}, "
                f"but tokenizer.json gives it id {backend.token_to_id(content)}."
            )
    marked = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    additional = settings.get("additional_special_tokens") or []
    named = [*special_tokens(settings).values(), *(token for token in additional if isinstance(token, str))]
    for content in named:
        if content not in marked and backend.token_to_id(content) is not None:
            backend.add_special_tokens([tokenizers.AddedToken(content, special=True, normalized=False)])


def _as_ids(value, path: Path) -> list[int]:
    """``eos_token_id`` of a configuration file: absent, one id, or a list."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise TokenizerError(f"{path}: eos_token_id is {value!r}; it must be a token id or a list of them.")
    return ids
