"""Sampling on the device: which kernels answer a turn of asks, and how their answers are fetched.

::

    logits ──▶ process_logits ──▶ processed     where a draw edits its row
       ├──────────────┴──▶ sample ──▶ tokens    where anything is drawn
       └──────────────────▶ logprobs ──▶ logprobs, ranks, top     where anything is told

All answers of a turn lie in one piece of memory (:func:`~minipaged.ops.cuda.buffers.answer_fields`) and come in one
copy. Rows that are asked for themselves, which the host samples from, come in one more for each run of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cuda_kernels import sample
from minipaged.ops import sampling
from minipaged.ops.sampling import Answers, Ask

from .asks import Packed, Turn
from .buffers import Buffers, answer_fields
from .device import Call, Device
from .inputs import StepInputs
from .plan import Plan

assert (sampling.NOT_FINITE, sampling.ALL_MASKED, sampling.OVERFLOWED) == (
    sample.NOT_FINITE,
    sample.ALL_MASKED,
    sample.OVERFLOWED,
)


@dataclass(frozen=True)
class Needs:
    """Which kernels a turn takes."""

    edited: bool = False
    drawn: bool = True
    told: bool = False


class DeviceSampling:
    """Answers asks about the logits in ``buffers``."""

    def __init__(self, device: Device, inputs: StepInputs, buffers: Buffers, activation: str):
        self.device, self.inputs, self.buffers, self.activation = device, inputs, buffers, activation
        self.vocab_size = buffers.logits.shape[1]
        self._fields = answer_fields(buffers.logits.shape[0])
        self._answers = device.host_array(buffers.answers.nbytes)
        self._rows = device.host_array(buffers.logits.nbytes).view(np.float32).reshape(buffers.logits.shape)

    def calls(self, num_slots: int, needs: Needs) -> list[Call]:
        """The launches for a turn of ``num_slots`` asks."""
        plan, b = Plan(self.device, self.activation, num_slots), self.buffers
        token = self._address("tokens")
        if needs.edited:
            plan.process_logits(self.inputs, b.logits, b.processed, self.vocab_size)
        if needs.drawn:
            plan.sample(self.inputs, b, token, self.vocab_size)
        if needs.told:
            addresses = {"logprob": "logprobs", "rank": "ranks", "top": "top"}
            where = {argument: self._address(name) for argument, name in addresses.items()}
            plan.logprobs(self.inputs, b.logits, token, vocab_size=self.vocab_size, **where)
        return plan.calls

    def _address(self, name: str) -> int:
        return self.buffers.answers.address + self._fields[name][2]

    def fetch(self, asks: Sequence[Ask], turn: Turn, packed: Packed, answers: Answers) -> None:
        """Wait for a turn and add what the device answers; ``asks``: those of all turns."""
        top_begin = self._fields["top"][2]
        used = 0
        if packed.drawn or packed.told:
            used = top_begin + 16 * packed.num_top if packed.told else top_begin
            self.device.download(self._answers[:used], self.buffers.answers.address)
        whole = sorted({ask.row - turn.first_row for ask in asks[turn.begin : turn.end] if ask.whole})
        for first, end in _runs(whole):
            self.device.download(self._rows[first:end], self.buffers.logits.row(first))
        self.device.synchronize()
        if used:
            self._take(asks, turn, answers)
        for number in range(turn.begin, turn.end):
            if asks[number].whole:
                answers.rows[number] = self._rows[asks[number].row - turn.first_row].copy()

    def _take(self, asks: Sequence[Ask], turn: Turn, answers: Answers) -> None:
        found = {}
        for name, (kind, shape, begin) in self._fields.items():
            count = int(np.prod(shape))
            found[name] = self._answers[begin : begin + int(kind[1]) * count].view(kind).reshape(shape)
        size = turn.end - turn.begin
        answers.tokens[turn.begin : turn.end] = found["tokens"][:size]
        answers.logprobs[turn.begin : turn.end] = found["logprobs"][:size]
        answers.ranks[turn.begin : turn.end] = found["ranks"][:size]
        first = 0
        for number in range(turn.begin, turn.end):
            num_top = asks[number].num_top
            if num_top >= 0:
                entries = found["top"][first : first + num_top]
                answers.top[number] = entries[:, 0].astype(np.int64).tolist(), entries[:, 1].tolist()
                first += num_top


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """``(first, end)`` of each run of neighbours among ascending numbers."""
    for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        run = [number for _, number in run]
        yield run[0], run[-1] + 1
