"""Seeds derived from other seeds, so that everything random follows from few numbers."""

from __future__ import annotations

import hashlib


def derived_seed(*parts: int) -> int:
    """A 64-bit seed that is a function of ``parts`` alone; different parts give unrelated seeds."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little")


def choice_seed(seed: int, index: int) -> int:
    """The seed of continuation ``index`` of a request: the first has the request's own."""
    return derived_seed(seed, 0, index) if index else seed
