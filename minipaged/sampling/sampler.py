"""One token for each sequence, from its row of logits.

The order is vLLM's: log-probabilities are taken from the raw logits; then allowed_token_ids,
bad_words, min_tokens, logit_bias, penalties, temperature, min_p, top_k, top_p and the draw.

A row never sees its neighbours: what is computed over the whole matrix (argmax, a finite check) is
exact in any company, and the rest is computed row by row. So a request's tokens do not depend on
its batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from minipaged.sampling.draw import draw
from minipaged.sampling.filters import candidates, weigh_masked
from minipaged.sampling.logprobs import token_logprobs
from minipaged.sampling.margins import margin
from minipaged.sampling.masks import few_allowed, mask_row
from minipaged.sampling.philox import uniform
from minipaged.sampling.state import SamplingState

DAMAGED = "the model's logits hold NaN or infinity; its weights or KV are damaged."
"""What to tell the caller whose logits cannot be used."""


@dataclass(slots=True)
class SampledToken:
    """The outcome of one row.

    ``logprob``, ``rank`` and ``top`` (see ``TokenLogprobs``) are set where the request asks for
    ``logprobs``; ``margin`` where the caller asks (see ``margins.py``). Where ``error`` is set,
    nothing was sampled, and ``token_id`` is -1.
    """

    token_id: int
    logprob: float | None = None
    rank: int | None = None
    top: tuple[list[int], list[float]] | None = None
    margin: float | None = None
    error: str | None = None


def examine(logits: np.ndarray) -> tuple[list[int], list[bool]]:
    """For each row of float32 ``logits [S, vocab]``: the index of its largest value (the first of several; of no
    meaning where one is NaN), and whether any value is NaN or infinite."""
    damaged = ~np.isfinite(logits.sum(axis=1))
    if damaged.any():  # a sum that is not finite may be a mere overflow; only then look at each logit
        damaged &= ~np.isfinite(logits).all(axis=1)
    return logits.argmax(axis=1).tolist(), damaged.tolist()


class Sampler:
    """Samples for a vocabulary of ``vocab_size`` tokens; keeps nothing from one call to the next.

    Args:
        mask_row, few_allowed, weigh_masked: do what the functions of these names do, which are their defaults; a
            backend may have a faster way.
    """

    def __init__(
        self,
        vocab_size: int,
        mask_row: Callable = mask_row,
        few_allowed: Callable = few_allowed,
        weigh_masked: Callable = weigh_masked,
    ):
        self.vocab_size = vocab_size
        self._mask_row, self._few_allowed, self._weigh_masked = mask_row, few_allowed, weigh_masked
        self._row = np.empty(vocab_size, dtype=np.float32)  # fresh memory costs more than the copy into it

    def sample(
        self,
        logits: np.ndarray,
        states: list[SamplingState],
        *,
        examined: tuple[list[int], list[bool]] | None = None,
        with_margins: bool = False,
    ) -> list[SampledToken]:
        """Sample one token a row. States and logits are only read.

        Args:
            logits: float32 ``[S, vocab_size]``.
            states: one for each row, ``[S]``; their ``append`` is the caller's to call.
            examined: what :func:`examine` says of ``logits``, where a backend found it out already.
            with_margins: also say how near each choice was to another one (slow; for tests).

        Returns:
            ``[S]`` outcomes. A row with NaN or infinite logits, or with every token masked, has its
            ``error`` set, and the others are not touched by it.
        """
        if logits.shape != (len(states), self.vocab_size):
            raise ValueError(f"logits have shape {logits.shape}; expected {(len(states), self.vocab_size)}.")
        if not states:
            return []
        # Extreme logits overflow on the way to a value that is then checked for being finite.
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            likeliest, damaged = examined or examine(logits)
            if not with_margins and all(state.memoryless for state in states):
                return [
                    SampledToken(-1, error=DAMAGED) if bad else SampledToken(token_id)
                    for token_id, bad in zip(likeliest, damaged, strict=True)
                ]
            edited = [_is_edited(state, token_id) for state, token_id in zip(states, likeliest, strict=True)]
            for state, is_edited in zip(states, edited, strict=True):
                if is_edited:
                    for processor in state.processors:
                        processor.prepare()
            uniforms = self._uniforms(states)
            return [
                self._sample_row(row, *facts, with_margins)
                for row, *facts in zip(logits, states, likeliest, damaged, edited, uniforms, strict=True)
            ]

    @staticmethod
    def _uniforms(states: list[SamplingState]) -> list[float]:
        if all(state.params.greedy for state in states):
            return [0.0] * len(states)
        return uniform([state.seed for state in states], [state.position for state in states]).tolist()

    def _sample_row(self, raw, state, likeliest, damaged, edited, uniform, with_margins) -> SampledToken:
        if damaged:
            return SampledToken(-1, error=DAMAGED)
        if not edited and state.params.greedy and state.num_logprobs is None and not with_margins:
            return SampledToken(likeliest)
        ids, row = None, raw  # the tokens that are left, if not all, and their logits
        if edited:
            ids, row, likeliest = self._processed(raw, state, whole=with_margins)
        largest = float(row[likeliest])
        if not math.isfinite(largest):
            return SampledToken(-1, error=why_not_finite(largest))

        token_id = likeliest
        if not state.params.greedy and len(row) > 1:
            masked = edited and ids is None
            kept, weights = candidates(row, largest, state.params, masked, self._weigh_masked)
            index = draw(weights, uniform)
            token_id = index if kept is None else int(kept[index])
        if ids is not None:
            token_id = int(ids[token_id])
        sampled = SampledToken(token_id)
        if state.num_logprobs is not None:
            facts = token_logprobs(raw, token_id, state.num_logprobs)
            sampled.logprob, sampled.rank, sampled.top = facts.logprob, facts.rank, facts.top
        if with_margins:
            sampled.margin = margin(row, state.params, uniform)
        return sampled

    def _processed(self, raw, state, whole: bool) -> tuple[np.ndarray | None, np.ndarray, int]:
        """What the processors leave of a row whose logits are finite: ids of tokens (``None``: all), their logits,
        and the index of the largest. ``whole``: all are wanted."""
        row, processors = self._row, state.processors
        if len(processors) == 1:  # of several, the others may make an error of a logit that this one leaves out
            forced = None if whole else processors[0].forced()
            if forced is not None:
                return np.array([forced]), raw[forced : forced + 1], 0
            bits = processors[0].allowed_bits()
            if bits is not None:
                found = None if whole else self._few_allowed(raw, bits)
                if found is not None:
                    return *found, int(found[1].argmax())
                return None, row, self._mask_row(raw, bits, row)
        row[:] = raw
        for processor in processors:
            processor.apply(row, state.output_token_ids)
        return None, row, int(row.argmax())


def _is_edited(state: SamplingState, likeliest: int) -> bool:
    """Whether the processors of a row may make a difference."""
    if not state.processors or not state.params.greedy:
        return bool(state.processors)
    for processor in state.processors:
        if not processor.spares(likeliest):
            return True
    return False


def why_not_finite(largest: float) -> str:
    """What to tell the caller whose row has no finite largest logit after processing."""
    if largest == -np.inf:
        return (
            "every token is masked: allowed_token_ids, bad_words, min_tokens and structured_outputs together "
            "leave nothing to sample, or the grammar is too complex; relax one of them."
        )
    return (
        "logit_bias or a penalty drove a logit to infinity or NaN; use values nearer to neutral "
        "(repetition_penalty 1, others 0)."
    )
