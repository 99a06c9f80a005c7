"""What may change a row of logits before temperature: masks and biases, one class each."""

from __future__ import annotations

import numpy as np

from minipaged.ops.sampling import Edits


class LogitsProcessor:
    """Edits one request's row of logits; made at admission, told of every token.

    Only a processor that remembers something overrides :meth:`append`, :meth:`undo` and :meth:`fork`.

    ``judges``: :meth:`apply` masks tokens and does nothing else, and :meth:`allows` can say which.
    """

    judges = False

    def apply(self, row: np.ndarray, output_token_ids: list[int]) -> None:
        """Edit ``row`` (float32 ``[vocab]``) in place, given the tokens generated so far."""
        raise NotImplementedError

    def prepare(self) -> None:
        """:meth:`apply` or what stands for it comes next: what takes looking up may be looked up now, while that of
        other rows is, whose code and tables are then near."""

    def forced(self) -> int | None:
        """The one token that :meth:`apply` would leave, with its logit, where that is known before the others are
        looked at."""
        return None

    def allowed_bits(self) -> np.ndarray | None:
        """A bit for each token, lowest first, uint8 ``[vocab / 8]``, rounded up, if masking the tokens without is all
        that :meth:`apply` would do now; ``None``: it would do something else, or does not know."""
        return None

    def spares(self, token_id: int) -> bool:
        """Whether a greedy draw may take ``token_id``, the likeliest, without :meth:`apply`. It may say no without
        having looked."""
        return False

    def allows(self, token_id: int) -> bool:
        """Whether :meth:`apply` would leave a token as it is; asked of what ``judges``."""
        raise NotImplementedError

    def describe(self, edits: Edits, output_token_ids: list[int]) -> bool:
        """Add to ``edits`` what :meth:`apply` would do now, for a device that samples by itself; ``False``: that
        cannot be said so, and the row has to come to the host."""
        return False

    def append(self, token_id: int) -> None:
        """A token was generated."""

    def undo(self, token_id: int) -> None:
        """The last generated token, ``token_id``, was taken back."""

    def fork(self) -> LogitsProcessor:
        """A copy that goes its own way; one without memory is its own copy."""
        return self


class AllowedTokens(LogitsProcessor):
    """Masks all tokens but some."""

    def __init__(self, token_ids):
        self._ids = np.unique(np.asarray(token_ids, dtype=np.int64))

    def apply(self, row: np.ndarray, output_token_ids: list[int]) -> None:
        kept = row[self._ids]
        row.fill(-np.inf)
        row[self._ids] = kept

    def describe(self, edits: Edits, output_token_ids: list[int]) -> bool:
        edits.allowed = self._ids
        return True


class BadWords(LogitsProcessor):
    """Masks the last token of each forbidden sequence where the generated tokens end with the rest.

    Only generated tokens are compared, as in vLLM: a word begun by the prompt may be completed.
    """

    def __init__(self, sequences: list[tuple[int, ...]]):
        self._always = np.array([s[0] for s in sequences if len(s) == 1], dtype=np.int64)
        self._longer = [(list(s[:-1]), s[-1]) for s in sequences if len(s) > 1]

    def apply(self, row: np.ndarray, output_token_ids: list[int]) -> None:
        row[self._masked(output_token_ids)] = -np.inf

    def describe(self, edits: Edits, output_token_ids: list[int]) -> bool:
        edits.masked.append(self._masked(output_token_ids))
        return True

    def _masked(self, output_token_ids: list[int]) -> np.ndarray:
        ends = [last for prefix, last in self._longer if output_token_ids[-len(prefix) :] == prefix]
        return np.append(self._always, ends).astype(np.int64) if ends else self._always


class MinTokens(LogitsProcessor):
    """Masks end-of-sequence and stop tokens until ``min_tokens`` were generated."""

    def __init__(self, min_tokens: int, token_ids):
        self._min_tokens = min_tokens
        self._ids = np.unique(np.asarray(token_ids, dtype=np.int64))

    def apply(self, row: np.ndarray, output_token_ids: list[int]) -> None:
        if len(output_token_ids) < self._min_tokens:
            row[self._ids] = -np.inf

    def describe(self, edits: Edits, output_token_ids: list[int]) -> bool:
        if len(output_token_ids) < self._min_tokens:
            edits.masked.append(self._ids)
        return True


class LogitBias(LogitsProcessor):
    """Adds a number to the logits of some tokens; a masked token stays masked."""

    def __init__(self, bias: dict[int, float]):
        self._ids = np.array(list(bias), dtype=np.int64)
        self._values = np.array(list(bias.values()), dtype=np.float32)

    def apply(self, row: np.ndarray, output_token_ids: list[int]) -> None:
        row[self._ids] += self._values

    def describe(self, edits: Edits, output_token_ids: list[int]) -> bool:
        edits.biased, edits.bias = self._ids, self._values
        return True
