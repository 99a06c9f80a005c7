"""Prompts in every form a caller may give them, as checked token ids."""

from __future__ import annotations

import numpy as np

from minipaged.errors import RequestError, TokenRangeError
from minipaged.model.tokenizer import Tokenizer


def tokenize(prompt, tokenizer: Tokenizer, vocab_size: int) -> tuple[str | None, list[int]]:
    """The prompt's text, if it is known, and its token ids, each from 0 to ``vocab_size - 1``.

    Args:
        prompt: text, a list of token ids, or ``{"prompt_token_ids": [...]}`` / ``{"prompt": text}``.

    Raises:
        RequestError: it is none of these, or empty.
        TokenRangeError: a token id is no integer of the vocabulary.
    """
    text, token_ids = _text_and_ids(prompt, tokenizer)
    if not token_ids:
        raise RequestError("the prompt is empty; give at least one token.")
    for index, token_id in enumerate(token_ids):
        if isinstance(token_id, bool) or not isinstance(token_id, (int, np.integer)):
            raise TokenRangeError(f"prompt token {index} is {token_id!r}; token ids are integers.")
        if not 0 <= token_id < vocab_size:
            raise TokenRangeError(f"prompt token {index} is {token_id}, but the model has ids 0 to {vocab_size - 1}.")
    return text, list(map(int, token_ids))


def _text_and_ids(prompt, tokenizer: Tokenizer) -> tuple[str | None, list]:
    text, token_ids = prompt, None
    if isinstance(prompt, dict):
        if not prompt or set(prompt) - {"prompt", "prompt_token_ids"}:
            raise RequestError(
                f"a prompt given as a dict has 'prompt_token_ids' or 'prompt', not {sorted(map(str, prompt))}."
            )
        text, token_ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    elif not isinstance(prompt, str):
        text, token_ids = None, prompt
    if token_ids is None and isinstance(text, str):
        return text, tokenizer.encode(text)
    is_list = isinstance(token_ids, (list, tuple)) or (isinstance(token_ids, np.ndarray) and token_ids.ndim == 1)
    if is_list and (text is None or isinstance(text, str)):
        return text, list(token_ids)
    wrong = text if token_ids is None or is_list else token_ids
    raise RequestError(
        f"a prompt is text, a list of token ids, or {{'prompt_token_ids': [...]}}; got {type(wrong).__name__}."
    )
