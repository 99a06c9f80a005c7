"""What the mutation sweep launches besides a kernel's example: guards that one launch does not exercise.

The kernels are those of ``examples.py`` in the small sizes, to the last instruction; shapes and values differ:

    attention   rows in all of a tile, windows, full blocks, several chunks, logits that only the maximum tames
    product     several tiles of tokens; a NaN in the one row that stands in for what lies outside x
    moe         ties, many tokens, counts that leave every remainder of an unrolled loop
    sampling    rows of several turns of the block, equal logits, rows without an answer, every parameter
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
    elif name in _SAMPLING:
        yield from _SAMPLING[name](example(name, SMALL, cc))


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


def _process_logits(base: Example) -> Iterator[Example]:
    """Lists of up to six turns of the block; a draw that may have any token, one that may not; bits and none."""
    for vocab, lengths in ((1300, (700, 1, 513, 1030)), (3300, (1600, 2050, 3000, 2600))):
        rng = np.random.default_rng(vocab)
        words, starts = [np.zeros(0, np.int32)], np.zeros((3, 8), np.int32)
        for draw in range(3):
            for number, length in enumerate(lengths):
                length = 0 if (draw, number) == (0, 0) else length
                begin = sum(map(len, words))
                starts[draw, 2 * number : 2 * number + 2] = begin, begin + length
                words.append(rng.permutation(vocab)[:length].astype(np.int32))
                if number >= 2:  # what to add to each, or how often each was generated
                    words.append(rng.integers(0, 4, length).astype(np.float32).view(np.int32))
        begin = sum(map(len, words))
        words = np.concatenate([*words, rng.integers(-(2**31), 2**31, -(-vocab // 32)).astype(np.int32)])
        masks = np.array([[begin, 0], [-1, 0], [begin, 1]], np.int32)
        penalties = np.array([[0.5, 0.25, 1.5], [-1, 0.75, 0.5], [0, 0, 1]], np.float32)
        raw = rng.standard_normal((3, vocab)).astype(np.float32)
        lists = np.array([1, 0, 2], np.int32), starts, masks, penalties, words, words.view(np.float32)
        yield replace(base, grid=(3, 1, 1), arguments=(raw, np.zeros_like(raw), *lists, vocab))


def _planted(logits: np.ndarray) -> int:
    """Makes the first rows those whose likeliest token is alone, or one of two equal ones; how many rows that takes.

    Alone in each turn of the block; equal in lanes and in warps 1, 2, 4, ... apart, the lower token in the higher one.
    """
    vocab, rows = logits.shape[1], iter(logits)
    alone = [[77 + turn] for turn in range(0, vocab - 77, 512)]
    equal = [[apart * unit, 512] for unit, most in ((1, 16), (32, 8)) for apart in (1, 2, 4, 8, 16) if apart <= most]
    for tokens in alone + equal:
        next(rows)[tokens] = 9
    return len(alone + equal)


def _logprobs(base: Example) -> Iterator[Example]:
    """The likeliest anywhere, many of them equal; a token that is given, one that was drawn, none; rows not finite."""
    for vocab, k in ((1300, 20), (4900, 24), (5, 5)):
        rng = np.random.default_rng(vocab)
        logits = rng.integers(-40, 0, (30, vocab)).astype(np.float32) / 8
        for row in logits[24:27]:
            row[rng.permutation(vocab)[: 2 * k]] = rng.integers(1, k, 2 * k)[:vocab]
        logits[27, vocab - 1], logits[28, 1], logits[29, 2] = np.nan, -np.inf, np.inf
        facts = np.full((31, 4), -1, np.int32)
        facts[:30, 0], facts[:30, 2] = np.arange(30), 0
        if vocab > 512:
            facts[: _planted(logits), 2] = 1
        facts[24:27, 2] = k
        facts[:30, 3] = np.cumsum(facts[:30, 2]) - facts[:30, 2]
        facts[[24, 27, 28], 1] = 3
        token = rng.integers(0, vocab, (31, 2)).astype(np.int32)
        token[26, 0] = -1
        out = np.zeros(31), np.zeros(31, np.int32), np.zeros((facts[:30, 2].sum(), 2))
        yield replace(base, grid=(31, 1, 1), arguments=(logits, facts, token, *out, vocab))


_PARAMETERS = np.array(  # temperature, top_p, min_p, top_k
    [
        (0, 1, 0, 0),
        (1, 1, 0, 0),
        (0.7, 1, 0, 1),
        (1.3, 1, 0, 20),
        (1, 1, 0, 700),
        (0.9, 1, 0.05, 0),
        (1, 0.9, 0, 0),
        (2.5, 0.3, 0.01, 50),
        (1, 0.999, 0, 0),
        (40, 0.5, 0, 0),
    ]
)


def _greedy(base: Example) -> Example:
    """The likeliest token in each of eleven turns of the block (twice four and three), and of two equal ones."""
    logits = np.random.default_rng(16).integers(-40, 0, (20, 5300)).astype(np.float32) / 8
    draws = _planted(logits)
    integers = np.zeros((draws, 5), np.int64)
    integers[:, 3], integers[:, 4] = np.arange(draws), 1
    reals, work = np.tile([0.0, 1, 0], (draws, 1)), (np.zeros((draws, 5300), np.int32), np.zeros((draws, 5300)))
    arguments = (logits, logits.copy(), reals, integers, *work, np.zeros((draws, 2), np.int32), draws, 5300)
    return replace(base, grid=(draws, 1, 1), arguments=arguments)


def _nuclei(base: Example) -> Example:
    """All but one of many equal logits at the end of top_p, in lists of one to eleven turns of the block."""
    sizes, vocab = (5500, 4300, 2300, 1300, 700, 40), 5500
    rng, draws = np.random.default_rng(17), len(sizes)
    logits, reals = np.full((draws, vocab), -60, np.float32), np.tile([1, 0, 0.01], (draws, 1))
    for row, size in enumerate(sizes):
        places = np.sort(rng.permutation(vocab)[:size])
        logits[row, places] = rng.integers(-2, 1, size)
        counts = np.bincount(-logits[row, places].astype(int))
        weights = np.exp([0.0, -1, -2])
        reals[row, 1] = (counts[0] + (counts[1] - 1.5) * weights[1]) / (counts @ weights)
    integers = np.zeros((draws, 5), np.int64)
    integers[:, :2], integers[:, 3] = rng.integers(-(2**62), 2**62, (draws, 2)), np.arange(draws)
    work, out = (np.zeros((draws, vocab), np.int32), np.zeros((draws, vocab))), np.zeros((draws, 2), np.int32)
    arguments = (logits, logits.copy(), reals, integers, *work, out, draws, vocab)
    return replace(base, grid=(draws, 1, 1), arguments=arguments)


def _sample(base: Example) -> Iterator[Example]:
    """Every parameter on rows with many equal logits; fewer rooms than draws; rows without an answer; many chunks."""
    yield _greedy(base)
    for vocab, rooms, choices in ((37, 2, (7, 0, 6, 9, 0, 1)), (1300, 16, range(16)), (5500, 3, (1, 9, 4))):
        rng, draws = np.random.default_rng(vocab), len(choices)
        raw = (3 * rng.standard_normal((draws, vocab))).astype(np.float32)
        if vocab < 5500:  # there no two are equal, so that each of the counted moves the k-th largest
            raw = np.round(raw)
        processed = np.where(rng.random(raw.shape) < 0.3, -np.inf, raw).astype(np.float32)
        reals = _PARAMETERS[np.array(choices) % len(_PARAMETERS)]
        integers = np.zeros((draws, 5), np.int64)
        integers[:, :2], integers[:, 2] = rng.integers(-(2**62), 2**62, (draws, 2)), reals[:, 3]
        integers[:, 3], integers[:, 4] = rng.permutation(draws), np.arange(draws) % 3 == 2
        if draws == 16:
            raw[0, 700], raw[1, 5], processed[8], processed[11, 9] = np.nan, -np.inf, -np.inf, np.inf
        if rooms < draws:
            integers[1, 3] = -1
        work = np.zeros((rooms, vocab), np.int32), np.zeros((rooms, vocab))
        out = np.zeros((draws, 2), np.int32)
        arguments = (raw, processed, reals[:, :3].copy(), integers, *work, out, draws, vocab)
        yield replace(base, grid=(rooms, 1, 1), arguments=arguments)
    yield _nuclei(base)


_SAMPLING = {"process_logits": _process_logits, "logprobs": _logprobs, "sample": _sample}
