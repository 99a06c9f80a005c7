"""A draw under a mask that is not made: a token is drawn from all, and drawn again if it may not follow.

    likeliest may follow? ── yes ──▶ draw from all ──▶ may follow? ── yes ──▶ taken
              │                            ▲                │ no
              │ no                         └── TRIES ───────┤
              └───────────────────────▶ make the mask, draw from those that may follow

To ask about one token costs a hundredth of the mask of all. The law of the token is that of a draw under the mask
(rejection sampling: von Neumann 1951): given that a token drawn from all may follow, it is each of those that may in
proportion to their weights, in whichever turn that happens, and so it is in the last one. Whether to try depends on
the row alone, which has no part in the draws; and each draw has a random number of its own (:func:`place`).

It needs processors that do nothing but mask, and can say of a single token whether they would; and no top_k, top_p or
min_p, which look at the other tokens that are left.
"""

from __future__ import annotations

TRIES = 2
"""Draws from all tokens, before the mask is made. Under a JSON schema, where the likeliest token may follow, SmolLM2
draws one that may not in a tenth of first turns, and in half of second ones."""


def place(position: int, number: int) -> int:
    """Where :func:`~minipaged.sampling.philox.uniform` finds the number of a draw: ``number`` is 0 to ``TRIES - 1``
    for those from all tokens, ``TRIES`` for that from a mask. Sequences are shorter than 2**32."""
    return position + (number << 32)
