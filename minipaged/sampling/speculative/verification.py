"""Which draft tokens are kept: those that the target itself would have sampled.

One step of the target computes the last known token and all draft tokens of a sequence, which gives
the logits of every position that the draft reaches:

    computed          t     d0    d1    d2
    logits say        x0    x1    x2    x3        x_i: sampled with the random number of its position
    kept              x0 = d0   x1 = d1   x2 ≠ d2:  keep x0, x1, x2; roll d2 back

At each position the target's token is sampled exactly as without a draft (same processors, same
parameters, same number of the generator) and kept; the draft only decides whether the next logits,
computed on the assumption that it was right, may be used. So the tokens are those of plain sampling,
one by one and not only in distribution, whatever the draft proposes: greedy output is equal bit for
bit, seeded output too.

The price is acceptance. Rejection sampling (Leviathan et al. 2023, https://arxiv.org/abs/2211.17192)
accepts a draft token drawn from q with probability 1 - TV(p, q), the best that any rule can, but its
tokens depend on the draft's. Where draft and target sample with one common random number, as here,
the chance lies below that (coupled draws without communication: Daliri, Musco, Suresh 2025,
https://arxiv.org/abs/2408.07978): for tiny and tiny-draft on held-out text, 0.40 instead of 0.72 at
temperature 1, 0.54 instead of 0.68 at 0.5. For greedy requests, and for a proposer that samples
nothing such as prompt lookup, the two rules accept alike.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from minipaged.sampling.sampler import SampledToken
from minipaged.sampling.state import SamplingState

DrawRows = Callable[[list[int], list[SamplingState]], list[SampledToken]]


@dataclass(slots=True)
class Guess:
    """One sequence of a step whose draft tokens are to be verified.

    Attributes:
        row: of the logits that gave its next token; those after its draft tokens follow.
        draft_token_ids: what was guessed.
        sampling: how it is sampled; left as it was found.
        tokens: its next token, as sampled without looking at the draft; :func:`verify` adds what follows.
    """

    row: int
    draft_token_ids: list[int]
    sampling: SamplingState
    tokens: list[SampledToken]


def verify(draw: DrawRows, guesses: list[Guess]) -> None:
    """Sample on along each draft up to its first wrong token, all sequences together, depth by depth.

    A sequence ends early where the logits cannot be used; if they really cannot, the next step, which
    computes that position again, will say so.

    Args:
        draw: samples a token from each of some rows of the step's logits, each with a state.
    """
    # What is drawn greedily from the model's own logits depends on nothing sampled before it.
    simple = [guess for guess in guesses if guess.sampling.memoryless]
    if simple:
        _verify_at_once(draw, simple)
    if len(simple) < len(guesses):
        _verify_in_turn(draw, [guess for guess in guesses if not guess.sampling.memoryless])


def _verify_at_once(draw: DrawRows, guesses: list[Guess]) -> None:
    rows = [row for g in guesses for row in range(g.row + 1, g.row + 1 + len(g.draft_token_ids))]
    states = [g.sampling for g in guesses for _ in g.draft_token_ids]
    sampled = iter(draw(rows, states))
    for guess in guesses:
        for depth, token in enumerate(itertools.islice(sampled, len(guess.draft_token_ids))):
            if _is_right(guess, depth) and token.error is None:
                guess.tokens.append(token)


def _verify_in_turn(draw: DrawRows, guesses: list[Guess]) -> None:
    known = [len(guess.sampling.output_token_ids) for guess in guesses]
    depth, alive = 0, guesses
    while alive := [guess for guess in alive if _is_right(guess, depth)]:
        for guess in alive:
            guess.sampling.append(guess.tokens[-1].token_id)
        depth += 1
        sampled = draw([guess.row + depth for guess in alive], [guess.sampling for guess in alive])
        for guess, token in zip(alive, sampled, strict=True):
            if token.error is None:
                guess.tokens.append(token)
    for guess, num_tokens in zip(guesses, known, strict=True):
        guess.sampling.truncate(num_tokens)


def _is_right(guess: Guess, depth: int) -> bool:
    """Whether the draft token of this depth is the token that was sampled for its place."""
    return depth < min(len(guess.draft_token_ids), len(guess.tokens)) and (
        guess.tokens[depth].token_id == guess.draft_token_ids[depth]
    )
