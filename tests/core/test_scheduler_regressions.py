"""Bugs that other engines had (or have), each a test named for what went wrong there."""

from __future__ import annotations

import random

import pytest

from minipaged.errors import PoolTooSmallError, PromptTooLongError


def test_nano_vllm_274_an_impossible_request_kills_the_engine(mock_engine):
    """There, a request that the pool cannot hold ends in a bare assert. Here it fails alone, at admission."""
    engine = mock_engine(num_blocks=4, block_size=4)
    engine.add("good", [1, 2, 3], max_tokens=6)
    engine.step()
    with pytest.raises(PoolTooSmallError):
        engine.add("impossible", [1] * 30, max_tokens=4)
    engine.drain()
    assert len(engine.results["good"]) == 6


def test_nano_vllm_274_a_request_that_outgrows_the_pool_while_decoding(mock_engine):
    """Two requests fit the pool only one at a time; both finish."""
    engine = mock_engine(num_blocks=4, block_size=4)
    for name in "ab":
        engine.add(name, [ord(name)], max_tokens=15)
    engine.drain()
    assert [len(tokens) for tokens in engine.results.values()] == [15, 15]
    assert engine.scheduler.num_preemptions > 0


def test_nano_vllm_73_arriving_prefills_starve_decode(mock_engine):
    """There, one running sequence got 0 tokens in 50 steps while prompts kept arriving. Here it gets 50."""
    engine = mock_engine(num_blocks=400, max_num_seqs=8, max_num_batched_tokens=16)
    running = engine.add("running", [1, 2, 3], max_tokens=60)
    engine.step()
    for i in range(50):
        engine.add(f"arriving {i}", [i % 5] * 40, max_tokens=1)
        before = running.num_tokens
        engine.step()
        assert running.num_tokens == before + 1
    engine.drain()


def test_nano_vllm_219_identical_prompts_in_one_step_share_nothing(mock_engine):
    """There, each of them computed the whole prompt. Here the second waits for the first one's blocks."""
    engine = mock_engine(num_blocks=64, max_num_seqs=8)
    prompt = list(range(17))
    requests = [engine.add(f"r{i}", prompt, max_tokens=3) for i in range(5)]
    output = engine.step()
    assert [s.request_id for s in output.scheduled] == ["r0"]
    output = engine.step()
    assert sorted(len(s.token_ids) for s in output.scheduled) == [1] * 5
    assert [request.num_cached_tokens for request in requests] == [0, 16, 16, 16, 16]
    assert requests[0].block_table.block_ids[:4] == requests[4].block_table.block_ids[:4]
    engine.drain()
    assert engine.scheduler.num_prompt_tokens_computed == 17 + 4


def test_nano_vllm_219_a_common_prefix_is_computed_once_over_several_chunks(mock_engine):
    engine = mock_engine(num_blocks=64, max_num_batched_tokens=8)
    shared = list(range(20))
    engine.add("a", shared + [7, 7], max_tokens=3)
    b = engine.add("b", shared + [8, 8], max_tokens=3)
    engine.drain()
    assert b.num_cached_tokens == 20
    assert engine.scheduler.num_prompt_tokens_computed == 22 + 2


def test_holding_back_a_duplicate_ends_when_its_leader_is_aborted(mock_engine):
    engine = mock_engine(max_num_batched_tokens=8)
    engine.add("a", list(range(20)), max_tokens=3)
    engine.add("b", list(range(20)), max_tokens=3)
    assert [s.request_id for s in engine.step().scheduled] == ["a"]
    engine.scheduler.abort("a")
    output = engine.step()
    assert [(s.request_id, s.num_computed_tokens) for s in output.scheduled] == [("b", 8)]
    engine.drain()


def test_different_salts_are_not_held_back_for_each_other(mock_engine):
    engine = mock_engine()
    engine.add("a", list(range(10)), cache_salt="a")
    engine.add("b", list(range(10)), cache_salt="b")
    assert len(engine.step().scheduled) == 2


def test_mini_sglang_142_a_duplicate_prompt_leaves_a_live_table_on_freed_blocks(mock_engine):
    """There, freeing the second copy of a prefix left a live row pointing at it. Here tables keep their own."""
    engine = mock_engine(num_blocks=8)
    # prompt_logprobs compute everything themselves, so both hold a copy of the same blocks
    a = engine.add("a", list(range(9)), max_tokens=6, prompt_logprobs=0)
    b = engine.add("b", list(range(9)), max_tokens=6, prompt_logprobs=0)
    engine.step()
    assert not set(a.block_table.block_ids) & set(b.block_table.block_ids)
    assert engine.scheduler.pool.num_cached == 2, "each prefix is in the cache once"
    kept = b.block_table.block_ids.copy()
    engine.scheduler.abort("a")
    engine.scheduler.check()
    engine.add("c", [4] * 13, max_tokens=3)  # takes whatever is free
    engine.step()  # the mock model verifies that b still reads its own KV
    assert b.block_table.block_ids[: len(kept)] == kept
    engine.drain()
    assert len(engine.results["b"]) == 6


@pytest.mark.parametrize("point", [0, 1, 2])
@pytest.mark.parametrize("chunk", [0, 1, 2])
def test_mini_sglang_abort_during_prefill_leaves_blocks_in_cache_and_free_list_at_once(mock_engine, point, chunk):
    """Abort after schedule, after execute and after update of each chunk of a prompt."""
    engine = mock_engine(max_num_batched_tokens=8)
    prompt = list(range(22))
    engine.add("a", prompt, max_tokens=3)
    engine.add("other", [4] * 3, max_tokens=9)
    for _ in range(chunk):
        engine.step()
    calls = []

    def abort_at_point():
        if len(calls) == point:
            assert engine.scheduler.abort("a")
            engine.scheduler.check()
        calls.append(None)

    engine.step(abort_at_point)
    published = 8 * (chunk + (point == 2))  # of an unfinished step nothing is published
    again = engine.add("again", prompt, max_tokens=3)
    engine.drain()
    assert again.num_cached_tokens == min(published // 4 * 4, 20)


def test_mini_sglang_an_overlong_prompt_is_never_answered(mock_engine):
    """There, it was logged and dropped. Here the caller gets a typed error with the numbers, at once."""
    engine = mock_engine(max_model_len=32)
    with pytest.raises(PromptTooLongError, match="prompt .30 tokens. plus max_tokens .4. is 34"):
        engine.add("long", list(range(30)), max_tokens=4)
    with pytest.raises(PromptTooLongError, match="Shorten the prompt or lower max_tokens.$"):
        engine.add("long", list(range(31)), max_tokens=4)
    with pytest.raises(PromptTooLongError, match="Shorten the prompt.$"):  # no max_tokens would help
        engine.add("long", list(range(32)), max_tokens=4)
    assert not engine.scheduler.has_unfinished


def test_an_aborted_id_used_again_before_update_does_not_get_the_old_tokens(mock_engine):
    engine = mock_engine()
    engine.add("a", [1, 2, 3], max_tokens=3)
    output = engine.scheduler.schedule()
    engine.scheduler.abort("a")
    new = engine.add("a", [4, 4], max_tokens=3)
    engine.scheduler.update(output, {"a": [0]})
    assert new.token_ids == [4, 4] and new.num_computed_tokens == 0
    engine.scheduler.check()
    engine.drain()


def test_tails_are_evicted_before_heads(mock_engine):
    """A cached block is of use only while all blocks before it are; evicting a head loses the tail too."""
    engine = mock_engine(num_blocks=8)
    prompt = list(range(16))
    engine.add("a", prompt, max_tokens=1)
    engine.drain()
    engine.add("b", [4] * 21, max_tokens=1)  # six blocks: four never cached, two evicted
    engine.drain()
    c = engine.add("c", prompt + [0], max_tokens=1)
    engine.step()
    assert c.num_cached_tokens == 8


def test_openvino_the_capacity_check_counts_the_copies(mock_engine):
    """Forks share a half-full block; when all write, all but one need a block, though no table grows."""
    engine = mock_engine(num_blocks=4, block_size=4)
    engine.add("a", [1, 2, 3, 4, 0], max_tokens=3)
    engine.step()
    for child in "bcd":
        engine.fork("a", child, 3)
    needed = [r.block_table.num_blocks_needed(5, 6) for r in engine.scheduler.running]
    assert needed == [1, 1, 1, 1] and engine.scheduler.pool.num_free == 2
    output = engine.step()
    assert len(output.copies) == 2, "a and b copy"
    assert [s.request_id for s in output.scheduled] == ["a", "b", "c"], "d gave way, then c owns the block alone"
    assert output.preempted == ["d"]
    engine.drain()
    assert {name: len(tokens) for name, tokens in engine.results.items()} == dict.fromkeys("abcd", 3)


def test_a_stream_of_later_requests_does_not_overtake_a_large_one(mock_engine):
    """The large request waits for those running when it came, and for nobody after it."""
    rng = random.Random(3)
    engine = mock_engine(num_blocks=10, max_num_batched_tokens=64)
    for i in range(4):
        engine.add(f"early {i}", [rng.randrange(5)], max_tokens=6)
    engine.step()
    large = engine.add("large", [3] * 38, max_tokens=2)
    for i in range(30):
        engine.add(f"late {i}", [rng.randrange(5)], max_tokens=6)
        engine.step()
        if large.num_computed_tokens:
            break
    assert i < 8
    engine.drain()
