"""The baseline: contiguous regions, batches that wait for their slowest member."""

from __future__ import annotations

import pytest

from minipaged.core.factory import make_scheduler
from minipaged.core.scheduler import Scheduler, SchedulerConfig
from minipaged.core.static_scheduler import StaticScheduler
from minipaged.errors import PoolTooSmallError


def test_each_sequence_reserves_one_contiguous_region_of_max_model_len(mock_engine):
    engine = mock_engine(policy="static", num_blocks=20, block_size=4, max_model_len=17)
    for batch in range(2):
        requests = [engine.add(f"{batch}.{i}", [i, i], max_tokens=3) for i in range(4)]
        engine.step()
        tables = [request.block_table.block_ids for request in requests]
        assert tables == [list(range(5 * i, 5 * i + 5)) for i in range(4)]
        engine.drain()


def test_a_batch_waits_for_its_slowest_member(mock_engine):
    engine = mock_engine(policy="static", num_blocks=32, block_size=4, max_model_len=32)
    for i, max_tokens in enumerate([2, 9, 2, 2, 2]):
        engine.add(f"r{i}", [i], max_tokens=max_tokens)
    sizes = [len(engine.step().scheduled) for _ in range(11)]
    assert sizes == [4, 4, 1, 1, 1, 1, 1, 1, 1, 1, 1]
    assert not engine.scheduler.has_unfinished


def test_the_pool_bounds_the_batch(mock_engine):
    engine = mock_engine(policy="static", num_blocks=17, block_size=4, max_model_len=32, max_num_seqs=4)
    for i in range(4):
        engine.add(f"r{i}", [i], max_tokens=2)
    assert len(engine.step().scheduled) == 2
    engine.drain()


def test_long_prompts_are_still_computed_in_chunks(mock_engine):
    engine = mock_engine(policy="static", num_blocks=16, max_model_len=32, max_num_batched_tokens=10)
    engine.add("a", list(range(25)), max_tokens=2)
    engine.add("b", list(range(25)), max_tokens=2)
    lengths = [[len(s.token_ids) for s in engine.step().scheduled] for _ in range(3)]
    assert lengths == [[10], [10], [5, 5]]
    engine.drain()
    assert engine.scheduler.num_prompt_tokens_cached == 0


def test_the_pool_must_hold_one_region(mock_engine):
    engine = mock_engine(policy="static", num_blocks=7, block_size=4, max_model_len=32)
    with pytest.raises(PoolTooSmallError, match=r"32 tokens, 8 KV blocks.*has 7 blocks"):
        engine.add("a", [1])


def test_a_fork_joins_a_later_batch(mock_engine):
    engine = mock_engine(policy="static", num_blocks=32, max_model_len=32)
    engine.add("a", [1, 2, 3], max_tokens=4)
    engine.step()
    engine.fork("a", "b", 4)
    assert len(engine.step().scheduled) == 1
    engine.drain()
    assert len(engine.results["b"]) == 4


def test_the_policy_names_the_scheduler():
    for policy, cls in [("fcfs", Scheduler), ("priority", Scheduler), ("static", StaticScheduler)]:
        assert type(make_scheduler(SchedulerConfig(8, 4, 32, 4, 32, True, policy))) is cls
