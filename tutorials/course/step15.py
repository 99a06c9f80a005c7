"""What step 15 checks against: the order in which a warp's lanes hold a 16 x 16 piece of a matrix."""

from __future__ import annotations

import numpy as np


def place(lane: int, word: int) -> tuple[int, int]:
    """Row and first column, in a 16 x 16 piece, of the pair that ``lane`` holds in ``word`` (0 to 3)."""
    return lane // 4 + 8 * (word & 1), 2 * (lane % 4) + 8 * (word >> 1)


def fragments(w: np.ndarray) -> np.ndarray:
    """uint32 ``[K / 16, 32, 4]``: the words of float16 ``w [16, K]`` for each step along K and each lane."""
    packed = np.zeros((w.shape[1] // 16, 32, 4), np.uint32)
    pairs = np.ascontiguousarray(w).view(np.uint32)  # [16, K / 2]
    for lane in range(32):
        for word in range(4):
            row, column = place(lane, word)
            packed[:, lane, word] = pairs[row, column // 2 :: 8]
    return packed


def examine_pack_fragments(pack_fragments) -> None:
    """The check of the exercise."""
    codes = np.arange(16 * 32, dtype=np.uint16).reshape(16, 32)  # each element its own number, 32 row + column
    packed = np.asarray(pack_fragments(codes.view(np.float16)))
    assert packed.dtype == np.uint32, f"a word holds two float16, so the result is uint32; yours is {packed.dtype}"
    assert packed.shape == (2, 32, 4), f"w [16, 32] has 2 steps, 32 lanes, 4 words each: (2, 32, 4), not {packed.shape}"
    expected = fragments(codes.view(np.float16))
    swapped = expected >> np.uint32(16) | expected << np.uint32(16)
    assert not np.array_equal(packed, swapped), "the first value of a pair belongs into the low half of its word"
    wrong = np.argwhere(packed != expected)
    if len(wrong):
        step, lane, word = wrong[0].tolist()
        row, column = place(lane, word)
        found = int(packed[step, lane, word]) & 0xFFFF
        raise AssertionError(
            f"step {step}, lane {lane}, word {word} must hold row {row}, columns {16 * step + column} and "
            f"{16 * step + column + 1}; yours begins with row {found // 32}, column {found % 32}"
        )
