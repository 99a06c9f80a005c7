"""What the mutation sweep launches besides a kernel's example: guards that one launch does not exercise.

The kernels are those of ``examples.py`` in the small sizes, to the last instruction; shapes and values differ:

    attention   rows in all of a tile, windows, full blocks, several chunks, logits that only the maximum tames
    product     several tiles of tokens; a NaN in the one row that stands in for what lies outside x
    moe         ties, many tokens, counts that leave every remainder of an unrolled loop
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from cuda_kernels.toolchain.examples import LONG, SMALL, Example, Sizes, example

NAN_F16 = 0x7E00
WINDOW = 9


def cases(name: str, cc: tuple[int, int]) -> Iterator[Example]:
    """Launches of the kernel of ``example(name, SMALL, cc)``, that one first."""
    yield example(name, SMALL, cc)
    if name.startswith("attention_"):
        yield from _attention(name, cc)
    elif name.startswith("product_") and name != "product_plain":
        yield from _product(name, cc)
    elif name.startswith("moe_"):
        for tokens in (33, 75, 101):
            subject = example(name, replace(SMALL, queries=(tokens,)), cc)
            yield subject
        if name == "moe_route":
            yield replace(subject, arguments=(_ties(*subject.arguments[0].shape), *subject.arguments[1:]))


def _attention(name: str, cc) -> Iterator[Example]:
    def sized(queries: tuple, contexts: tuple) -> Example:
        base: Sizes = LONG if name in ("attention_decode_split", "attention_reduce") else SMALL
        return example(name, replace(base, queries=queries, contexts=contexts), cc)

    rows = sized((21,), (85,))
    yield rows
    if name != "attention_reduce":
        loud, windowed = list(rows.arguments), list(rows.arguments)
        loud[0] = (60 * loud[0].view(np.float16)).view(np.uint16)
        windowed[-2] = WINDOW
        yield replace(rows, arguments=tuple(loud))
        yield replace(rows, arguments=tuple(windowed))
    yield sized((1, 3), (48, 80))  # of 16, and so of 4: the last block is full
    yield sized((1, 3), (44, 84))  # of 4: that block elsewhere in a loop unrolled by eight keys
    chunks = sized((5, 1), (640, 1040))
    yield chunks
    if name == "attention_reduce":
        yield replace(chunks, arguments=(200 * chunks.arguments[0], *chunks.arguments[1:]))


def _product(name: str, cc) -> Iterator[Example]:
    for tokens in (11, 19):
        subject = example(name, replace(SMALL, queries=(tokens,)), cc)
        yield subject
    x = subject.arguments[0].copy()
    x[0, :8] = NAN_F16
    yield replace(subject, arguments=(x, *subject.arguments[1:]))


def _ties(num_tokens: int, num_experts: int) -> np.ndarray:
    """Logits whose largest are equal in lanes 1 to 16 apart, in each of the four rounds of choosing."""
    logits, experts = np.zeros((num_tokens, num_experts), np.float32), num_experts - 16
    for token, row in enumerate(logits):
        first, apart = 7 * token, 1 << token % 5
        if token // 5 % 2:
            row[(first + 3) % experts] = 10
        for start, value in ((first, 9), (first + 5, 8)):
            row[[start % experts, start % experts + apart]] = value
    return logits
