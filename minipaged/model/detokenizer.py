"""Token ids to text, one token at a time, with the same result as decoding them all at once.

A token need not hold whole characters: byte-level BPE splits UTF-8 anywhere, SentencePiece falls
back to one token a byte. Text that ends inside a character must wait for the rest of it. Asking the
decoder again for the whole text at each token would cost O(n^2); both decoders below look at a
token once, plus what is still waiting.
"""

from __future__ import annotations

import codecs
import copy
import json
import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import islice
from numbers import Integral
from typing import TYPE_CHECKING

from minipaged.errors import TokenizerError, TokenRangeError

if TYPE_CHECKING:
    from minipaged.model.tokenizer import Tokenizer

# Decoders that turn each token into text by itself, apart from the start of the text and runs of
# byte tokens. Others (CTC, "</w>" suffixes) look ahead; no causal language model we run uses them.
LOCAL_DECODERS = {"ByteLevel", "Replace", "ByteFallback", "Fuse", "Strip", "Metaspace", "WordPiece"}
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class IncrementalDetokenizer:
    """The text of output tokens as a continuation of the prompt.

    The pieces that ``append`` returns, and then ``flush``, add up to exactly
    ``tokenizer.decode(token_ids)`` without a prompt; after a prompt, to what the output adds to
    the decoded prompt (so a SentencePiece word keeps its leading space). A piece never ends inside
    a character: U+FFFD appears only for bytes that are no UTF-8 whatever follows them.

    Args:
        tokenizer: whose ids these are.
        prompt_token_ids: the tokens before the first output token; only the last few are looked at.
        skip_special_tokens: special tokens give no text.
    """

    __slots__ = ("_special", "_text")

    def __init__(
        self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int] = (), skip_special_tokens: bool = True
    ):
        self._special = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._text = _ByteLevelText(tokenizer) if tokenizer.byte_level else _PieceText(tokenizer)
        visible = (token_id for token_id in reversed(prompt_token_ids) if token_id not in self._special)
        self._text.start_after(list(islice(visible, 4))[::-1])

    def append(self, token_ids: Sequence[int]) -> str:
        """The text that became certain with these tokens; often that of one token, maybe ``""``."""
        return "".join(map(self.push, token_ids))

    def push(self, token_id: int) -> str:
        """As :meth:`append`, of one token."""
        return "" if token_id in self._special else self._text.push(token_id)

    def flush(self) -> str:
        """The text still held back, now that no token will follow."""
        return self._text.flush()

    def fork(self) -> IncrementalDetokenizer:
        """A copy that goes its own way from here."""
        twin = copy.copy(self)
        twin._text = self._text.fork()
        return twin


class _ByteLevelText:
    """Byte-level BPE: every token is a string of bytes, and the text is their UTF-8 decoding."""

    __slots__ = ("_bytes", "_waiting")

    def __init__(self, tokenizer: Tokenizer):
        self._bytes = tokenizer.token_bytes
        self._waiting = b""  # the beginning of a character

    def start_after(self, prompt_tail: list[int]) -> None:
        # At most 3 bytes can wait for the rest of a character: at most the last 3 tokens matter.
        for token_id in prompt_tail:
            self.push(token_id)

    def push(self, token_id: int) -> str:
        data = self._waiting + self._bytes(token_id)
        # Like the batch decoder, "replace" gives one U+FFFD for each maximal part of a broken
        # character (Unicode standard, section 3.9).
        text, num_decoded = codecs.utf_8_decode(data, "replace")
        self._waiting = data[num_decoded:]
        return text

    def flush(self) -> str:
        waiting, self._waiting = self._waiting, b""
        return waiting.decode("utf-8", "replace")

    def fork(self) -> _ByteLevelText:
        return copy.copy(self)


class _PieceText:
    """SentencePiece and the like: tokens are pieces of text, or single bytes written ``<0x41>``.

    Only two things make a token's text depend on its neighbours. At the start of the text a leading
    space is dropped; and a run of byte tokens becomes text as a whole (one invalid byte makes each
    byte of the run a U+FFFD), so that a run has to be complete before any of it is certain.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._waiting: list[int] = []
        self._at_start = True

    def start_after(self, prompt_tail: list[int]) -> None:
        self._at_start = not self._tokenizer.decode(prompt_tail, skip_special_tokens=False)
        if self._at_start:
            self._waiting = prompt_tail
            return
        run = []
        for token_id in reversed(prompt_tail):
            value = self._tokenizer.byte_value(token_id)
            if value is None:
                break
            run.insert(0, value)
        unfinished = codecs.getincrementaldecoder("utf-8")("replace")
        unfinished.decode(bytes(run))
        num_waiting = len(unfinished.getstate()[0])
        if num_waiting:
            self._waiting = prompt_tail[-num_waiting:]

    def push(self, token_id: int) -> str:
        if not self._tokenizer.has_token(token_id):
            return ""  # the decoder drops such an id; a run of bytes goes on after it
        self._waiting.append(token_id)
        return "" if self._tokenizer.byte_value(token_id) is not None else self.flush()

    def flush(self) -> str:
        if not self._waiting:
            return ""
        if not self._at_start:
            text = self._tokenizer.decode_continuation(self._waiting)
            self._waiting = []
            return text
        # Nothing visible yet: the same tokens are asked for again until they give some text.
        text = self._tokenizer.decode(self._waiting, skip_special_tokens=False)
        if text:
            self._waiting = []
            self._at_start = False
        return text

    def fork(self) -> _PieceText:
        twin = copy.copy(self)
        twin._waiting = self._waiting.copy()
        return twin


def decoder_kinds(backend) -> set[str]:
    """The kinds of the decoder's steps, such as ``{"ByteLevel"}``; empty if there is no decoder.

    Raises :class:`TokenizerError` for a decoder whose text cannot be produced token by token.
    """
    if backend.decoder is None:
        return set()
    steps = list(_flatten(json.loads(backend.decoder.__getstate__())))
    kinds = {step["type"] for step in steps}
    unsupported = kinds - LOCAL_DECODERS
    if unsupported:
        raise TokenizerError(
            f"the tokenizer's decoder {min(unsupported)!r} is not supported; "
            f"supported are {', '.join(sorted(LOCAL_DECODERS))}."
        )
    if "ByteLevel" in kinds and not kinds <= {"ByteLevel", "Fuse"}:
        others = ", ".join(sorted(kinds - {"ByteLevel"}))
        raise TokenizerError(f"the tokenizer's decoder mixes ByteLevel with {others}, which is not supported.")
    if any(step["type"] == "Strip" and step["stop"] for step in steps):
        raise TokenizerError("the tokenizer's decoder strips text at the end of tokens, which is not supported.")
    return kinds


def _flatten(step: dict):
    if step["type"] != "Sequence":
        yield step
        return
    for inner in step["decoders"]:
        yield from _flatten(inner)


@lru_cache(maxsize=1)
def byte_of_char() -> dict[str, int]:
    """Which byte each character stands for in a byte-level vocabulary (GPT-2's ``bytes_to_unicode``).

    Printable Latin-1 stands for itself; the other 68 bytes take the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(0x100 + i): byte for i, byte in enumerate(others)})
    return table


def byte_level_bytes(token: str) -> bytes:
    """The bytes of a byte-level token; a token with other characters (an added one) is its UTF-8."""
    table = byte_of_char()
    try:
        return bytes([table[char] for char in token])
    except KeyError:
        return token.encode("utf-8")


def check_token_id(token_id: int) -> None:
    """Raise :class:`TokenRangeError` for what cannot be a token id at all."""
    if isinstance(token_id, bool) or not isinstance(token_id, Integral) or not 0 <= token_id < 2**32:
        raise TokenRangeError(f"token id {token_id!r} is not an integer from 0 to 4294967295.")
