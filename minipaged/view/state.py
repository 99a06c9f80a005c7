"""What is drawn: block tables and pool of one moment, and what a step did to them. Plain data.

A :class:`Snapshot` is the state of a scheduler between two steps. A :class:`Step` of a trace is the
state while the step was computed: it was scheduled, its blocks are allocated, its copies are made,
and what it computes is not yet known.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from minipaged.core.scheduler import Scheduler
from minipaged.errors import InvalidParameterError


@dataclass
class SequenceState:
    """One sequence, running (it has a block table) or waiting (it has none).

    Attributes:
        number: the sequence's number of arrival, from 0; gives it its colour.
        sequence_id: the request's id; ``"ID#1"`` and so on for forks of request ``ID``.
        num_prompt_tokens: of the prompt.
        num_tokens: tokens known; in a trace, of a beam whose siblings are not as far, the token that it awaits too.
        num_computed_tokens: those whose KV is in the blocks, before the step that is drawn.
        block_ids: the block table; empty while waiting.
        num_scheduled_tokens: tokens that the step computes, at positions ``num_computed_tokens`` and following.
        num_preemptions: how often its blocks were taken from it.
    """

    number: int
    sequence_id: str
    num_prompt_tokens: int
    num_tokens: int
    num_computed_tokens: int = 0
    block_ids: list[int] = field(default_factory=list)
    num_scheduled_tokens: int = 0
    num_preemptions: int = 0

    @property
    def is_running(self) -> bool:
        return bool(self.block_ids)


@dataclass
class Snapshot:
    """Block tables and pool of one moment.

    Attributes:
        block_size: tokens a block.
        sequences: in the order of arrival, those that wait too.
        ref_cnts: by block id, how many block tables hold the block.
        cached: ids of the blocks that the prefix cache can find, in use or not.
    """

    block_size: int
    sequences: list[SequenceState]
    ref_cnts: list[int]
    cached: set[int]

    @property
    def num_blocks(self) -> int:
        return len(self.ref_cnts)

    @property
    def num_used(self) -> int:
        """Blocks that some table holds."""
        return sum(count > 0 for count in self.ref_cnts)

    @property
    def num_shared(self) -> int:
        """Blocks that several tables hold."""
        return sum(count > 1 for count in self.ref_cnts)

    @property
    def num_cached_free(self) -> int:
        """Blocks that nobody holds and the prefix cache can still find."""
        return sum(self.ref_cnts[block_id] == 0 for block_id in self.cached)

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, those with cached KV left out."""
        return self.num_blocks - self.num_used - self.num_cached_free

    def holders(self) -> dict[int, list[SequenceState]]:
        """By block id, the sequences whose tables hold the block."""
        found: dict[int, list[SequenceState]] = {}
        for sequence in self.sequences:
            for block_id in sequence.block_ids:
                found.setdefault(block_id, []).append(sequence)
        return found


@dataclass
class Work:
    """What one sequence does in a step.

    Attributes:
        kind: ``"decode"`` (the last known token, so that its logits give the next) or ``"prefill"`` (any other).
        num_tokens: tokens computed, ``num_lookahead_tokens`` guesses of speculation among them.
        num_computed_tokens: tokens whose KV was there before.
        num_accepted_tokens: guesses that were right.
        num_cached_tokens: tokens that it was admitted with from the prefix cache in this step.
        num_swapped_tokens: tokens whose KV came back from host memory in this step.
    """

    sequence: SequenceState
    kind: str
    num_tokens: int
    num_computed_tokens: int
    num_lookahead_tokens: int = 0
    num_accepted_tokens: int = 0
    num_cached_tokens: int = 0
    num_swapped_tokens: int = 0


@dataclass
class Step(Snapshot):
    """One step of a trace; the lists of sequence ids and block ids say what changed, in order.

    Attributes:
        index: number of the step, from 0.
        time: seconds from the beginning of the trace to that of the step.
        seconds: of planning, computing, and sampling and updating.
        work: what is computed, for whom.
        arrived, admitted, preempted, finished, aborted: sequence ids. Finished are those that end after the step.
        forked: ``(parent's id, sequence id)`` of those forked after the step.
        copies: ``(source, destination)``: blocks copied before they were written.
        swapped_out, swapped_in: ``(block id, host block id)``.
        allocated, evicted, published: block ids. Evicted are those that held cached KV and were given to
            somebody else. Published are those that the prefix cache finds after the step.
    """

    index: int = 0
    time: float = 0.0
    seconds: tuple[float, float, float] = (0.0, 0.0, 0.0)
    work: list[Work] = field(default_factory=list)
    arrived: list[str] = field(default_factory=list)
    admitted: list[str] = field(default_factory=list)
    preempted: list[str] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    forked: list[tuple[str, str]] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    swapped_out: list[tuple[int, int]] = field(default_factory=list)
    swapped_in: list[tuple[int, int]] = field(default_factory=list)
    allocated: list[int] = field(default_factory=list)
    evicted: list[int] = field(default_factory=list)
    published: list[int] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens computed in the step."""
        return sum(work.num_tokens for work in self.work)

    def events(self) -> list[str]:
        """What happened, in words, in order."""
        from minipaged.view.words import events

        return events(self)


def snapshot(source) -> Snapshot:
    """The state of a :class:`~minipaged.core.scheduler.Scheduler`, an ``Engine`` or an ``LLM`` at this moment.

    A :class:`Snapshot`, and so a step of a trace, is returned as it is. Whoever runs an ``AsyncLLM`` takes
    ``await llm.snapshot()``.

    Raises:
        InvalidParameterError: ``source`` is none of these.
    """
    if isinstance(source, Snapshot):
        return source
    if isinstance(source, Scheduler):
        return _of_scheduler(source)
    found = source.snapshot() if hasattr(source, "snapshot") else None
    if not isinstance(found, Snapshot):
        if hasattr(found, "close"):
            found.close()  # a coroutine that nobody will await
        raise InvalidParameterError(
            f"a {type(source).__name__} has no block tables to draw; give a Scheduler, an Engine, an LLM, "
            "a step of a Trace, or `await llm.snapshot()` of an AsyncLLM."
        )
    return found


def _of_scheduler(scheduler: Scheduler) -> Snapshot:
    pool = scheduler.pool
    sequences = []
    for request in scheduler.requests.values():
        table = request.block_table
        sequences.append(
            SequenceState(
                number=request.sort_key[2] - 1,
                sequence_id=request.request_id,
                num_prompt_tokens=request.num_prompt_tokens,
                num_tokens=request.num_tokens,
                num_computed_tokens=request.num_computed_tokens,
                block_ids=table.block_ids.copy() if table else [],
                num_preemptions=request.num_preemptions,
            )
        )
    return Snapshot(
        block_size=scheduler.config.block_size,
        sequences=sequences,
        ref_cnts=[block.ref_cnt for block in pool.blocks],
        cached={block.block_id for block in pool.cached.values()},
    )
