"""Philox4x32-10 against the published known answers, and the uniform numbers made from it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipaged.sampling.philox import philox4x32, uniform

# "philox4x32 10" of the file kat_vectors of Random123, the authors' own library.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> np.ndarray:
    return np.array([int(word, 16) for word in text.split()], dtype=np.uint32)


@pytest.mark.parametrize("counter,key,expected", KNOWN_ANSWERS)
def test_known_answers(counter, key, expected):
    assert philox4x32(words(counter), words(key)).tolist() == words(expected).tolist()


def test_known_answers_in_one_vectorised_call():
    columns = [np.stack([words(row[i]) for row in KNOWN_ANSWERS], axis=1) for i in range(3)]
    assert philox4x32(columns[0], columns[1]).tolist() == columns[2].tolist()


def plain_uniform(seed: int, position: int) -> float:
    """The same number by Python integers, after the paper's description of a round."""
    mask = 2**32 - 1
    c = [position & mask, position >> 32, 0, 0]
    k = [seed & mask, seed >> 32]
    for _ in range(10):
        hi0, lo0 = divmod(0xD2511F53 * c[0], 2**32)
        hi1, lo1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [hi1 ^ c[1] ^ k[0], lo1, hi0 ^ c[3] ^ k[1], lo0]
        k = [(k[0] + 0x9E3779B9) & mask, (k[1] + 0xBB67AE85) & mask]
    return ((c[0] >> 5) * 2**26 + (c[1] >> 6)) / 2**53


@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**63 - 1)), min_size=1, max_size=40))
def test_uniform_is_a_function_of_seed_and_position_alone(pairs):
    seeds, positions = zip(*pairs, strict=True)
    assert uniform(seeds, positions).tolist() == [plain_uniform(*pair) for pair in pairs]


def test_uniform_stays_below_one_and_fills_the_interval():
    numbers = uniform(np.full(100_000, 7), np.arange(100_000))
    assert numbers.min() >= 0 and numbers.max() < 1
    counts = np.histogram(numbers, bins=100, range=(0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 149  # 0.1% point of chi-square with 99 degrees of freedom


def test_neighbouring_seeds_and_positions_are_uncorrelated():
    grid = uniform(np.repeat(np.arange(300), 300), np.tile(np.arange(300), 300)).reshape(300, 300) - 0.5
    for other in (np.roll(grid, 1, axis=0), np.roll(grid, 1, axis=1)):
        correlation = (grid * other).mean() / grid.var()
        assert abs(correlation) < 4 / 300  # four standard deviations
