"""Philox4x32-10, a counter-based random generator: a random number is a pure function of its place.

Source: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011
(https://doi.org/10.1145/2063384.2063405). A generator with hidden state gives a request other
numbers when other requests draw before it; here the number for position ``p`` of a request with
seed ``s`` is ``uniform(s, p)``, whoever else is in the batch and however often it was preempted.
"""

from __future__ import annotations

import numpy as np

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85  # golden ratio, sqrt(3) - 1
_LOW32 = 0xFFFFFFFF
_ROUNDS = 10
_FEW = 16  # numbers up to which Python's integers are faster than NumPy's calls

def philox4x32(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Encrypt counters with keys, ten rounds.

    Args:
        counter: uint32 ``[4, ...]``.
        key: uint32 ``[2, ...]``, of the same trailing shape.

    Returns:
        uint32 ``[4, ...]``, four independent random words a counter.
    """
    # 64-bit lanes hold the 32-bit words, so that a product keeps its high half.
    multiplier0, multiplier1, step0, step1, low32, bits32 = np.array(
        [*_MULTIPLIERS, *_KEY_STEPS, _LOW32, 32], dtype=np.uint64
    )
    c0, c1, c2, c3 = counter.astype(np.uint64)
    k0, k1 = key.astype(np.uint64)
    for _ in range(_ROUNDS):
        product0, product1 = c0 * multiplier0, c2 * multiplier1
        c0, c1 = (product1 >> bits32) ^ c1 ^ k0, product1 & low32
        c2, c3 = (product0 >> bits32) ^ c3 ^ k1, product0 & low32
        k0, k1 = (k0 + step0) & low32, (k1 + step1) & low32
    return np.stack([c0, c1, c2, c3]).astype(np.uint32)


def words_of(seed: int, position: int) -> tuple[int, int]:
    """The first two words of :func:`philox4x32` for one place, in Python's integers.

    Args:
        seed, position: from 0 to 2**64 - 1; key and counter as :func:`uniform` says.
    """
    (multiplier0, multiplier1), (step0, step1), low32 = _MULTIPLIERS, _KEY_STEPS, _LOW32
    c0, c1, c2, c3 = position & low32, position >> 32, 0, 0
    k0, k1 = seed & low32, seed >> 32
    for _ in range(_ROUNDS):
        product0, product1 = c0 * multiplier0, c2 * multiplier1
        c0, c1 = (product1 >> 32) ^ c1 ^ k0, product1 & low32
        c2, c3 = (product0 >> 32) ^ c3 ^ k1, product0 & low32
        k0, k1 = (k0 + step0) & low32, (k1 + step1) & low32
    return c0, c1


def uniform(seeds, positions) -> np.ndarray:
    """One number in [0, 1) with 53 random bits for each (seed, position).

    The key is the seed, the counter is the position (low words first; counter words 2 and 3 are
    zero). Of the four words ``w``, the number is ``((w0 >> 5) * 2**26 + (w1 >> 6)) / 2**53``.

    Args:
        seeds: integers from 0 to 2**64 - 1, ``[S]``.
        positions: index of the drawn token in its sequence (prompt included), ``[S]``.

    Returns:
        float64 ``[S]``.
    """
    if len(seeds) <= _FEW:
        words = [words_of(int(seed), int(position)) for seed, position in zip(seeds, positions, strict=True)]
        return np.array([((w0 >> 5) * 2**26 + (w1 >> 6)) / 2**53 for w0, w1 in words], dtype=np.float64)
    seeds = np.asarray(seeds, dtype=np.uint64)
    positions = np.asarray(positions, dtype=np.uint64)
    zero = np.zeros_like(positions)
    counter = np.stack([positions & np.uint64(_LOW32), positions >> np.uint64(32), zero, zero])
    words = philox4x32(counter, np.stack([seeds & np.uint64(_LOW32), seeds >> np.uint64(32)])).astype(np.float64)
    high, low = np.floor(words[0] / 2**5), np.floor(words[1] / 2**6)
    return (high * 2**26 + low) / 2**53
