"""Recording a trace: what changed from step to step, noted while the engine runs.

    schedule() ──▶ scheduled(plan) ──▶ the model computes ──▶ update() ──▶ updated()
                        │                                                     │
              who runs, whose table changed,                       who came, who ended,
              what became of blocks                                what became of blocks

A step that only goes on (the same sequences, one token each, no block changes hands) costs a comparison
of lists: of the pool nothing is read, it tells its changes itself (``on_event``), and without such a
change no block table can have changed. :mod:`minipaged.view.replay` is the other direction.
"""

from __future__ import annotations

import time
from array import array

from minipaged.core.request import Request, RequestStatus
from minipaged.core.scheduler import Scheduler, SchedulerOutput
from minipaged.view.trace import Trace


class Recorder:
    """Records the steps of one scheduler; between ``schedule()`` and ``update()`` call :meth:`scheduled`.

    The engine does all this for ``start_trace()``. By hand, with a scheduler and no model:

    >>> recorder = Recorder(scheduler)
    >>> plan = scheduler.schedule()
    >>> recorder.scheduled(plan)
    >>> scheduler.update(plan, new_tokens)
    >>> recorder.updated()
    >>> trace = recorder.stop()

    Args:
        scheduler: with any requests.
        max_steps: record no more steps than these; ``None``: all.
        about: facts for the trace's readers, such as the model's name; plain data.
    """

    def __init__(self, scheduler: Scheduler, max_steps: int | None = None, about: dict | None = None):
        self.scheduler = scheduler
        self.max_steps = max_steps
        self.is_full = False
        self._about = {**_limits(scheduler), **(about or {})}
        self._sequences: list[list] = []  # by number: id, prompt tokens, tokens known, number of the parent
        self._numbers: dict[Request, int] = {}  # of those alive
        self._num_added = 0  # to the scheduler, when requests were last looked at
        self._tables: dict[int, list[int]] = {}  # by number, of those running
        # Of each step: planning began, computing began, it was computed, it was over. Numbers, not objects, so that
        # a long recording gives the garbage collector nothing to look through.
        self._times = array("d")
        self._num_steps = 0
        self._records: dict[int, dict] = {}  # by step, what changed in it
        self._plan: SchedulerOutput | None = None  # of the step that is open
        self._started = 0.0
        self._last_ids: list[str] = []  # of a step of which the next can be a mere continuation
        self._last_count = -1  # its tokens; -1: there is no such step
        self._pool_events: list[tuple[str, int]] = []
        self._recording = False
        self._start = self._look()
        self._recording = True
        self._began = time.monotonic()
        self._last_on_event = scheduler.pool.on_event
        scheduler.pool.on_event = self._note if self._last_on_event is None else self._note_and_tell

    def _note(self, kind: str, block_id: int) -> None:
        self._pool_events.append((kind, block_id))

    def _note_and_tell(self, kind: str, block_id: int) -> None:
        self._pool_events.append((kind, block_id))
        self._last_on_event(kind, block_id)

    # -- a step -------------------------------------------------------------------------------------

    def scheduled(self, plan: SchedulerOutput, started: float | None = None) -> None:
        """A step was planned; ``started`` is the ``time.monotonic()`` when planning began."""
        if self._plan is not None:  # nobody said that the last one was over
            self._end_step(self._started, self._started, self._started)
        if self.is_full:
            return
        self._plan = plan
        self._started = time.monotonic() if started is None else started
        scheduler = self.scheduler
        if (
            plan.num_tokens == self._last_count
            and not self._pool_events
            and scheduler.num_added == self._num_added
            and len(scheduler.requests) == len(self._numbers)
            and [sequence.request_id for sequence in plan.scheduled] == self._last_ids
        ):
            return  # it only goes on; so far there is nothing to note
        self._note_step(plan)

    def updated(self, began: float | None = None, computed: float | None = None, ended: float | None = None) -> None:
        """The step that was planned last is over; the times are when computing began, when it and the step ended."""
        if self._plan is None:
            return
        if self._pool_events or self._last_count < 0 or len(self.scheduler.requests) != len(self._numbers):
            self._note_after()
        if ended is None:
            began = computed = ended = time.monotonic()
        self._end_step(began, computed, ended)

    def _end_step(self, began: float, computed: float, ended: float) -> None:
        self._times.extend((self._started, began, computed, ended))
        self._num_steps += 1
        self._plan = None
        if self._num_steps == self.max_steps:
            self._detach()

    def _note_step(self, plan: SchedulerOutput) -> None:
        """Note what a step is, and what planning it changed."""
        step = self._records[self._num_steps] = {}
        ids = [sequence.request_id for sequence in plan.scheduled]
        if self._sync(step) or ids != self._last_ids or plan.num_tokens != self._last_count:
            self._note_run(step, plan, ids)
        if plan.preempted:
            step["preempt"] = [self._drop(request_id) for request_id in plan.preempted]
        self._note_tables(step)
        for name in ("copies", "swap_out", "swap_in"):
            if pairs := getattr(plan, name):
                step[name] = [list(pair) for pair in pairs]
        self._note_blocks(step)

    def _note_after(self) -> None:
        """Note what came of a step: guesses that were right, forks, ends, publications."""
        after: dict = {}
        if self._last_count < 0:
            self._note_accepted(after)
        if self._sync(after):
            self._last_count = -1  # an id may be another sequence's by now
        self._note_tables(after)  # of forks, and of guesses rolled back
        self._note_blocks(after)
        if after:
            self._records.setdefault(self._num_steps, {})["after"] = after

    def stop(self) -> Trace:
        """The trace so far; nothing more is recorded."""
        self.updated()
        end: dict = {}
        if not self.is_full:
            self._sync(end)
            self._note_tables(end)
            self._note_blocks(end)
            self._detach()
        steps = [self._timed(index) for index in range(self._num_steps)]
        return Trace(self._about, self._sequences, self._start, steps, end)

    def _timed(self, index: int) -> dict:
        times = self._times[4 * index : 4 * index + 4]
        parts = [_micro(later - earlier) for earlier, later in zip(times, times[1:], strict=False)]
        return {"t": _micro(times[0] - self._began), "us": parts, **self._records.get(index, {})}

    def _detach(self) -> None:
        self.is_full = True
        self.scheduler.pool.on_event = self._last_on_event

    # -- what changed -------------------------------------------------------------------------------

    def _look(self) -> dict:
        """The state in which recording begins."""
        start: dict = {}
        pool = self.scheduler.pool
        self._sync(start)
        self._note_tables(start)
        start["ref_cnts"] = [[block.block_id, block.ref_cnt] for block in pool.blocks if block.ref_cnt]
        start["cached"] = sorted(block.block_id for block in pool.cached.values())
        start["computed"] = [[self._numbers[r], r.num_computed_tokens] for r in self.scheduler.running]
        return start

    def _sync(self, record: dict) -> bool:
        """Note which requests came and went; whether any did."""
        requests, numbers = self.scheduler.requests, self._numbers
        self._num_added = self.scheduler.num_added
        new = []
        for request in reversed(requests.values()):  # the newest come last in a dict
            if request in numbers:
                break
            new.append(request)
        for request in reversed(new):
            numbers[request] = len(self._sequences)
            self._sequences.append([request.request_id, request.num_prompt_tokens, request.num_tokens])
            if (parent := self._parent_of(request)) is not None:
                self._sequences[-1].append(parent)
            record.setdefault("new", []).append(numbers[request])
        if len(numbers) == len(requests):
            return bool(new)
        for request in [request for request in numbers if request.status in _ENDED]:
            number = numbers.pop(request)
            self._tables.pop(number, None)
            record.setdefault(_ENDED[request.status], []).append(number)
        return True

    def _parent_of(self, request: Request) -> int | None:
        """Number of the sequence that a fork continues: the one of its group with the most blocks in common."""
        priority, arrival, own = request.sort_key
        if own == arrival:
            return None
        group = [other for other in self._numbers if other.sort_key[:2] == (priority, arrival)]
        parent = max(group, key=lambda other: _num_shared(request, other), default=None)
        return None if parent is None else self._numbers[parent]

    def _drop(self, request_id: str) -> int:
        number = self._numbers[self.scheduler.requests[request_id]]
        self._tables.pop(number, None)
        return number

    def _note_tables(self, record: dict) -> None:
        """Note what of each running sequence's table is other than it was: how many blocks it keeps, what follows."""
        if not self._pool_events and self._recording:
            return
        changes, admitted = [], []
        for request in self.scheduler.running:
            number, block_ids = self._numbers[request], request.block_table.block_ids
            known = self._tables.get(number)
            if known == block_ids:
                continue
            if known is None:
                admitted.append([number, request.num_tokens])
            keep = _common(known or (), block_ids)
            changes.append([number, keep, block_ids[keep:]])
            self._tables[number] = block_ids.copy()
        if changes:
            record["tables"] = changes
        if admitted:
            record["admit"] = admitted

    def _note_run(self, step: dict, plan: SchedulerOutput, ids: list[str]) -> None:
        """Note ``[number, tokens, tokens there before, guesses]`` of each sequence; where it decodes, the number
        and the tokens there before."""
        requests, numbers = self.scheduler.requests, self._numbers
        step["run"] = run = []
        for sequence in plan.scheduled:
            number, length = numbers[requests[sequence.request_id]], len(sequence.token_ids)
            run.append([number, length, sequence.num_computed_tokens, sequence.num_lookahead_tokens])
            while len(run[-1]) > 3 and run[-1][-1] == 0:
                run[-1].pop()
        self._last_ids, self._last_count = ids, plan.num_tokens if plan.num_tokens == len(ids) else -1

    def _note_accepted(self, record: dict) -> None:
        """Note how many guesses were right: as many as tokens came beyond the one that every step brings."""
        guessing = {s.request_id: s for s in self._plan.scheduled if s.num_lookahead_tokens}
        if not guessing:
            return
        accepted = []
        for request, number in self._numbers.items():
            if sequence := guessing.get(request.request_id):
                known = sequence.num_computed_tokens + len(sequence.token_ids) - sequence.num_lookahead_tokens
                accepted.append([number, max(request.num_tokens - known - 1, 0)])
        record["accepted"] = accepted

    def _note_blocks(self, record: dict) -> None:
        """Note what became of blocks since the last time, by kind."""
        if not self._pool_events:
            return
        blocks: dict[str, list[int]] = {}
        for kind, block_id in self._pool_events:
            blocks.setdefault(kind, []).append(block_id)
        record["blocks"] = blocks
        self._pool_events.clear()


_ENDED = {RequestStatus.FINISHED: "finish", RequestStatus.ABORTED: "abort"}


def _common(left, right) -> int:
    """How many first elements of two lists are equal."""
    if left and len(left) <= len(right) and right[: len(left)] == left:
        return len(left)
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def _num_shared(request: Request, other: Request) -> int:
    """Blocks at the beginning of both tables."""
    if request.block_table is None or other.block_table is None:
        return 0
    return _common(request.block_table.block_ids, other.block_table.block_ids)


def _micro(seconds: float) -> int:
    return round(seconds * 1e6)


def _limits(scheduler: Scheduler) -> dict:
    """The scheduler's limits, as a trace tells them."""
    names = ("block_size", "num_blocks", "max_num_seqs", "max_num_batched_tokens", "policy")
    return {name: getattr(scheduler.config, name) for name in names}
