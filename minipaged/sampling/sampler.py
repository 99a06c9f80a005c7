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

from minipaged.config import SamplingParams
from minipaged.sampling.draw import draw
from minipaged.sampling.filters import candidates
from minipaged.sampling.logprobs import token_logprobs
from minipaged.sampling.margins import gap, margin
from minipaged.sampling.masks import few_allowed, likeliest_allowed, mask_row
from minipaged.sampling.philox import uniform
from minipaged.sampling.processors import LogitsProcessor
from minipaged.sampling.rejection import TRIES, place
from minipaged.sampling.state import SamplingState

DAMAGED = "the model's logits hold NaN or infinity; its weights or KV are damaged."
"""What to tell the caller whose logits cannot be used."""


@dataclass(slots=True)
class _Row:
    """A row that takes more than its likeliest token. ``plain``: the processors make no difference, or, if it
    ``rejects`` as its state says, are asked about what is drawn."""

    index: int
    state: SamplingState
    likeliest: int
    plain: bool
    rejects: bool


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
    with np.errstate(over="ignore", invalid="ignore"):
        damaged = ~np.isfinite(logits.sum(axis=1))
    if damaged.any():  # a sum that is not finite may be a mere overflow; only then look at each logit
        damaged &= ~np.isfinite(logits).all(axis=1)
    return logits.argmax(axis=1).tolist(), damaged.tolist()


def draw_row(row: np.ndarray, largest: float, params: SamplingParams, number: float, masked: bool) -> int:
    """The index of the token that is drawn from a row of processed logits.

    Args:
        row, largest, params, masked: as those of :func:`~minipaged.sampling.filters.candidates`.
        number: random, from [0, 1).
    """
    kept, weights = candidates(row, largest, params, masked)
    index = draw(weights, number)
    return index if kept is None else int(kept[index])


class Sampler:
    """Samples for a vocabulary of ``vocab_size`` tokens; keeps nothing from one call to the next.

    Args:
        mask_row, few_allowed, likeliest_allowed: do what the functions of these names do, which are their defaults;
            a backend may have a faster way.
        draw_row: does what :func:`draw_row` does, sooner, where it can; else returns -1.
    """

    def __init__(
        self,
        vocab_size: int,
        mask_row: Callable = mask_row,
        few_allowed: Callable = few_allowed,
        likeliest_allowed: Callable = likeliest_allowed,
        draw_row: Callable | None = None,
    ):
        self.vocab_size = vocab_size
        self._mask_row, self._few_allowed, self._likeliest_allowed = mask_row, few_allowed, likeliest_allowed
        self._draw_row = draw_row
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
        likeliest, damaged = examined or examine(logits)
        if not with_margins and all([state.memoryless for state in states]):
            return [
                SampledToken(-1, error=DAMAGED) if bad else SampledToken(token_id)
                for token_id, bad in zip(likeliest, damaged, strict=True)
            ]
        # Extreme logits overflow on the way to a value that is then checked for being finite.
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            tokens, rows = [], []
            for index, (state, token_id, bad) in enumerate(zip(states, likeliest, damaged, strict=True)):
                if bad:
                    tokens.append(SampledToken(-1, error=DAMAGED))
                    continue
                tokens.append(SampledToken(token_id))
                greedy, rejects = state.params.greedy, False
                plain = not state.processors
                if not plain and greedy:
                    plain = _all_spare(state.processors, token_id)
                elif not plain and state.rejects:
                    rejects, plain = True, state.allows(token_id)
                if not (plain and greedy) or state.num_logprobs is not None or with_margins:
                    rows.append(_Row(index, state, token_id, plain, rejects))
            for row in rows:
                if not row.plain:
                    for processor in row.state.processors:
                        processor.prepare()
            for row, number in zip(rows, _uniforms(rows), strict=True):
                tokens[row.index] = self._sample_row(logits[row.index], row, number, with_margins)
            return tokens

    def _sample_row(self, raw: np.ndarray, row: _Row, number: float, with_margins: bool) -> SampledToken:
        """A token from ``raw``, which is finite; ``number`` is the random number of the first draw."""
        state, params, likeliest = row.state, row.state.params, row.likeliest
        edited, token_id, margins = not row.plain, None, [np.inf]
        if row.rejects and with_margins:
            margins.append(gap(raw))  # whether to try hangs on the likeliest
        if row.rejects and row.plain:
            token_id, numbers = self._first_allowed(raw, row, number)
            edited, number = token_id is None, numbers[-1]
            if with_margins:
                margins += [margin(raw, params, number) for number in numbers[:TRIES]]
        if token_id is None:
            ids = None  # the tokens that are left, if not all
            values = raw
            if edited:
                ids, values, likeliest = self._processed(raw, state, whole=with_margins)
            largest = float(values[likeliest])
            if not math.isfinite(largest):
                return SampledToken(-1, error=why_not_finite(largest))
            token_id = likeliest
            if not params.greedy and len(values) > 1:
                token_id = self._draw(values, largest, params, number, masked=edited and ids is None)
            if ids is not None:
                token_id = int(ids[token_id])
            if with_margins:
                margins.append(margin(values, params, number))
        sampled = SampledToken(token_id)
        if state.num_logprobs is not None:
            facts = token_logprobs(raw, token_id, state.num_logprobs)
            sampled.logprob, sampled.rank, sampled.top = facts.logprob, facts.rank, facts.top
        if with_margins:
            sampled.margin = min(margins)
        return sampled

    def _draw(self, row: np.ndarray, largest: float, params: SamplingParams, number: float, masked: bool) -> int:
        """The index of the token that the random ``number`` draws from ``row``; ``masked``: it may hold ``-inf``."""
        if self._draw_row is not None:
            index = self._draw_row(row, largest, params, number)
            if index >= 0:
                return index
        return draw_row(row, largest, params, number, masked)

    def _first_allowed(self, raw: np.ndarray, row: _Row, number: float) -> tuple[int | None, list[float]]:
        """The first of ``TRIES`` tokens drawn from all that may follow, if one does; and the random numbers that were
        used, ``number`` the first, and the next that is to be used, if none does."""
        state, numbers, largest = row.state, [number], float(raw[row.likeliest])
        while len(numbers) <= TRIES:
            token_id = self._draw(raw, largest, state.params, numbers[-1], masked=False)
            if state.allows(token_id):
                return token_id, numbers
            numbers += uniform([state.seed], [place(state.position, len(numbers))]).tolist()
        return None, numbers

    def _processed(
        self, raw: np.ndarray, state: SamplingState, whole: bool
    ) -> tuple[np.ndarray | None, np.ndarray, int]:
        """What the processors leave of a row whose logits are finite: ids of tokens (``None``: all), their logits,
        and the index of the largest. ``whole``: all are wanted; else, of a greedy draw's, only the largest is right."""
        row, processors, greedy = self._row, state.processors, state.params.greedy
        if len(processors) == 1:  # of several, the others may make an error of a logit that this one leaves out
            forced = None if whole else processors[0].forced()
            if forced is not None:
                return (None, raw, forced) if greedy else (np.array([forced]), raw[forced : forced + 1], 0)
            bits = processors[0].allowed_bits()
            if bits is not None:
                if not whole and greedy:
                    index = self._likeliest_allowed(raw, bits)
                    if index >= 0:
                        return None, raw, index
                found = None if whole else self._few_allowed(raw, bits)
                if found is not None:
                    return *found, int(found[1].argmax())
                return None, row, self._mask_row(raw, bits, row)
        row[:] = raw
        for processor in processors:
            processor.apply(row, state.output_token_ids)
        return None, row, int(row.argmax())


def _all_spare(processors: list[LogitsProcessor], token_id: int) -> bool:
    for processor in processors:
        if not processor.spares(token_id):
            return False
    return True


def _uniforms(rows: list[_Row]) -> list[float]:
    """The random number of each row's first draw; anything for a greedy one."""
    if all(row.state.params.greedy for row in rows):
        return [0.0] * len(rows)
    places = [place(row.state.position, TRIES if row.rejects and not row.plain else 0) for row in rows]
    return uniform([row.state.seed for row in rows], places).tolist()


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
