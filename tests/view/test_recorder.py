"""A trace tells of every step what the scheduler's live state was, and keeps its laws."""

from __future__ import annotations

import random

import pytest

from minipaged.errors import TraceError
from minipaged.view import Trace

VARIANTS = [
    {},
    {"policy": "priority"},
    {"num_host_blocks": 8},
    {"enable_prefix_caching": False},
    {"num_blocks": 40, "max_num_seqs": 8},
    {"policy": "static", "num_blocks": 36},
]


def tables(state):
    return {s.sequence_id: (s.num_prompt_tokens, s.num_tokens, s.block_ids) for s in state.sequences}


def assert_same_state(found, expected):
    assert found.ref_cnts == expected.ref_cnts
    assert found.cached == expected.cached
    assert found.block_size == expected.block_size
    assert tables(found) == tables(expected)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_every_step_is_the_live_state(recorded_run, seed, options):
    run = recorded_run(seed, **options)
    trace = run.trace
    assert len(trace) == len(run.states)
    for step, state, plan in zip(trace.steps, run.states, run.plans, strict=True):
        assert_same_state(step, state)
        computed = {s.sequence_id: s.num_computed_tokens for s in state.sequences}
        assert {s.sequence_id: s.num_computed_tokens for s in step.sequences} == computed
        work = [
            (w.sequence.sequence_id, w.num_tokens, w.num_computed_tokens, w.num_lookahead_tokens) for w in step.work
        ]
        assert work == [
            (s.request_id, len(s.token_ids), s.num_computed_tokens, s.num_lookahead_tokens) for s in plan.scheduled
        ]
        assert step.num_tokens == plan.num_tokens
        assert step.preempted == plan.preempted
        assert step.copies == plan.copies
    assert_same_state(trace.end, run.end)


def test_blocks_are_conserved(run):
    """In every step each block is held as often as tables have it, and the counts add up."""
    for step in run.trace.steps:
        holders = step.holders()
        assert [len(holders.get(block_id, [])) for block_id in range(step.num_blocks)] == step.ref_cnts
        assert step.num_used + step.num_cached_free + step.num_free == step.num_blocks
        for sequence in step.sequences:
            end = sequence.num_computed_tokens + sequence.num_scheduled_tokens
            assert not sequence.is_running or end <= len(sequence.block_ids) * step.block_size


def test_everything_happens_in_the_run(run):
    """Otherwise the other tests would show little."""
    steps = list(run.trace.steps)
    for name in ("arrived", "admitted", "preempted", "finished", "aborted", "forked", "copies", "evicted", "published"):
        assert any(getattr(step, name) for step in steps), name
    assert any(step.swapped_out for step in steps) and any(step.swapped_in for step in steps)
    work = [work for step in steps for work in step.work]
    assert {each.kind for each in work} == {"prefill", "decode"}
    for name in ("num_cached_tokens", "num_lookahead_tokens", "num_accepted_tokens", "num_swapped_tokens"):
        assert any(getattr(each, name) for each in work), name


def test_tokens_add_up(run):
    """Whoever arrives has its prompt computed, cached or swapped in; right guesses are at most the guesses."""
    for step in run.trace.steps:
        for work in step.work:
            assert 0 <= work.num_accepted_tokens <= work.num_lookahead_tokens < work.num_tokens
            assert work.num_cached_tokens + work.num_swapped_tokens in (0, work.num_computed_tokens)


def test_steps_in_any_order(run):
    steps, rng = run.trace.steps, random.Random(0)
    forward = list(steps)
    for index in [rng.randrange(len(steps)) for _ in range(60)]:
        assert steps[index] == forward[index]
    assert steps[-1] == forward[-1] == run.trace.at(len(steps) - 1)
    assert steps[3:5] == forward[3:5]
    with pytest.raises(IndexError, match=f"the trace has {len(steps)} steps"):
        steps[len(steps)]


def test_a_saved_trace_is_the_same(run, tmp_path):
    run.trace.save(tmp_path / "trace.json")
    again = Trace.load(tmp_path / "trace.json")
    assert list(again.steps) == list(run.trace.steps)
    assert again.end == run.trace.end and again.about == run.trace.about
    again.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "trace.json").read_bytes()


def test_recording_ends_after_max_steps(recorded_run):
    whole, part = recorded_run(5, num_steps=30), recorded_run(5, num_steps=30, max_steps=12)
    assert len(part.trace) == 12
    for left, right in zip(whole.trace.steps, part.trace.steps, strict=False):
        assert_same_state(left, right)
    assert part.scheduler.pool.on_event is None


def test_an_earlier_listener_goes_on_hearing(recorded_run):
    from minipaged.core.factory import make_scheduler
    from minipaged.core.scheduler import SchedulerConfig
    from minipaged.view import Recorder

    heard = []
    config = SchedulerConfig(4, 4, 16, 2, 8)
    scheduler = make_scheduler(config, on_event=lambda kind, block_id: heard.append(kind))
    recorder = Recorder(scheduler)
    scheduler.pool.free(scheduler.pool.allocate(1))
    recorder.stop()
    scheduler.pool.allocate(1)
    assert heard == ["allocate", "free", "allocate"]


def test_damaged_files_are_refused(run, tmp_path):
    """Whatever is cut out of a file or changed in it, loading says so, or the result can be drawn."""
    path, text, rng = tmp_path / "trace.json", run.trace.to_json(), random.Random(1)
    refused = 0
    for _ in range(400):
        at, length = rng.randrange(len(text)), rng.randint(1, 12)
        path.write_text(text[:at] + rng.choice(("", "9", "[", '"x"', "-1", "{}")) + text[at + length :])
        try:
            trace = Trace.load(path)
        except TraceError as error:
            assert str(path) in str(error)
            refused += 1
        else:
            for step in trace.steps:
                step.events()
    assert refused > 300


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[1, 2]", "is no trace of minipaged"),
        (b'{"traceEvents": []}', "is no trace of minipaged"),
        (b'{"format": "minipaged-trace", "version": 99}', "version 99; this minipaged reads version 1"),
        (b'{"format": "minipaged-trace", "version": 1}', "damaged in its head: missing 'about'"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_foreign_files_are_refused(tmp_path, content, message):
    path = tmp_path / "other.json"
    path.write_bytes(content)
    with pytest.raises(TraceError, match=message):
        Trace.load(path)
    with pytest.raises(TraceError, match="cannot read the trace .*No such file"):
        Trace.load(tmp_path / "nothing.json")
