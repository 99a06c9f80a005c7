"""The sequences that the scheduler knows, by the ids it knows them by."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from minipaged.core.scheduler import Scheduler
from minipaged.core.scheduler_output import ScheduledSequence

if TYPE_CHECKING:
    from minipaged.sequence_group import Sequence


class LiveSequences:
    """Keeps the engine's sequences and the scheduler's requests in step."""

    def __init__(self, scheduler: Scheduler):
        self._scheduler = scheduler
        self._sequences: dict[str, Sequence] = {}

    def __getitem__(self, sequence_id: str) -> Sequence:
        return self._sequences[sequence_id]

    def of(self, scheduled: list[ScheduledSequence]) -> list[Sequence]:
        """The sequences of a plan; a step may end some of them on its way."""
        return [self._sequences[each.request_id] for each in scheduled]

    def add(self, sequence: Sequence) -> None:
        """Queue the first sequence of a group. Raises as :meth:`Scheduler.add`."""
        self._scheduler.add(sequence.request)
        self._sequences[sequence.request.request_id] = sequence

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Give ``child`` a request that shares all that ``parent``'s has computed."""
        group_id = parent.group.request_id
        ids = (f"{group_id}#{number}" for number in itertools.count(1))
        child_id = next(name for name in ids if name not in self._scheduler.requests)
        child.request = self._scheduler.fork(parent.request.request_id, child_id, parent.group.params)
        self._sequences[child_id] = child

    def replace(self, parent: Sequence, child: Sequence) -> None:
        """Let ``child`` go on with the request of ``parent``, which is given up."""
        child.request = parent.request
        self._sequences[child.request.request_id] = child

    def append(self, sequence: Sequence, token_id: int) -> None:
        """Give a sequence its next token."""
        self._scheduler.append(sequence.request.request_id, [token_id])

    def finish(self, sequence: Sequence) -> None:
        """End a sequence that has all its tokens."""
        self._forget(sequence)
        self._scheduler.finish(sequence.request.request_id)

    def drop(self, sequence: Sequence) -> None:
        """End a sequence early; one that is not forked yet, or dropped already, is left alone."""
        if sequence.request is not None and sequence.request.request_id in self._sequences:
            self._forget(sequence)
            self._scheduler.abort(sequence.request.request_id)

    def _forget(self, sequence: Sequence) -> None:
        del self._sequences[sequence.request.request_id]
        sequence.group.metrics.num_preemptions += sequence.request.num_preemptions
