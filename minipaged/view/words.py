"""What happened in a step, and how things stand, in words."""

from __future__ import annotations

from minipaged.view.state import SequenceState, Snapshot, Step


def count(number: int, noun: str) -> str:
    """``3, "block"`` to ``"3 blocks"``."""
    if number == 1:
        return f"1 {noun}"
    return f"{number:,} {noun}{'es' if noun.endswith('s') else 's'}"


def listing(items, limit: int = 12) -> str:
    """``[3, 4, 5, 9]`` to ``"3-5, 9"``; other things as they are, separated by commas."""
    parts: list[str] = []
    items = list(items)
    at = 0
    while at < len(items):
        end = at
        while isinstance(items[at], int) and end + 1 < len(items) and items[end + 1] == items[end] + 1:
            end += 1
        if end - at > 1:
            parts.append(f"{items[at]}-{items[end]}")
        else:
            parts += map(str, items[at : end + 1])
        at = end + 1
    if len(parts) > limit:
        return ", ".join(parts[:limit]) + f" and {len(parts) - limit} more"
    return ", ".join(parts)


def summary(state: Snapshot) -> str:
    """One line about the pool: ``"5 of 16 blocks in use, 3 of them shared; 4 cached and free, 7 free"``."""
    shared = f", {state.num_shared} of them shared" if state.num_shared else ""
    cached = f"{state.num_cached_free} cached and free, " if state.num_cached_free else ""
    return f"{state.num_used} of {count(state.num_blocks, 'block')} in use{shared}; {cached}{state.num_free} free"


def describe(state: Snapshot) -> str:
    """A whole snapshot for those who cannot see it."""
    lines = [f"{summary(state)}. A block holds {count(state.block_size, 'token')}."]
    lines += [describe_sequence(sequence) for sequence in state.sequences]
    shared = [f"block {b} by {n}" for b, n in enumerate(state.ref_cnts) if n > 1]
    if shared:
        lines.append(f"Held several times: {listing(shared)}.")
    if state.cached:
        lines.append(f"The prefix cache finds blocks {listing(sorted(state.cached))}.")
    if isinstance(state, Step):
        lines += [f"{event}." for event in events(state)]
    return " ".join(lines)


def describe_sequence(sequence: SequenceState) -> str:
    """Where one sequence stands: ``"request-0: 37 tokens in blocks 0-2."``"""
    tokens = count(sequence.num_tokens, "token")
    if not sequence.is_running:
        again = ", preempted" if sequence.num_preemptions else ""
        return f"{sequence.sequence_id}: {tokens}, waiting{again}."
    return f"{sequence.sequence_id}: {tokens} in blocks {listing(sequence.block_ids)}."


def events(step: Step) -> list[str]:
    """What happened in a step, in order: who came, who lost blocks, what was computed, who left."""
    lines = [f"{name} arrives" for name in step.arrived]
    lines += [f"{name} is preempted: its blocks are taken" for name in step.preempted]
    if step.swapped_out:
        lines.append(f"swapped out to host memory: blocks {listing([block for block, _ in step.swapped_out])}")
    admitted = set(step.admitted)
    plain = [work.sequence.sequence_id for work in step.work if _is_plain(work, admitted)]
    lines += [_work(work, work.sequence.sequence_id in admitted) for work in step.work if not _is_plain(work, admitted)]
    if plain:
        lines.append(f"{listing(plain)} {'decode 1 token each' if len(plain) > 1 else 'decodes 1 token'}")
    lines += [f"copy-on-write: block {source} is copied to block {target}" for source, target in step.copies]
    if step.evicted:
        lines.append(f"evicted from the prefix cache for new tokens: blocks {listing(step.evicted)}")
    if step.published:
        lines.append(f"new in the prefix cache: blocks {listing(step.published)}")
    lines += [f"{child} is forked from {parent}" for parent, child in step.forked]
    lines += [f"{name} finishes: its blocks are given back" for name in step.finished]
    lines += [f"{name} is dropped" for name in step.aborted]
    return lines or ["nothing to compute"]


def _is_plain(work, admitted: set[str]) -> bool:
    """Whether it decodes one token, and there is nothing more to say."""
    return work.kind == "decode" and not work.num_lookahead_tokens and work.sequence.sequence_id not in admitted


def _work(work, admitted: bool) -> str:
    parts = []
    if admitted:
        parts.append("is admitted")
    if work.num_cached_tokens:
        parts.append(f"takes {count(work.num_cached_tokens, 'token')} from the prefix cache")
    if work.num_swapped_tokens:
        parts.append(f"gets {count(work.num_swapped_tokens, 'token')} back from host memory")
    known = work.num_tokens - work.num_lookahead_tokens
    # One that was preempted computes its output again with its prompt.
    noun = "prompt token" if work.num_computed_tokens + known <= work.sequence.num_prompt_tokens else "token"
    parts.append(f"computes {count(known, noun)}" if work.kind == "prefill" else "decodes 1 token")
    if work.num_lookahead_tokens:
        parts.append(f"verifies {count(work.num_lookahead_tokens, 'guess')}, {work.num_accepted_tokens} right")
    return f"{work.sequence.sequence_id} {', '.join(parts)}"
