"""A tokenizer rebuilt from a GGUF file's metadata.

Two kinds of vocabulary are stored (``tokenizer.ggml.model``): ``gpt2``, byte-level BPE with its
merges and the name of a pre-tokenizer, and ``llama``, SentencePiece BPE with a score for each piece
and tokens for single bytes.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from minipaged.errors import TokenizerError, UnsupportedModelError

# Values of tokenizer.ggml.token_type.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
MAX_TOKENS = 1 << 21
MAX_TOKEN_CHARACTERS = 1 << 12

# Tokens that end a turn. Older files name only one end of sequence in their metadata; llama.cpp
# recognises the others by their text, and so does this.
TURN_ENDS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")

KEEP_SPACE = ("<unk>", "<s>", "<|endoftext|>")  # of Phi-3's control tokens

_LETTERS_AND_DIGITS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_PATTERN = _LETTERS_AND_DIGITS % "{1,3}"
_QWEN2_PATTERN = _LETTERS_AND_DIGITS % ""
# Words are also split where lower case is followed by upper case.
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s|"
    r"\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT4O_PATTERN = _CASED % (_CONTRACTION, _CONTRACTION, "{1,3}")
_TEKKEN_PATTERN = _CASED % ("", "", "")


def _split_by(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _digits_then_gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


# tokenizer.ggml.pre -> pre-tokenizer, as in Hugging Face's tokenizer.json of those models.
PRE_TOKENIZERS = {
    "gpt-2": _gpt2,
    "smollm": _digits_then_gpt2,
    "starcoder": _digits_then_gpt2,
    "refact": _digits_then_gpt2,
    "command-r": _digits_then_gpt2,
    "llama-bpe": lambda: _split_by(_LLAMA3_PATTERN),
    "llama3": lambda: _split_by(_LLAMA3_PATTERN),
    "llama-v3": lambda: _split_by(_LLAMA3_PATTERN),
    "dbrx": lambda: _split_by(_LLAMA3_PATTERN),
    "smaug-bpe": lambda: _split_by(_LLAMA3_PATTERN),
    "qwen2": lambda: _split_by(_QWEN2_PATTERN),
    "deepseek-r1-qwen": lambda: _split_by(_QWEN2_PATTERN),
    "gpt-4o": lambda: _split_by(_GPT4O_PATTERN),
    "tekken": lambda: _split_by(_TEKKEN_PATTERN),
}
BEGIN_WITH_BOS = ("llama-bpe", "llama3", "llama-v3", "tekken")  # unless add_bos_token says otherwise
WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "tekken")  # a word that is a token needs no merges
NFC = ("qwen2", "deepseek-r1-qwen")


class GGUFVocabulary:
    """Tokens, their types and special ids, checked; :meth:`build` makes the tokenizer.

    Raises :class:`TokenizerError` for metadata that is missing or contradicts itself,
    :class:`UnsupportedModelError` for kinds of vocabulary that are not known.
    """

    def __init__(self, metadata: Mapping[str, object]):
        self.metadata = metadata
        self.model = self._get("model", str)
        if self.model not in ("gpt2", "llama"):
            raise UnsupportedModelError(
                f"tokenizer {self.model!r} is not supported; GGUF files may have 'gpt2' (byte-level BPE) or "
                "'llama' (SentencePiece)."
            )
        self.pre = self._get("pre", str, "default") if self.model == "gpt2" else ""
        # Files made before pre-tokenizers were named say nothing. GPT-2's is taken, as transformers does.
        self.pre = "gpt-2" if self.pre == "default" else self.pre
        if self.model == "gpt2" and self.pre not in PRE_TOKENIZERS:
            raise UnsupportedModelError(
                f"pre-tokenizer {self.pre!r} is not supported; supported: {', '.join(PRE_TOKENIZERS)}."
            )
        self.tokens = self._token_texts()
        self.types = self._numbers("token_type", "iu")
        self.bos_token_id = self._special_id("bos_token_id")
        self.eos_token_ids = self._end_ids()

    def special_tokens(self) -> dict[str, str]:
        """The texts of BOS and such, as chat templates name them (``bos_token``)."""
        names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
        ids = {name: self._special_id(f"{key}_token_id") for key, name in names.items()}
        return {f"{name}_token": self.tokens[id_] for name, id_ in ids.items() if id_ is not None}

    def build(self) -> Tokenizer:
        """The tokenizer, with special tokens marked and BOS (or EOS) added where the model wants it."""
        try:
            tokenizer = self._byte_level() if self.model == "gpt2" else self._sentencepiece()
            tokenizer.add_special_tokens(self._added(special=True))
            tokenizer.add_tokens(self._added(special=False))
            self._add_bos_and_eos(tokenizer)
        except TokenizerError:
            raise
        except BaseException as error:
            # The library raises plain Exception; a panic of its Rust code is not even that.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise TokenizerError(f"the vocabulary in the GGUF file is not usable: {error}") from None
        if tokenizer.get_vocab_size() != len(self.tokens):
            raise TokenizerError(
                f"{len(self.tokens)} tokens became a vocabulary of {tokenizer.get_vocab_size()}; some appear twice."
            )
        return tokenizer

    def _byte_level(self) -> Tokenizer:
        merges = [tuple(merge.split(" ", 1)) for merge in self._get("merges", list)]
        if any(len(merge) != 2 for merge in merges):
            raise TokenizerError("an entry of tokenizer.ggml.merges is not two tokens with a space between them.")
        tokenizer = Tokenizer(BPE(self._vocab(), merges, ignore_merges=self.pre in WHOLE_WORDS))
        if self.pre in NFC:
            tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = PRE_TOKENIZERS[self.pre]()
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer

    def _sentencepiece(self) -> Tokenizer:
        vocab = self._vocab()
        unknown = self._special_id("unknown_token_id")
        tokenizer = Tokenizer(
            BPE(
                vocab,
                self._merges_by_score(vocab),
                unk_token=None if unknown is None else self.tokens[unknown],
                fuse_unk=True,
                byte_fallback=True,
            )
        )
        space = normalizers.Replace(" ", "▁")
        if self._flag("add_space_prefix", True):
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space])
            strip = [decoders.Strip(" ", 1, 0)]
        else:
            tokenizer.normalizer = space
            strip = []
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
        )
        return tokenizer

    def _merges_by_score(self, vocab: dict[str, int]) -> list[tuple[str, str]]:
        """SentencePiece joins the pair whose result has the best score. So the merges are all ways
        to split a piece into two, best piece first (as in transformers' ``SentencePieceExtractor``)."""
        scores = self._numbers("scores", "f")
        if not np.isfinite(scores).all():
            raise TokenizerError("tokenizer.ggml.scores holds NaN or infinite values.")
        tokens, merges = self.tokens, []
        best_first = np.argsort(-scores, kind="stable")
        for id_ in best_first[self.types[best_first] == NORMAL].tolist():
            piece, splits = tokens[id_], []
            for i in range(1, len(piece)):  # the innermost of millions of steps
                left = vocab.get(piece[:i])
                if left is not None:
                    right = vocab.get(piece[i:])
                    if right is not None:
                        splits.append((left, right))
            splits.sort()
            merges += [(tokens[left], tokens[right]) for left, right in splits]
        return merges

    def _vocab(self) -> dict[str, int]:
        vocab = {token: id_ for id_, token in enumerate(self.tokens)}
        if len(vocab) != len(self.tokens):
            twice = next(token for id_, token in enumerate(self.tokens) if vocab[token] != id_)
            raise TokenizerError(f"token {twice!r} appears twice in the vocabulary.")
        return vocab

    def _added(self, special: bool) -> list[AddedToken]:
        """Tokens that are found in text before anything else: control tokens, and those "user defined".

        SentencePiece looks for the latter in normalised text, where "▁" is a space. Where the
        normaliser also puts a space in front, it cannot be applied to tokens. Phi-3's control tokens
        swallow the white space behind them, which no key of the metadata says.
        """
        wanted = (CONTROL, UNKNOWN) if special else (USER_DEFINED,)
        normalized = not special and self.model == "llama" and not self._flag("add_space_prefix", True)
        swallow = special and self.model == "llama" and self.metadata.get("general.architecture") == "phi3"
        return [
            AddedToken(token, special=special, normalized=normalized, rstrip=swallow and token not in KEEP_SPACE)
            for token, type_ in zip(self.tokens, self.types.tolist(), strict=True)
            if type_ in wanted and token
        ]

    def _add_bos_and_eos(self, tokenizer: Tokenizer) -> None:
        bos = self.bos_token_id
        eos = self._special_id("eos_token_id")
        if not self._flag("add_bos_token", self.model == "llama" or self.pre in BEGIN_WITH_BOS):
            bos = None
        if not self._flag("add_eos_token", False):
            eos = None
        if bos is None and eos is None:
            return
        first = [] if bos is None else [self.tokens[bos]]
        last = [] if eos is None else [self.tokens[eos]]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*first, "$A", *last],
            special_tokens=[(self.tokens[id_], id_) for id_ in dict.fromkeys((bos, eos)) if id_ is not None],
        )

    def _end_ids(self) -> list[int]:
        named = [self._special_id(f"{name}_token_id") for name in ("eos", "eot", "eom")]
        special = np.flatnonzero(np.isin(self.types, (CONTROL, USER_DEFINED)))
        by_text = [id_ for id_ in special.tolist() if self.tokens[id_] in TURN_ENDS]
        return list(dict.fromkeys(id_ for id_ in named + by_text if id_ is not None))

    def _special_id(self, name: str) -> int | None:
        value = self.metadata.get(f"tokenizer.ggml.{name}")
        if value is None:
            return None
        if type(value) is not int or not 0 <= value < len(self.tokens):
            raise TokenizerError(
                f"metadata tokenizer.ggml.{name} is {value!r}; it must be a token id below {len(self.tokens)}."
            )
        return value

    def _token_texts(self) -> list[str]:
        tokens = self._get("tokens", list)
        if not 0 < len(tokens) <= MAX_TOKENS:
            raise TokenizerError(f"the vocabulary has {len(tokens)} tokens; it must have 1 to {MAX_TOKENS}.")
        longest = max(map(len, tokens))
        if longest > MAX_TOKEN_CHARACTERS:
            raise TokenizerError(f"a token has {longest} characters; the limit is {MAX_TOKEN_CHARACTERS}.")
        return tokens

    def _numbers(self, name: str, kinds: str) -> np.ndarray:
        """An array with one number a token."""
        values = self._get(name, np.ndarray)
        if values.dtype.kind not in kinds or len(values) != len(self.tokens):
            raise TokenizerError(
                f"metadata tokenizer.ggml.{name} has {len(values)} values of type {values.dtype}, "
                f"for {len(self.tokens)} tokens."
            )
        return values

    def _flag(self, name: str, default: bool) -> bool:
        return self._get(name, bool, default)

    def _get(self, name: str, type_: type, default=None):
        value = self.metadata.get(f"tokenizer.ggml.{name}", default)
        if not isinstance(value, type_):
            shown = "missing" if value is None else f"a {type(value).__name__}"
            raise TokenizerError(f"metadata tokenizer.ggml.{name} is {shown}; it must be a {type_.__name__}.")
        return value
