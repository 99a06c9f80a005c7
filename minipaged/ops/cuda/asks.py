"""Asks about logits (:mod:`minipaged.ops.sampling`) as the kernels read them, and cut into turns that fit.

The fields of a turn of A asks are those of ``cuda_kernels/processors.py``, ``sample.py`` and ``logprobs.py``::

    reals, integers      [A, 3] float64, [A, 5] int64      how to draw
    rows, starts, masks  [A], [A, 8], [A, 2] int32         what to do to the logits before; lists are in ``words``
    penalties            [A, 3] float32
    facts                [A, 4] int32                      which log-probabilities to tell
    words                [n] int32                         token ids, numbers and bits
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from minipaged.ops.sampling import MAX_TOP, Ask, Edits

FIELDS = {
    "reals": ("f8", 3),
    "integers": ("i8", 5),
    "rows": ("i4", 1),
    "starts": ("i4", 8),
    "masks": ("i4", 2),
    "penalties": ("f4", 3),
    "facts": ("i4", 4),
}
"""Type, and elements of an ask, of each field but ``words``."""


def max_words(vocab_size: int) -> int:
    """Room for the words of a turn: for the most that one ask may have, or a little of many asks."""
    return 8 * vocab_size + (1 << 16)


@dataclass(frozen=True)
class Turn:
    """Some asks about neighbouring rows: those of ``asks`` from ``begin`` to ``end``, about ``num_rows`` rows from
    ``first_row`` on."""

    begin: int
    end: int
    first_row: int
    num_rows: int


def turns(asks: Sequence[Ask], size: int, num_words: int) -> Iterator[Turn]:
    """Cut asks, in the order of their rows, into turns of at most ``size`` rows and asks, and ``num_words`` words."""
    begin, words = 0, 0
    for number, ask in enumerate(asks):
        more = ask.draw.edits.num_words if ask.draw is not None and ask.draw.edits is not None else 0
        full = ask.row - asks[begin].row >= size or number - begin >= size or words + more > num_words
        if full and number > begin:
            yield _turn(asks, begin, number)
            begin, words = number, 0
        words += more
    if asks:
        yield _turn(asks, begin, len(asks))


def _turn(asks: Sequence[Ask], begin: int, end: int) -> Turn:
    first = asks[begin].row
    return Turn(begin, end, first, asks[end - 1].row - first + 1)


@dataclass
class Packed:
    """A turn's ``fields`` by name and its ``words``; which of the kernels it needs: ``edited`` (logits are
    processed), ``drawn`` (tokens are), ``told`` (log-probabilities are); ``num_top``: entries of ``top``."""

    fields: dict[str, np.ndarray]
    words: np.ndarray
    edited: bool
    drawn: bool
    told: bool
    num_top: int


def pack(asks: Sequence[Ask], first_row: int, num_slots: int, words_end: int) -> Packed:
    """The fields of ``asks``, rows counted from ``first_row``; slots up to ``num_slots`` beyond them ask nothing.

    The words are for the end of a piece of memory of ``words_end`` words.
    """
    fields = {name: np.zeros((num_slots, count), kind) for name, (kind, count) in FIELDS.items()}
    fields["integers"][:, 3] = fields["facts"][:, 0] = -1
    fields["starts"][:] = fields["masks"][:] = -1
    pieces: list[np.ndarray] = []
    size, drawn, num_top = 0, False, 0
    for slot, ask in enumerate(asks):
        row = ask.row - first_row
        draw = ask.draw
        if draw is not None:
            drawn = True
            edited = draw.edits is not None
            fields["reals"][slot] = draw.temperature, draw.top_p, draw.min_p
            seed = draw.seed - (1 << 64) if draw.seed >> 63 else draw.seed
            fields["integers"][slot] = seed, draw.position, draw.top_k, row, edited
            if edited:
                fields["rows"][slot] = row
                size = _pack_edits(draw.edits, slot, fields, pieces, size)
        if ask.num_top >= 0:
            assert ask.num_top <= MAX_TOP, ask.num_top
            fields["facts"][slot] = row, ask.about, ask.num_top, num_top
            num_top += ask.num_top
    base = words_end - size
    edited = fields["starts"][:, 0] >= 0
    fields["starts"][edited] += base
    fields["masks"][fields["masks"][:, 0] >= 0, 0] += base
    words = np.concatenate(pieces) if pieces else np.zeros(0, np.int32)
    told = bool((fields["facts"][:, 0] >= 0).any())
    return Packed(fields, words, bool(edited.any()), drawn, told, num_top)


def _pack_edits(edits: Edits, slot: int, fields: dict, pieces: list[np.ndarray], size: int) -> int:
    """Add one ask's lists to ``pieces``, which hold ``size`` words so far; returns how many then."""
    starts = fields["starts"][slot]
    masked = np.unique(np.concatenate(edits.masked)) if edits.masked else None
    lists = (edits.allowed, None), (masked, None), (edits.biased, edits.bias), (edits.seen, edits.counts)
    for number, (ids, values) in enumerate(lists):
        count = 0 if ids is None else len(ids)
        starts[2 * number : 2 * number + 2] = size, size + count
        if count:
            pieces.append(np.asarray(ids, np.int32))
            if values is not None:
                pieces.append(np.asarray(values, np.float32).view(np.int32))
                size += count
        size += count
    fields["penalties"][slot] = edits.penalties
    if edits.bits is not None:
        words = np.zeros(-(-len(edits.bits) // 4), np.int32)
        words.view(np.uint8)[: len(edits.bits)] = edits.bits
        fields["masks"][slot] = size, edits.ended
        pieces.append(words)
        size += len(words)
    return size
