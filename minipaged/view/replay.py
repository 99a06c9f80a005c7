"""From what a trace holds, changes, to what is drawn, states: the other direction of the recorder."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from minipaged.view.state import SequenceState, Snapshot, Step, Work


class Replay:
    """Walks through the records of a trace and keeps the state that they lead to.

    Args:
        about, sequences, start: as :class:`~minipaged.view.trace.Trace` has them.
    """

    def __init__(self, about: dict, sequences: list[list], start: dict):
        self.block_size = about["block_size"]
        self.sequences = sequences
        self.ref_cnts = [0] * about["num_blocks"]
        self.num_references = 0
        self.cached: set[int] = set(start.get("cached", ()))
        self.alive: dict[int, int] = {}  # by number, how often it was preempted
        self.tables: dict[int, list[int]] = {}
        self.known: dict[int, int] = {}
        self.computed: dict[int, int] = {}
        self.last_run: list[int] = []
        for block_id, count in start.get("ref_cnts", ()):
            self.ref_cnts[block_id] = count
            self.num_references += count
        self.apply(start)
        self.computed.update(start.get("computed", ()))

    def apply(self, record: dict) -> None:
        """Make one record's changes."""
        for number in record.get("new", ()):
            self.alive[number] = 0
            self.known[number] = self.sequences[number][2]
            self.computed[number] = 0
        for number in record.get("preempt", ()):
            self.alive[number] += 1
            del self.tables[number]
            self.computed[number] = 0
        for kind in ("finish", "abort"):
            for number in record.get(kind, ()):
                self.tables.pop(number, None)
                del self.alive[number], self.known[number], self.computed[number]
        for number, num_tokens in record.get("admit", ()):
            self.known[number] = num_tokens
        for number, keep, block_ids in record.get("tables", ()):
            self.tables[number] = self.tables.get(number, [])[:keep] + block_ids
        if "blocks" in record:
            self._change(record["blocks"])

    def _change(self, blocks: dict[str, list[int]]) -> None:
        for kind, sign in (("allocate", 1), ("share", 1), ("free", -1)):
            block_ids = blocks.get(kind, ())
            for block_id in block_ids:
                self.ref_cnts[block_id] += sign
            self.num_references += sign * len(block_ids)
        early = []  # evicted before what was published: a block may come and go several times
        for block_id in blocks.get("evict", ()):
            if block_id in self.cached:
                self.cached.remove(block_id)
            else:
                early.append(block_id)
        for block_id in blocks.get("publish", ()):
            if block_id in early:
                early.remove(block_id)
            else:
                self.cached.add(block_id)

    def copy(self) -> Replay:
        """A second walker at the same place."""
        twin = copy.copy(self)
        for name in ("ref_cnts", "cached", "alive", "known", "computed", "last_run"):
            setattr(twin, name, getattr(self, name).copy())
        twin.tables = {number: table.copy() for number, table in self.tables.items()}
        return twin

    def state(self) -> dict:
        """The fields of a :class:`Snapshot`, copied."""
        sequences = []
        for number, num_preemptions in self.alive.items():
            sequence_id, num_prompt_tokens = self.sequences[number][:2]
            sequences.append(
                SequenceState(
                    number,
                    sequence_id,
                    num_prompt_tokens,
                    self.known[number],
                    self.computed[number],
                    self.tables.get(number, []).copy(),
                    0,
                    num_preemptions,
                )
            )
        return dict(
            block_size=self.block_size,
            sequences=sequences,
            ref_cnts=self.ref_cnts.copy(),
            cached=self.cached.copy(),
        )

    # -- steps --------------------------------------------------------------------------------------

    def run_of(self, record: dict) -> list[list[int]]:
        """``[number, tokens, tokens there before, guesses]`` of each sequence that a step computes."""
        if "run" not in record:
            return [[number, 1, self.computed[number], 0] for number in self.last_run]
        return [[*entry, 0][:4] for entry in record["run"]]

    def skip(self, record: dict) -> None:
        """Go through a step without looking at it."""
        self.apply(record)
        self._advance(self.run_of(record), record)

    def step(self, index: int, record: dict) -> Step:
        """Go through a step, and tell all about it."""
        admitted_before = set(self.tables)
        self.apply(record)
        run = self.run_of(record)
        for number, length, start, guesses in run:
            self.computed[number] = start
            self.known[number] = max(self.known[number], start + length - guesses)
        after, blocks = record.get("after", {}), record.get("blocks", {})
        step = Step(
            **self.state(),
            index=index,
            time=record["t"] / 1e6,
            seconds=tuple(part / 1e6 for part in record["us"]),
            arrived=[self.name(n) for n in record.get("new", ()) if self._parent(n) is None],
            preempted=[self.name(n) for n in record.get("preempt", ())],
            copies=[tuple(pair) for pair in record.get("copies", ())],
            swapped_out=[tuple(pair) for pair in record.get("swap_out", ())],
            swapped_in=[(block_id, host_id) for host_id, block_id in record.get("swap_in", ())],
            allocated=list(blocks.get("allocate", ())),
            evicted=[b for b in blocks.get("evict", ()) if b in set(blocks.get("allocate", ()))],
            published=list(after.get("blocks", {}).get("publish", ())),
            finished=[self.name(n) for n in (*record.get("finish", ()), *after.get("finish", ()))],
            aborted=[self.name(n) for n in (*record.get("abort", ()), *after.get("abort", ()))],
            forked=[
                (self.name(self._parent(n)), self.name(n))
                for n in (*record.get("new", ()), *after.get("new", ()))
                if self._parent(n) is not None
            ],
        )
        admitted = [n for n, _ in record.get("admit", ()) if n not in admitted_before]
        step.admitted = [self.name(n) for n in admitted]
        self._add_work(step, run, admitted, dict(after.get("accepted", ())))
        self._advance(run, record)
        return step

    def _add_work(self, step: Step, run: list[list[int]], admitted: list[int], accepted: dict[int, int]) -> None:
        by_number = {sequence.number: sequence for sequence in step.sequences}
        swapped_in = {block_id for block_id, _ in step.swapped_in}
        for number, length, start, guesses in run:
            sequence = by_number[number]
            sequence.num_scheduled_tokens = length
            decodes = length - guesses == 1 and start >= sequence.num_prompt_tokens and start + 1 == sequence.num_tokens
            work = Work(sequence, "decode" if decodes else "prefill", length, start, guesses, accepted.get(number, 0))
            step.work.append(work)
            if number in admitted:  # what it did not compute came from the prefix cache, and behind that from the host
                count = next((i for i, b in enumerate(sequence.block_ids) if b in swapped_in), None)
                work.num_cached_tokens = start if count is None else count * self.block_size
                work.num_swapped_tokens = start - work.num_cached_tokens

    def _advance(self, run: list[list[int]], record: dict) -> None:
        """What holds after the step: tokens were computed, and who drew one knows one more."""
        after = record.get("after", {})
        accepted = dict(after.get("accepted", ()))
        for number, length, start, guesses in run:
            end = start + length - guesses + accepted.get(number, 0)
            self.known[number] = max(self.known[number], end + (end >= self.known[number]))
            self.computed[number] = end
        self.last_run = [number for number, *_ in run]
        self.apply(after)
        for number in after.get("new", ()):
            parent = self._parent(number)
            if number in self.tables and parent in self.computed:
                self.computed[number] = self.computed[parent]

    def name(self, number: int) -> str:
        """The id of a sequence."""
        return self.sequences[number][0]

    def _parent(self, number: int) -> int | None:
        entry = self.sequences[number]
        return entry[3] if len(entry) > 3 else None


class Steps(Sequence):
    """The steps of a trace, made when they are asked for. Going forward costs O(1) a step."""

    CHECKPOINT = 256

    def __init__(self, trace):
        self._trace = trace
        self._checkpoints: dict[int, Replay] = {0: Replay(trace.about, trace.sequences, trace.start)}
        self._replay, self._at = self._checkpoints[0].copy(), 0

    def __len__(self) -> int:
        return len(self._trace.records)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"there is no step {index}; the trace has {len(self)} steps.")
        index %= len(self)
        self._go_to(index)
        step = self._replay.step(index, self._trace.records[index])
        self._at += 1
        return step

    def end(self) -> Snapshot:
        """The state after the last step."""
        self._go_to(len(self))
        replay = self._replay.copy()
        replay.apply(self._trace.end_record)
        return Snapshot(**replay.state())

    def _go_to(self, index: int) -> None:
        if index < self._at or index - self._at > self.CHECKPOINT:
            nearest = max(at for at in self._checkpoints if at <= index)
            if nearest > self._at or index < self._at:
                self._replay, self._at = self._checkpoints[nearest].copy(), nearest
        while self._at < index:
            self._replay.skip(self._trace.records[self._at])
            self._at += 1
            if self._at % self.CHECKPOINT == 0 and self._at not in self._checkpoints:
                self._checkpoints[self._at] = self._replay.copy()
