"""What is wanted of a step's logits, told before they are computed; and how they are asked for it afterwards.

    engine  ── DrawOrder, PromptOrder ──▶ runner ──▶ logits on the host:    HostLogits samples when it is asked to
                                                 └─▶ logits on a device:    sampled there, DeviceLogits looks it up

The tokens are the same; of a device's logits nothing can be had that was not ordered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from minipaged.sampling.beam import Continuation, continuations
from minipaged.sampling.logprobs import TokenLogprobs, prompt_logprobs
from minipaged.sampling.sampler import SampledToken, Sampler
from minipaged.sampling.state import SamplingState


@dataclass(slots=True)
class DrawOrder:
    """What is wanted of a sequence that samples.

    Attributes:
        states: one token is drawn with each of them, from the same row.
        num_candidates: if not 0, nothing is drawn; that many continuations of ``states[0]`` are wanted (a beam).
        draft_token_ids: guesses whose rows follow: from each of them a token is drawn too, as if the guesses
            before it had been right.
    """

    states: list[SamplingState]
    num_candidates: int = 0
    draft_token_ids: Sequence[int] = ()


@dataclass(slots=True)
class PromptOrder:
    """Log-probabilities of a prompt's tokens: of how many likeliest tokens beside each, and of how many tokens (but
    the first) they are known already."""

    token_ids: list[int]
    num_logprobs: int
    num_known: int = 0


class StepLogits(Protocol):
    """Logits of one step, by row.

    ``sample_rows`` has the row of each scheduled sequence that samples a token, in the plan's
    order; the rows of its draft tokens follow that row. ``prompt_rows`` maps a request id to
    ``(first position, slice of rows)`` where the logits of prompt positions were asked for.
    """

    sample_rows: list[int]
    prompt_rows: dict[str, tuple[int, slice]]

    def draw(self, rows: list[int], states: list[SamplingState]) -> list[SampledToken]:
        """One token for each row and state (see :meth:`Sampler.sample`)."""
        ...

    def continuations(self, row: int, state: SamplingState, count: int) -> list[Continuation]:
        """See :func:`minipaged.sampling.beam.continuations`."""
        ...

    def prompt_logprobs(self, rows: range, token_ids: list[int], k: int) -> list[TokenLogprobs]:
        """See :func:`minipaged.sampling.logprobs.prompt_logprobs`; raises the same."""
        ...


@dataclass
class HostLogits:
    """As :class:`StepLogits`, of ``logits``, float32 ``[rows, vocab]``.

    ``examined``: what :func:`~minipaged.sampling.sampler.examine` says of them, if it is known.
    """

    sampler: Sampler
    logits: np.ndarray
    sample_rows: list[int]
    prompt_rows: dict[str, tuple[int, slice]]
    examined: tuple[list[int], list[bool]] | None = None

    def draw(self, rows: list[int], states: list[SamplingState]) -> list[SampledToken]:
        logits, examined = self.logits, self.examined
        if rows != list(range(len(logits))):
            logits = logits[rows]
            examined = examined and tuple([facts[row] for row in rows] for facts in examined)
        return self.sampler.sample(logits, states, examined=examined)

    def continuations(self, row: int, state: SamplingState, count: int) -> list[Continuation]:
        return continuations(self.logits[row], state, count)

    def prompt_logprobs(self, rows: range, token_ids: list[int], k: int) -> list[TokenLogprobs]:
        return prompt_logprobs(self.logits[rows.start : rows.stop], token_ids, k)
