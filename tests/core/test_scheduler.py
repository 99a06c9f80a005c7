"""What a step contains: budget, order, chunks, hits, preemption, forks, refusals."""

from __future__ import annotations

import random
import time

import pytest

from minipaged.config import SamplingParams
from minipaged.core.request import Request, RequestStatus
from minipaged.core.scheduler import SchedulerConfig
from minipaged.errors import (
    ConfigError,
    IntegrityError,
    InvalidParameterError,
    PoolTooSmallError,
    PromptTooLongError,
    RequestError,
    UnknownRequestError,
)


def shape(output):
    """``{request_id: (first position, number of tokens)}``"""
    return {s.request_id: (s.num_computed_tokens, len(s.token_ids)) for s in output.scheduled}


def test_a_prompt_is_computed_in_chunks_and_samples_at_its_end(mock_engine):
    engine = mock_engine(max_num_batched_tokens=10)
    engine.add("a", list(range(25)), max_tokens=2)
    outputs = [engine.step() for _ in range(4)]
    assert [shape(o)["a"] for o in outputs] == [(0, 10), (10, 10), (20, 5), (25, 1)]
    assert [o.scheduled[0].samples for o in outputs] == [False, False, True, True]
    assert not engine.scheduler.has_unfinished


def test_decodes_come_first_and_prompts_share_what_is_left(mock_engine):
    engine = mock_engine(max_num_batched_tokens=10)
    engine.add("a", [1] * 3, max_tokens=9)
    engine.add("b", [2] * 12, max_tokens=9)
    assert shape(engine.step()) == {"a": (0, 3), "b": (0, 7)}
    engine.add("c", [3] * 9, max_tokens=9)
    output = engine.step()
    assert list(shape(output).items()) == [("a", (3, 1)), ("b", (7, 5)), ("c", (0, 4))]
    assert output.num_tokens == 10


def test_no_more_sequences_than_max_num_seqs(mock_engine):
    engine = mock_engine(max_num_seqs=2, num_blocks=64)
    for i in range(5):
        engine.add(f"r{i}", [i, i], max_tokens=3)
    assert list(shape(engine.step())) == ["r0", "r1"]
    engine.drain()
    assert list(engine.results) == ["r0", "r1", "r2", "r3", "r4"]


def test_a_prefix_hit_skips_the_computation_and_is_reported_once(mock_engine):
    engine = mock_engine()
    engine.add("a", list(range(10)), max_tokens=1)
    engine.drain()
    b = engine.add("b", list(range(10)) + [7], max_tokens=1)
    assert shape(engine.step()) == {"b": (8, 3)}
    assert b.num_cached_tokens == 8
    stats = engine.scheduler.stats()
    assert (stats["num_prompt_tokens_computed"], stats["num_prompt_tokens_cached"]) == (13, 8)


def test_a_prompt_that_is_wholly_cached_still_computes_its_last_token(mock_engine):
    engine = mock_engine()
    for name in "ab":
        request = engine.add(name, list(range(8)), max_tokens=1)
        engine.drain()
    assert request.num_cached_tokens == 4


def test_each_turn_of_a_conversation_finds_all_turns_before_it(mock_engine):
    engine = mock_engine()
    prompt = [1, 2, 3]
    for turn, cached in enumerate([0, 4, 8, 12]):
        request = engine.add(f"turn {turn}", prompt, max_tokens=3)
        engine.drain()
        assert request.num_cached_tokens == cached
        prompt = request.token_ids + [4]


def test_the_continuation_of_a_fork_is_found(mock_engine):
    engine = mock_engine()
    engine.add("a", list(range(9)), max_tokens=8)
    engine.step()
    child = engine.fork("a", "b", 8)
    engine.drain()
    c = engine.add("c", child.token_ids, max_tokens=1)
    engine.drain()
    assert c.num_cached_tokens == 16


def test_what_is_computed_again_after_a_preemption_is_published_again(mock_engine):
    engine = mock_engine(num_blocks=6, policy="priority")
    a = engine.add("a", list(range(12)), max_tokens=2, priority=1)
    engine.step()
    engine.add("urgent", [4] * 22, max_tokens=1)  # takes every block
    engine.drain()
    assert a.num_preemptions == 1
    b = engine.add("b", list(range(12)) + [0], max_tokens=1)
    engine.drain()
    assert b.num_cached_tokens == 12


def test_a_half_full_block_of_a_running_request_gets_no_hash(mock_engine):
    """Looking for somebody who computes a block must not mistake half of it for the whole."""
    engine = mock_engine(num_blocks=32)
    a = engine.add("a", list(range(6)), max_tokens=6)
    engine.step()
    engine.add("b", list(range(4)) + [9] * 8, max_tokens=1)
    assert shape(engine.step()) == {"a": (6, 1), "b": (4, 8)}
    engine.drain()
    c = engine.add("c", a.token_ids + [0], max_tokens=1)
    engine.drain()
    assert c.num_cached_tokens == 8


def test_nobody_waits_for_a_block_that_could_not_be_hit(mock_engine):
    """The last token is computed in any case, so a prompt of one block gains nothing by waiting."""
    engine = mock_engine()
    for name in "ab":
        engine.add(name, [1, 2, 3, 4])
    assert len(engine.step().scheduled) == 2


def test_prompt_logprobs_compute_every_prompt_token(mock_engine):
    engine = mock_engine()
    engine.add("a", list(range(10)), max_tokens=1)
    engine.drain()
    engine.add("b", list(range(10)), max_tokens=1, prompt_logprobs=1)
    assert shape(engine.step()) == {"b": (0, 10)}


def test_the_youngest_is_preempted_and_computes_its_tokens_again(mock_engine):
    engine = mock_engine(num_blocks=6, enable_prefix_caching=False)
    engine.add("a", [1] * 8, max_tokens=8)
    b = engine.add("b", [2] * 7, max_tokens=8)
    preempted = []
    while engine.scheduler.has_unfinished:
        preempted += engine.step().preempted
    assert preempted == ["b"]
    assert (b.num_preemptions, engine.scheduler.num_preemptions) == (1, 1)
    assert len(engine.results["b"]) == 8
    assert engine.scheduler.num_generated_tokens == 16, "no token is generated twice"


def test_after_preemption_the_cache_gives_back_what_was_not_evicted(mock_engine):
    engine = mock_engine(num_blocks=7)
    engine.add("a", [1] * 8, max_tokens=9)
    b = engine.add("b", [2] * 11, max_tokens=6)
    starts = []
    while engine.scheduler.has_unfinished:
        starts.append(shape(engine.step()).get("b"))
    assert b.num_preemptions == 1 and b.num_cached_tokens == 0
    restart = starts.index(None)
    again = next(start for start in starts[restart:] if start)
    assert again[0] > 0 and again[0] % 4 == 0


def test_fcfs_ignores_priority(mock_engine):
    engine = mock_engine(max_num_seqs=1)
    for name, priority in [("a", 5), ("b", 0)]:
        engine.add(name, [1], priority=priority)
    engine.drain()
    assert list(engine.results) == ["a", "b"]


def test_priority_admits_lower_values_first_then_arrival(mock_engine):
    engine = mock_engine(max_num_seqs=1, policy="priority")
    for name, priority in [("a", 2), ("b", 1), ("c", -1), ("d", 1)]:
        engine.add(name, [1], priority=priority)
    engine.drain()
    assert list(engine.results) == ["c", "b", "d", "a"]


@pytest.mark.parametrize("limit", [dict(num_blocks=4), dict(max_num_seqs=2)])
def test_an_urgent_request_takes_the_place_of_the_least_urgent(mock_engine, limit):
    engine = mock_engine(policy="priority", **limit)
    engine.add("a", [1] * 5, max_tokens=4, priority=1)
    engine.add("b", [2] * 3, max_tokens=4, priority=2)
    engine.step()
    engine.add("urgent", [3] * 3, max_tokens=4, priority=0)
    output = engine.step()
    assert output.preempted == ["b"] and "urgent" in shape(output)
    engine.drain()
    assert list(engine.results)[-1] == "b"


def test_equal_priority_never_preempts_for_admission(mock_engine):
    engine = mock_engine(policy="priority", max_num_seqs=1)
    engine.add("a", [1], max_tokens=9, priority=1)
    engine.step()
    engine.add("b", [1], max_tokens=1, priority=1)
    assert engine.step().preempted == []


def test_a_full_pool_admits_nobody_who_would_be_preempted_at_once(mock_engine):
    engine = mock_engine(num_blocks=4)
    engine.add("a", [1] * 4, max_tokens=12)
    engine.add("b", [2] * 12, max_tokens=1)
    assert list(shape(engine.step())) == ["a"], "three blocks are free, one of them is a's next"
    engine.drain()
    assert engine.scheduler.num_preemptions == 0


def test_a_lone_request_may_fill_the_pool_to_the_last_slot(mock_engine):
    engine = mock_engine(num_blocks=3, max_num_batched_tokens=4)
    engine.add("a", [1] * 6, max_tokens=7)  # the 13th token is never fed back
    engine.drain()
    assert len(engine.results["a"]) == 7


# -- forks --------------------------------------------------------------------------------------


def test_a_fork_shares_the_kv_and_copies_the_block_it_writes(mock_engine):
    engine = mock_engine()
    engine.add("a", list(range(6)), max_tokens=5)
    engine.step()
    engine.fork("a", "b", 5)
    used = engine.scheduler.stats()["num_blocks_used"]
    output = engine.step()
    assert output.copies == [(1, 2)] and shape(output) == {"a": (6, 1), "b": (6, 1)}
    assert engine.scheduler.stats()["num_blocks_used"] == used + 1
    assert engine.step().copies == []
    engine.drain()
    assert engine.scheduler.num_blocks_copied == 1
    assert engine.results["a"] != engine.results["b"] and len(engine.results["b"]) == 5


def test_a_fork_without_a_free_seat_waits_and_gives_the_same_tokens(mock_engine):
    results = []
    for max_num_seqs in (1, 2):
        engine = mock_engine(max_num_seqs=max_num_seqs)
        engine.add("a", list(range(6)), max_tokens=5)
        engine.step()
        child = engine.fork("a", "b", 5)
        assert (child.status is RequestStatus.WAITING) == (max_num_seqs == 1)
        engine.drain()
        results.append(engine.results["b"])
    assert results[0] == results[1]


def test_a_fork_is_refused_whole(mock_engine):
    engine = mock_engine()
    engine.add("a", [1, 2], max_tokens=5)
    for _ in range(3):
        engine.step()
    with pytest.raises(UnknownRequestError, match="'x'"):
        engine.fork("x", "b", 5)
    with pytest.raises(RequestError, match="in use"):
        engine.fork("a", "a", 5)
    with pytest.raises(RequestError, match="has 5 tokens already"):
        engine.fork("a", "b", 3)
    assert list(engine.scheduler.requests) == ["a"]
    engine.scheduler.check()


# -- refusals, aborts -----------------------------------------------------------------------------


def test_refusals_carry_the_numbers(mock_engine):
    scheduler = mock_engine(num_blocks=4, block_size=4, max_model_len=20).scheduler
    scheduler.check_admissible(13, SamplingParams(max_tokens=4))
    with pytest.raises(PoolTooSmallError, match=r"14 tokens.*\(4\).*5 KV blocks of 4.*pool has 4"):
        scheduler.check_admissible(14, SamplingParams(max_tokens=4))
    with pytest.raises(PromptTooLongError, match=r"18 tokens.*\(3\) is 21.*\(20\)"):
        scheduler.check_admissible(18, SamplingParams(max_tokens=3))
    with pytest.raises(RequestError, match="no tokens"):
        scheduler.check_admissible(0, SamplingParams(max_tokens=3))


def test_add_refuses_and_changes_nothing(mock_engine):
    engine = mock_engine()
    engine.add("a", [1])
    for name, prompt in [("a", [1]), ("b", []), ("c", [1] * 64)]:
        with pytest.raises(RequestError):
            engine.add(name, prompt)
    assert list(engine.scheduler.requests) == ["a"] and len(engine.scheduler.waiting) == 1
    with pytest.raises(InvalidParameterError, match="max_tokens is None"):
        Request("d", [1], SamplingParams(max_tokens=None))


def test_a_budget_below_the_number_of_sequences_is_refused():
    with pytest.raises(ConfigError, match="3, fewer than max_num_seqs .4."):
        SchedulerConfig(8, 4, 64, max_num_seqs=4, max_num_batched_tokens=3)


def test_finish_and_abort_of_nobody(mock_engine):
    scheduler = mock_engine().scheduler
    assert scheduler.abort("x") is False
    with pytest.raises(UnknownRequestError):
        scheduler.finish("x")


def test_a_step_without_requests_is_empty(mock_engine):
    output = mock_engine().scheduler.schedule()
    assert (output.scheduled, output.copies, output.preempted, output.num_tokens) == ([], [], [], 0)


def test_a_step_that_brought_no_token_is_not_lost(mock_engine):
    """A row of NaN gives no token; the engine ends that request, the others go on."""
    engine = mock_engine()
    engine.add("a", [1, 2])
    engine.add("b", [3, 4])
    output = engine.scheduler.schedule()
    engine.scheduler.update(output, {"b": [0]})
    assert list(shape(engine.scheduler.schedule())) == ["b"]
    engine.scheduler.abort("a")
    engine.scheduler.check()


def test_check_finds_a_request_in_the_wrong_place(mock_engine):
    engine = mock_engine()
    engine.add("a", [1, 2])
    engine.add("b", [3])
    engine.scheduler.waiting.reverse()
    with pytest.raises(IntegrityError, match="out of order"):
        engine.scheduler.check()
    engine.scheduler.waiting.pop()
    with pytest.raises(IntegrityError, match="not those"):
        engine.scheduler.check()


def test_two_schedulers_know_nothing_of_each_other(mock_engine):
    one, two = mock_engine(block_size=4), mock_engine(block_size=8)
    for engine in (one, two):
        engine.add("a", list(range(20)), max_tokens=5)
    one.step()
    two.drain()
    one.drain()
    assert one.results == two.results


def test_a_step_of_64_decodes_costs_well_under_a_millisecond():
    from minipaged.core.factory import make_scheduler

    scheduler = make_scheduler(SchedulerConfig(1024, 16, 1024, 64, 1024))
    for i in range(64):
        scheduler.add(Request(str(i), [i] * 8, SamplingParams(max_tokens=200)))
    seconds = []
    for _ in range(100):
        start = time.process_time()
        output = scheduler.schedule()
        scheduler.update(output, {s.request_id: [1] for s in output.scheduled})
        seconds.append(time.process_time() - start)
    assert len(output.scheduled) == 64
    assert min(seconds) < 1e-3


def test_no_more_blocks_are_ever_written_than_were_in_use_at_once(mock_engine):
    """Memory that was never written costs nothing; so what is free and was written is used first."""
    in_use, written, most = set(), set(), 0

    def follow(kind, block_id):
        nonlocal most
        (in_use.add if kind == "allocate" else in_use.remove)(block_id)
        written.add(block_id)
        most = max(most, len(in_use))

    engine = mock_engine(follow, num_blocks=400, max_num_seqs=16, enable_prefix_caching=False)
    rng = random.Random(0)
    for i in range(60):
        engine.add(f"r{i}", [rng.randrange(5) for _ in range(rng.randint(1, 30))], max_tokens=rng.randint(1, 30))
    engine.drain()
    assert len(written) == most > 100 and not in_use
