"""Saved prefixes: the same tokens after loading as after computing, and nothing but sound files of this model."""

from __future__ import annotations

import asyncio
import os
import random

import numpy as np
import pytest

from minipaged import LLM, AsyncLLM, SamplingParams, session_cache
from minipaged.core.block_pool import NoFreeBlocksError
from minipaged.core.factory import make_scheduler
from minipaged.core.request import Request
from minipaged.core.scheduler import SchedulerConfig
from minipaged.errors import ConfigError, PoolTooSmallError, RequestError, SavedPrefixError
from tests.support.engines import assert_all_blocks_back, generate, make_engine

PROMPT = [random.Random(0).randrange(4, 1024) for _ in range(70)]
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
BACKENDS = [
    {"device": "reference"},
    {"device": "cpu", "dtype": "float32"},
    {"device": "cpu", "quantization": "int8", "kv_cache_dtype": "int8"},
    {"device": "cpu", "quantization": "int4", "kv_cache_dtype": "bfloat16"},
]


def llm_of(**options):
    return LLM("tiny-draft", **{"device": "reference", "num_blocks": 64, "block_size": 16, **options})


@pytest.fixture
def saved(tmp_path):
    """A file that the reference backend saved."""
    with llm_of() as llm:
        assert llm.save_prefix(PROMPT, tmp_path / "a.kv") == 64
    return tmp_path / "a.kv"


@pytest.mark.parametrize("options", BACKENDS, ids=lambda options: "-".join(options.values()))
def test_a_loaded_prefix_gives_the_same_tokens(options, tmp_path):
    path = tmp_path / "a.kv"
    with llm_of(**options) as llm:
        assert llm.save_prefix(PROMPT, path) == 64
        expected = llm.generate([PROMPT + [7]], GREEDY.clone(logprobs=2))[0].outputs[0]
    with llm_of(**options, num_blocks=32, check_integrity=True) as llm:
        assert llm.load_prefix(path) == 64
        output = llm.generate([PROMPT + [7]], GREEDY.clone(logprobs=2))[0]
        assert output.num_cached_tokens == 64
        assert output.outputs[0].token_ids == expected.token_ids
        if options["device"] == "cpu":
            assert output.outputs[0].logprobs == expected.logprobs, "bit for bit"


def test_a_cache_salt_is_that_of_loading(saved):
    with llm_of() as llm:
        llm.load_prefix(saved, cache_salt="tenant")
        assert llm.generate([PROMPT], GREEDY)[0].num_cached_tokens == 0
        assert llm.generate([PROMPT], GREEDY, cache_salt="tenant")[0].num_cached_tokens == 64


def test_loading_twice_and_over_what_is_known_takes_no_further_block(saved):
    with llm_of(check_integrity=True) as llm:
        llm.generate([PROMPT[:40]], GREEDY.clone(max_tokens=1))
        before = llm.stats().num_blocks_cached
        assert before == 2
        llm.load_prefix(saved)
        llm.load_prefix(saved)
        stats = llm.stats()
        assert (stats.num_blocks_cached, stats.num_blocks_used) == (4, 0)


def test_saving_a_loaded_prefix_gives_the_same_file(saved, tmp_path):
    with llm_of() as llm:
        llm.load_prefix(saved)
        llm.save_prefix(PROMPT, tmp_path / "b.kv")
        assert llm.stats().num_prompt_tokens_cached == 64
    assert (tmp_path / "b.kv").read_bytes() == saved.read_bytes()


def test_async(saved, tmp_path):
    async def main():
        async with AsyncLLM("tiny-draft", device="reference", num_blocks=64) as llm:
            assert await llm.load_prefix(saved) == 64
            cached = [output.num_cached_tokens async for output in llm.generate(PROMPT, GREEDY)]
            assert cached[-1] == 64
            assert await llm.save_prefix(PROMPT, tmp_path / "b.kv") == 64
        assert (tmp_path / "b.kv").read_bytes() == saved.read_bytes()

    asyncio.run(main())


@pytest.mark.parametrize(
    "options, named",
    [
        ({"block_size": 8}, "block_size '16' .here '8'"),
        ({"model": "tiny"}, "weights"),
        ({"device": "cpu", "dtype": "float32"}, "device 'reference' .here 'cpu'"),
    ],
)
def test_another_model_or_other_settings_are_refused(saved, options, named):
    options = {"model": "tiny-draft", "device": "reference", "num_blocks": 64, **options}
    with LLM(**options) as llm:
        with pytest.raises(SavedPrefixError, match=named):
            llm.load_prefix(saved)
        assert llm.stats().num_blocks_cached == 0


def test_every_damage_is_found(saved, tmp_path):
    """One byte changed, a piece cut off or added: never loaded, always a typed error."""
    sound, engine = saved.read_bytes(), make_engine()
    session_cache.read(saved, engine)
    path, rng = tmp_path / "damaged.kv", random.Random(1)
    places = [*range(80), *(rng.randrange(len(sound)) for _ in range(120))]
    header_end = 64 + int.from_bytes(sound[12:16], "little")
    padding = set(range(header_end, -(-header_end // 64) * 64)) | set(range(len(sound) - 64, len(sound)))
    for place in places:
        damaged = bytearray(sound)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        if place not in padding:
            with pytest.raises(SavedPrefixError):
                session_cache.read(path, engine)
    for damaged in (b"", sound[:63], sound[:200], sound[:-1], sound[:-64], sound + b"\0", sound * 2, os.urandom(5000)):
        path.write_bytes(damaged)
        with pytest.raises(SavedPrefixError):
            session_cache.read(path, engine)


@pytest.mark.parametrize("make", [lambda p: p.mkdir(), lambda p: None], ids=["directory", "missing"])
def test_what_is_no_file_is_refused(tmp_path, make):
    make(tmp_path / "x")
    with pytest.raises(SavedPrefixError):
        session_cache.read(tmp_path / "x", make_engine())


@pytest.mark.parametrize(
    "token_ids, blocks",
    [
        ([1] * 15, np.zeros((0, 1), np.uint8)),
        ([], np.zeros((0, 1), np.uint8)),
        ([1] * 16, np.zeros((1, 7), np.uint8)),
        ([5000] * 16, None),
        ([-1] * 16, None),
        ([1] * 32, None),
    ],
)
def test_a_well_formed_file_that_does_not_fit_is_refused(tmp_path, token_ids, blocks):
    engine = make_engine()
    if blocks is None:
        blocks = np.zeros((1, engine.runner.kv_cache.block_bytes), np.uint8)
    session_cache.write(tmp_path / "x", session_cache.SavedPrefix(token_ids, blocks), engine)
    with pytest.raises(SavedPrefixError, match="whole blocks"):
        session_cache.read(tmp_path / "x", engine)


def test_a_failed_write_leaves_the_old_file_and_no_other(saved, monkeypatch):
    engine, before = make_engine(), saved.read_bytes()
    prefix = session_cache.read(saved, engine)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match="No space left"):
        session_cache.write(saved, prefix, engine)
    assert saved.read_bytes() == before and os.listdir(saved.parent) == [saved.name]


def test_a_file_of_another_kind_is_not_overwritten(tmp_path):
    (tmp_path / "notes.txt").write_text("keep me, I am longer than eight bytes")
    with llm_of() as llm:
        with pytest.raises(ConfigError, match="left alone"):
            llm.save_prefix(PROMPT, tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text().startswith("keep me")


def test_refusals_carry_numbers(saved, tmp_path):
    with llm_of() as llm, pytest.raises(RequestError, match="15 tokens, fewer than one block of 16"):
        llm.save_prefix(PROMPT[:15], tmp_path / "x")
    with llm_of(num_blocks=3) as llm:
        with pytest.raises(PoolTooSmallError, match="4 blocks of 16 tokens; 3 of the pool's 3"):
            llm.load_prefix(saved)
        assert llm.stats().num_blocks_cached == 0
    for options in ({"enable_prefix_caching": False}, {"policy": "static", "num_blocks": 64}):
        with llm_of(**options) as llm:
            with pytest.raises(ConfigError, match="enable_prefix_caching"):
                llm.load_prefix(saved)
            with pytest.raises(ConfigError, match="enable_prefix_caching"):
                llm.save_prefix(PROMPT, tmp_path / "x")


def test_blocks_in_use_are_left_alone(saved):
    """While a request holds blocks, loading takes only free ones; the request does not notice."""
    alone = generate(make_engine(block_size=16), PROMPT[:30], GREEDY).outputs[0].token_ids
    engine = make_engine(block_size=16, num_blocks=5)
    request_id = engine.add_request(PROMPT[:30], GREEDY)
    for _ in range(4):
        engine.step()
    prefix = session_cache.read(saved, engine)
    with pytest.raises(PoolTooSmallError, match="2 of the pool's 5"):
        session_cache.insert(engine, prefix)
    engine.scheduler.check()
    while engine.has_unfinished():
        outputs = {output.request_id: output for output in engine.step()}
    assert outputs[request_id].outputs[0].token_ids == alone
    session_cache.insert(engine, prefix)
    assert generate(engine, PROMPT, GREEDY.clone(max_tokens=2)).num_cached_tokens == 64
    assert_all_blocks_back(engine)


def test_an_error_while_blocks_are_filled_changes_nothing():
    scheduler = make_scheduler(SchedulerConfig(8, 4, 64, 4, 32))
    cache = scheduler.prefix_cache

    def fail(block_ids, indices):
        raise ZeroDivisionError

    for write, error in ((fail, ZeroDivisionError), (lambda *_: None, NoFreeBlocksError)):
        with pytest.raises(error):
            cache.insert([1] * (12 if write is fail else 36), None, write)
        scheduler.check()
        assert (scheduler.pool.num_free, scheduler.pool.num_cached) == (8, 0)
    written = []
    cache.insert([1] * 12, "salt", lambda *what: written.append(what))
    assert written == [([0, 1, 2], [0, 1, 2])]
    assert cache.find([1] * 12, "salt") == [0, 1, 2] and cache.find([1] * 12, None) == []
    assert len(cache.match(Request("r", [1] * 12, SamplingParams(max_tokens=1), cache_salt="salt"))) == 2
    scheduler.check()
