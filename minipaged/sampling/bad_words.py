"""Forbidden words as token sequences."""

from __future__ import annotations

from minipaged.errors import InvalidParameterError


def tokenize_bad_words(words: list[str], tokenizer) -> list[tuple[int, ...]]:
    """The token sequences to forbid for each word, at the start of a text and after a space.

    As vLLM, the word is tokenised without and with a leading space. vLLM keeps the second sequence
    only where both have the same length, so that a word whose two spellings differ in length
    slips through after a space; here it is kept unless the first already covers it.

    Args:
        words: the strings that must not be generated.
        tokenizer: has ``encode(text, add_special_tokens=False) -> list[int]``.

    Raises:
        InvalidParameterError: a word has nothing but white space, or no tokens.
    """
    sequences = []
    for word in words:
        bare_word = word.lstrip()
        bare = tuple(tokenizer.encode(bare_word, add_special_tokens=False)) if bare_word else ()
        if not bare:
            raise InvalidParameterError(f"bad_words holds {word!r}, which has no tokens of its own; remove it.")
        sequences.append(bare)
        spaced = tuple(tokenizer.encode(" " + bare_word, add_special_tokens=False))
        if spaced[-len(bare) :] != bare:
            sequences.append(spaced)
    return sequences
