"""Sampling where a device does it: what to ask of it for each sequence, and what its answers mean.

The device draws the very tokens that :class:`~minipaged.sampling.sampler.Sampler` would, with the same random
numbers, and sends them instead of logits. A row comes to the host whole, and is sampled there, where

- a beam has penalties, masks or a grammar, which edit its log-probabilities, or wants more than 64 candidates;
- more than 64 likeliest tokens are asked for;
- a logits processor cannot say what it would do (none of ours).

Such rows are counted (:attr:`DeviceSampler.num_rows_on_host`), and each reason is logged once.
"""

from __future__ import annotations

import logging

import numpy as np

from minipaged.errors import NumericalError
from minipaged.ops.sampling import ALL_MASKED, MAX_TOP, NOT_FINITE, Answers, Ask, Draw, Edits
from minipaged.sampling.beam import Continuation, continuations
from minipaged.sampling.logprobs import TokenLogprobs, prompt_logprobs
from minipaged.sampling.rejection import TRIES, place
from minipaged.sampling.sampler import DAMAGED, SampledToken, Sampler, why_not_finite
from minipaged.sampling.state import SamplingState
from minipaged.sampling.step_logits import DrawOrder, PromptOrder

log = logging.getLogger("minipaged")


class DeviceSampler:
    """Writes the asks of a step, and reads the answers.

    Args:
        sampler: samples the rows that come to the host.
    """

    def __init__(self, sampler: Sampler):
        self.sampler = sampler
        self.num_rows_on_host = 0  #: rows of logits that the host was sent
        self._reasons: set[str] = set()

    def prepare(
        self,
        sample_rows: list[int],
        draws: list[DrawOrder],
        prompt_rows: dict[str, tuple[int, slice]],
        prompts: dict[str, PromptOrder],
    ) -> Prepared:
        """The asks of a step: ``draws``, of the sequences that sample, whose rows are ``sample_rows``; and ``prompts``.

        States are left as they were found.
        """
        found: list[tuple[SamplingState | None, Ask]] = []
        for name, (first, rows) in prompt_rows.items():
            found += [(None, ask) for ask in self._of_prompt(prompts[name], first, rows)]
        for order, row in zip(draws, sample_rows, strict=True):
            state = order.states[0]
            if order.num_candidates:
                found.append((state, self._of_beam(state, row, order.num_candidates)))
                continue
            found += [(state, ask) for state in order.states for ask in self._of_draw(state, row)]
            found += [(state, ask) for ask in self._of_draft(state, row, order.draft_token_ids)]
        found.sort(key=lambda pair: pair[1].row)
        self.num_rows_on_host += len({ask.row for _, ask in found if ask.whole})
        numbers: dict[tuple[int, SamplingState | None], list[int]] = {}
        for number, (state, ask) in enumerate(found):
            numbers.setdefault((ask.row, state), []).append(number)
        return Prepared([ask for _, ask in found], numbers)

    def _of_draw(self, state: SamplingState, row: int) -> list[Ask]:
        """What decides about a token: one ask, or, if the state rejects, one for each draw from all tokens before."""
        params, edits = state.params, None
        num_top = -1 if state.num_logprobs is None else min(state.num_logprobs, state.vocab_size)
        if num_top > MAX_TOP:
            return [self._whole(row, f"logprobs above {MAX_TOP}")]
        if state.processors:
            edits = Edits()
            for processor in state.processors:
                if not processor.describe(edits, state.output_token_ids):
                    return [self._whole(row, f"{type(processor).__name__}, which a device does not know")]
            if params.greedy and num_top == 0:
                num_top = 1  # of the likeliest, which the processors may spare
        if params.greedy:
            return [Ask(row, Draw(edits=edits), num_top=num_top)]
        filters = params.temperature, max(params.top_k, 0), params.top_p, params.min_p, state.seed
        if not state.rejects:
            return [Ask(row, Draw(*filters, state.position, edits), num_top=num_top)]
        draws = [Draw(*filters, place(state.position, number)) for number in range(TRIES + 1)]
        draws[TRIES].edits = edits
        return [Ask(row, draw, num_top=num_top) for draw in draws]

    def _of_draft(self, state: SamplingState, row: int, token_ids) -> list[Ask]:
        """Asks about the rows behind ``row``, each as if the guesses before it were right."""
        if state.memoryless:
            return [ask for depth in range(len(token_ids)) for ask in self._of_draw(state, row + depth + 1)]
        asks, known = [], len(state.output_token_ids)
        for depth, token_id in enumerate(token_ids):
            state.append(token_id)
            asks += self._of_draw(state, row + depth + 1)
        state.truncate(known)
        return asks

    def _of_beam(self, state: SamplingState, row: int, count: int) -> Ask:
        if state.processors:
            return self._whole(row, "beam search with penalties, masks or a grammar")
        num_top = min(max(count, state.num_logprobs or 0), state.vocab_size)
        if num_top > MAX_TOP:
            return self._whole(row, f"beam search with more than {MAX_TOP} candidates or logprobs")
        return Ask(row, about=0, num_top=num_top)

    def _of_prompt(self, prompt: PromptOrder, first: int, rows: slice) -> list[Ask]:
        """Asks about the prompt's positions from ``first`` on whose successors are not known yet."""
        num_top = min(prompt.num_logprobs, self.sampler.vocab_size)
        asks = []
        for position, row in enumerate(range(rows.start, rows.stop), first):
            if position < prompt.num_known:
                continue
            if num_top > MAX_TOP:
                asks.append(self._whole(row, f"prompt_logprobs above {MAX_TOP}"))
            else:
                asks.append(Ask(row, about=prompt.token_ids[position + 1], num_top=num_top))
        return asks

    def _whole(self, row: int, reason: str) -> Ask:
        if reason not in self._reasons:
            self._reasons.add(reason)
            log.info("logits come to the host and are sampled there for %s", reason)
        return Ask(row, whole=True)


class Prepared:
    """The ``asks`` of a step in the order of their rows, and which of them are about a row and whose (``None``: a
    prompt's)."""

    def __init__(self, asks: list[Ask], numbers: dict[tuple[int, SamplingState | None], list[int]]):
        self.asks, self.numbers = asks, numbers


class DeviceLogits:
    """As :class:`~minipaged.sampling.step_logits.StepLogits`, of logits that are not here, but were asked about.

    A state must be as far as it was, or was supposed to be, when it was ordered.
    """

    def __init__(
        self,
        sampler: Sampler,
        prepared: Prepared,
        answers: Answers,
        sample_rows: list[int],
        prompt_rows: dict[str, tuple[int, slice]],
    ):
        self._sampler, self._numbers, self._answers = sampler, prepared.numbers, answers
        self.sample_rows, self.prompt_rows = sample_rows, prompt_rows

    def draw(self, rows: list[int], states: list[SamplingState]) -> list[SampledToken]:
        return [self._token(self._numbers[row, state], state) for row, state in zip(rows, states, strict=True)]

    def _token(self, numbers: list[int], state: SamplingState) -> SampledToken:
        answers, number = self._answers, numbers[-1]
        if number in answers.rows:
            return self._sampler.sample(answers.rows[number][None], [state])[0]
        token_id, likeliest = answers.tokens[number].tolist()
        if token_id == NOT_FINITE:
            return SampledToken(-1, error=DAMAGED)
        if len(numbers) > 1 and state.allows(likeliest):  # as on the host: the first that may follow
            number = next((n for n in numbers[:-1] if state.allows(int(answers.tokens[n, 0]))), number)
            token_id = int(answers.tokens[number, 0])
        # As on the host: the likeliest is taken as it is where no processor objects to it.
        spared = bool(state.processors) and state.params.greedy and all(p.spares(likeliest) for p in state.processors)
        if not spared and token_id < 0:
            return SampledToken(-1, error=why_not_finite(-np.inf if token_id == ALL_MASKED else np.inf))
        if state.num_logprobs is None:
            return SampledToken(likeliest if spared else token_id)
        ids, logprobs = answers.top[number]
        top = ids[: state.num_logprobs], logprobs[: state.num_logprobs]
        if spared:
            return SampledToken(likeliest, logprobs[0], 1, top)
        return SampledToken(token_id, float(answers.logprobs[number]), int(answers.ranks[number]), top)

    def continuations(self, row: int, state: SamplingState, count: int) -> list[Continuation]:
        (number,) = self._numbers[row, state]
        if number in self._answers.rows:
            return continuations(self._answers.rows[number], state, count)
        if self._answers.ranks[number] == 0:
            return [Continuation(-1, error=DAMAGED)]
        ids, logprobs = self._answers.top[number]
        found = []
        for rank, (token_id, logprob) in enumerate(zip(ids[:count], logprobs, strict=False), 1):
            token = Continuation(token_id, logprob=logprob, log_weight=float(np.float32(logprob)))
            if state.num_logprobs is not None:
                token.rank, token.top = rank, (ids[: state.num_logprobs], logprobs[: state.num_logprobs])
            found.append(token)
        return found

    def prompt_logprobs(self, rows: range, token_ids: list[int], k: int) -> list[TokenLogprobs]:
        found = []
        for row, token_id in zip(rows, token_ids, strict=True):
            (number,) = self._numbers[row, None]
            if number in self._answers.rows:
                found += prompt_logprobs(self._answers.rows[number][None], [token_id], k)
                continue
            if self._answers.ranks[number] == 0:
                raise NumericalError(f"the model's logits for prompt token {token_id} hold NaN or infinity.")
            logprob, rank = float(self._answers.logprobs[number]), int(self._answers.ranks[number])
            found.append(TokenLogprobs(token_id, logprob, rank, self._answers.top[number]))
        return found
