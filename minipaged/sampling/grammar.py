"""Structured output: only tokens that a grammar allows may be generated.

A grammar is compiled once, to a matcher over the bytes of text (llguidance's; it walks a derivative-based
lexer and an Earley parser over a trie of the vocabulary). Before each draw it gives one bit a token, and the
tokens without are masked in one pass over the row:

    {"name": "J            may follow        o  "  oh  \\n …      never follows     }  <raw newline>  an end
    ─────────────▶ matcher ─────────▶ 1 1 1 1 …        0 0 0 …  ─────▶ row[bit == 0] = -inf

A greedy draw needs no mask while the likeliest token may follow anyway, which is much cheaper to find out; nor does
a sampled one while what is drawn from all tokens may (``rejection.py``).

Where the grammar is complete, the end-of-sequence tokens are allowed; where nothing else can follow, they alone
are. So a text that ends by itself conforms to the grammar, and one cut off by ``max_tokens`` is the beginning of
one that does. A mask depends on the sequence's own tokens alone, so the equivalence law holds.
"""

from __future__ import annotations

import functools
import json
import threading

import numpy as np

from minipaged.errors import InvalidParameterError
from minipaged.ops.sampling import Edits
from minipaged.sampling.masks import mask_row
from minipaged.sampling.processors import LogitsProcessor

WHITESPACE = "[ ]?"
"""Between JSON's tokens at most one space. Unbounded white space, which JSON allows, is where a model that has
lost its way goes in circles; a schema may choose otherwise with ``"x-guidance": {"whitespace_pattern": ...}``."""
CACHED_GRAMMARS = 32
NONE = -1  # instead of a token
_CHARACTER = r'[^"\\\x00-\x1F\x7F]'
_SLICES = [r"[\x20\x0A\x0D\x09]+", *(f"{_CHARACTER}{{1,{most}}}" for most in (10, 12, 15, 30)), f"{_CHARACTER}+"]
"""Sets of tokens, each a regular expression, that llguidance allows as a whole where it sees that all of them may
follow: its own, for strings in JSON, and two more lengths. A tenth of a vocabulary has 11 to 15 characters, and was
looked at one by one wherever a string has a longest length."""


class GrammarCompiler:
    """Compiles what ``SamplingParams.structured_outputs`` asks for; may be called from any thread.

    Args:
        tokenizer: the model's; has ``backend`` (a ``tokenizers.Tokenizer``) and ``vocab_size``.
        vocab_size: number of logits in a row.
        eos_token_ids: tokens that end a text; at least one must lie inside the vocabulary.
    """

    def __init__(self, tokenizer, vocab_size: int, eos_token_ids: tuple[int, ...]):
        self._vocab_size = vocab_size
        self._eos_token_ids = [token_id for token_id in eos_token_ids if 0 <= token_id < vocab_size]
        vocabulary = _Vocabulary(tokenizer, vocab_size, self._eos_token_ids)
        # Of the same grammar a matcher is made once. (A method of this object would hold it, and so the tokenizer, in
        # a circle: memory that goes only when the garbage collector comes by.)
        self._matcher = functools.lru_cache(CACHED_GRAMMARS)(vocabulary.matcher)

    def compile(self, structured_outputs: dict) -> Grammar:
        """A processor at the beginning of the grammar that ``structured_outputs`` (checked) asks for.

        Raises:
            InvalidParameterError: the grammar is malformed, too large or uses what is not supported, the
                model has no end-of-sequence token, or llguidance is not installed.
        """
        ((kind, value),) = structured_outputs.items()
        text = value if isinstance(value, str) else json.dumps(value)
        return Grammar(self._matcher(kind, text).deep_copy(), self._vocab_size, self._eos_token_ids)


class _Vocabulary:
    """The tokens' bytes as llguidance wants them, and matchers over them."""

    def __init__(self, tokenizer, vocab_size: int, eos_token_ids: list[int]):
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._lock = threading.Lock()

    def matcher(self, kind: str, text: str):
        """A fresh matcher."""
        llguidance = _import_llguidance()
        try:
            grammar = _BUILD[kind](llguidance.LLMatcher, text)
        except Exception as error:  # the library raises plain Exception
            raise _refused(kind, error) from None
        with self._lock:
            tokens = self._tokens
        matcher = llguidance.LLMatcher(tokens, grammar, log_level=0)
        if matcher.is_error():
            raise _refused(kind, matcher.get_error())
        return matcher

    @functools.cached_property
    def _tokens(self):
        """Read from the tokenizer the first time (half a second)."""
        if not self._eos_token_ids:
            raise InvalidParameterError(
                "structured_outputs cannot be used with this model: it names no end-of-sequence token, "
                "with which a text that is complete would end."
            )
        try:
            return _import_llguidance().LLTokenizer(
                self._tokenizer.backend.to_str(),
                n_vocab=max(self._vocab_size, self._tokenizer.vocab_size),
                eos_token=self._eos_token_ids,
                slices=_SLICES,
            )
        except ValueError as error:
            raise InvalidParameterError(
                f"structured_outputs cannot be used with this model: llguidance does not read its tokenizer ({error})."
            ) from None


class Grammar(LogitsProcessor):
    """Masks the tokens that cannot follow; applied last, so that an ended grammar ends the text.

    Args:
        matcher: an ``llguidance.LLMatcher`` of one's own.
        vocab_size: number of logits in a row.
        eos_token_ids: those inside the vocabulary.
    """

    judges = True

    def __init__(self, matcher, vocab_size: int, eos_token_ids: list[int]):
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._eos_token_ids = np.unique(np.array(eos_token_ids, dtype=np.int64))
        # What may follow, once it has been asked for: the only token, or NONE; and all.
        self._forced: int | None = None
        self._bits: np.ndarray | None = None
        # Tokens after the end of the grammar, or that it forbids (a draft's): known, but not consumed.
        self._num_outside = 0

    @property
    def complete(self) -> bool:
        """Whether the text so far conforms to the grammar."""
        return not self._num_outside and self._matcher.is_accepting()

    def apply(self, row: np.ndarray, output_token_ids: list[int]) -> None:
        if self._ended():
            row.fill(-np.inf)
            row[self._eos_token_ids] = 0  # even if min_tokens wants more: there is no more to say
            return
        mask_row(row, self._allowed_bits(), row)

    def prepare(self) -> None:
        if self.forced() is None:
            self.allowed_bits()

    def forced(self) -> int | None:
        if self._forced is None:
            # None has been looked for after the end or an error.
            is_open = not self._num_outside and not self._matcher.is_stopped()
            # The first of the bytes that are certain. These are found soon, but what a tokenizer makes of them is not.
            tokens = self._matcher.compute_ff_tokens() if is_open and self._matcher.compute_ff_bytes() else ()
            self._forced = tokens[0] if tokens and tokens[0] < self._vocab_size else NONE
        return None if self._forced == NONE else self._forced

    def allowed_bits(self) -> np.ndarray | None:
        return None if self._ended() else self._allowed_bits()

    def describe(self, edits: Edits, output_token_ids: list[int]) -> bool:
        edits.ended = self._ended()
        if edits.ended:
            allowed = np.zeros(self._vocab_size, dtype=bool)
            allowed[self._eos_token_ids] = True
            edits.bits = np.packbits(allowed, bitorder="little")
        else:
            edits.bits = self._allowed_bits()
        return True

    def spares(self, token_id: int) -> bool:
        """Whether the token may follow: the likeliest that may is what a greedy draw is for.

        Where the next bytes are certain, a mask leaves only the token that the tokenizer itself would take
        for them; this also takes a shorter one.
        """
        return not self._num_outside and bool(self._matcher.validate_tokens([token_id]))

    def allows(self, token_id: int) -> bool:
        """Whether the mask has the token."""
        return self.spares(token_id) and self.forced() in (None, token_id)

    def _ended(self) -> bool:
        return not self._num_outside and self._matcher.is_stopped() and not self._matcher.is_error()

    def _allowed_bits(self) -> np.ndarray:
        """A bit for each token that may follow, lowest first; uint8 ``[vocab_size / 8]``, rounded up.

        None is set after a token that the grammar forbids, or if matching ran into a limit of the parser
        (which itself would then allow the end). The sampler fails such a request.
        """
        if self._bits is None:
            size = -(-self._vocab_size // 8)
            bits = b"" if self._num_outside else self._matcher.compute_bitmask()
            if not bits or self._matcher.is_error():
                bits = bytes(size)
            self._bits = np.frombuffer(bits, dtype=np.uint8, count=size)
        return self._bits

    def append(self, token_id: int) -> None:
        self._forced = self._bits = None
        if self._num_outside or not self._matcher.try_consume_tokens([token_id]):
            self._num_outside += 1

    def undo(self, token_id: int) -> None:
        self._forced = self._bits = None
        if self._num_outside:
            self._num_outside -= 1
        else:
            self._matcher.rollback(1)

    def fork(self) -> Grammar:
        twin = Grammar(self._matcher.deep_copy(), self._vocab_size, self._eos_token_ids)
        twin._num_outside = self._num_outside
        return twin


def _json_schema(matcher, text: str) -> str:
    return matcher.grammar_from_json_schema(text, defaults={"whitespace_pattern": WHITESPACE})


def _choice(matcher, text: str) -> str:
    return matcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, json.loads(text))))


def _ebnf(matcher, text: str) -> str:
    """Lark's notation, or that of GGML (``root ::= ...``), which is translated to it."""
    if "::=" in text:
        from llguidance.gbnf_to_lark import gbnf_to_lark

        text = gbnf_to_lark(text)
    return matcher.grammar_from_lark(text)


_BUILD = {
    "json": _json_schema,
    "json_object": lambda matcher, text: _json_schema(matcher, '{"type": "object"}'),
    "regex": lambda matcher, text: matcher.grammar_from_regex(text),
    "choice": _choice,
    "grammar": _ebnf,
}


def _import_llguidance():
    try:
        import llguidance
    except ImportError:
        raise InvalidParameterError(
            "structured_outputs needs the package llguidance; install it with: pip install 'minipaged[grammar]'"
        ) from None
    return llguidance


def _refused(kind: str, reason) -> InvalidParameterError:
    return InvalidParameterError(f"structured_outputs[{kind!r}] is not a grammar that can be used: {reason}")
