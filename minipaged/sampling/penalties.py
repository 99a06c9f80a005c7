"""Presence, frequency and repetition penalties, from counts kept as tokens come and go."""

from __future__ import annotations

import numpy as np

from minipaged.config import SamplingParams
from minipaged.ops.sampling import Edits
from minipaged.sampling.processors import LogitsProcessor


class Penalties(LogitsProcessor):
    """Counts of the tokens seen so far, and the penalties they bring.

    A step costs O(distinct tokens seen), never O(vocabulary). Presence and frequency count
    generated tokens; repetition counts prompt and generated ones. Formulas and order as in vLLM;
    the repetition penalty is CTRL's (Keskar et al. 2019, https://arxiv.org/abs/1909.05858), the
    other two are OpenAI's.
    """

    def __init__(self, params: SamplingParams, prompt_token_ids):
        self._presence = params.presence_penalty
        self._frequency = params.frequency_penalty
        self._repetition = params.repetition_penalty
        known = np.unique(np.asarray(prompt_token_ids, dtype=np.int64)) if self._repetition != 1 else np.empty(0, int)
        self._size = len(known)
        self._slots = {token_id: slot for slot, token_id in enumerate(known.tolist())}
        self._ids = np.concatenate([known, np.zeros(64, dtype=np.int64)])  # room for what will be generated
        self._counts = np.zeros(len(self._ids), dtype=np.float32)
        self._num_in_prompt = self._size  # the first slots are the prompt's

    @staticmethod
    def wanted(params: SamplingParams) -> bool:
        """Whether any of the three penalties does something."""
        return params.presence_penalty != 0 or params.frequency_penalty != 0 or params.repetition_penalty != 1

    def apply(self, row: np.ndarray, output_token_ids: list[int]) -> None:
        ids, counts = self._ids[: self._size], self._counts[: self._size]
        values = row[ids]
        if self._repetition != 1:
            seen = counts > 0
            seen[: self._num_in_prompt] = True
            penalised = np.where(values > 0, values / self._repetition, values * self._repetition)
            values = np.where(seen, penalised, values)
        row[ids] = values - self._frequency * counts - self._presence * np.minimum(counts, 1)

    def describe(self, edits: Edits, output_token_ids: list[int]) -> bool:
        ids, counts = self._ids[: self._size], self._counts[: self._size]
        kept = counts > 0  # a token that was taken back is not penalised
        kept[: self._num_in_prompt] = True
        edits.seen, edits.counts = ids[kept], counts[kept]
        edits.penalties = self._presence, self._frequency, self._repetition
        return True

    def append(self, token_id: int) -> None:
        slot = self._slots.get(token_id)
        if slot is None:
            slot = self._new_slot(token_id)
        self._counts[slot] += 1

    def undo(self, token_id: int) -> None:
        # A count that falls to zero keeps its slot: it has no effect and may be needed again.
        self._counts[self._slots[token_id]] -= 1

    def fork(self) -> Penalties:
        twin = object.__new__(Penalties)
        twin.__dict__.update(self.__dict__)
        twin._slots, twin._ids, twin._counts = self._slots.copy(), self._ids.copy(), self._counts.copy()
        return twin

    def _new_slot(self, token_id: int) -> int:
        slot = self._size
        if slot == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._slots[token_id] = slot
        self._ids[slot] = token_id
        self._size += 1
        return slot
