"""What may be found in the prefix cache, and what must not."""

from __future__ import annotations

import pytest

from minipaged.config import SamplingParams
from minipaged.core import prefix_cache
from minipaged.core.block_pool import BlockPool
from minipaged.core.block_table import BlockTable
from minipaged.core.prefix_cache import PrefixCache, hash_block, root_hash
from minipaged.core.request import Request


def request(tokens, salt=None, **params):
    return Request("r", tokens, SamplingParams(**params), cache_salt=salt)


def compute(cache, request):
    """Compute and publish a whole request, as the scheduler does over its steps."""
    request.block_table = BlockTable(cache.block_size, cache.pool)
    request.block_table.append_slots(0, request.num_tokens)
    request.num_computed_tokens = request.num_tokens
    cache.publish(request)
    return request.block_table


@pytest.fixture
def cache():
    return PrefixCache(BlockPool(16), block_size=2)


def hit_length(cache, *args, **kwargs):
    return len(cache.match(request(*args, **kwargs)))


def test_hashes_depend_on_parent_tokens_and_salt():
    root = root_hash(None)
    assert len(root) == len(hash_block(root, (1, 2))) == 32
    roots = {root_hash(None), root_hash(""), root_hash("a"), root_hash("\udc80")}
    assert len(roots) == 4
    assert hash_block(root, (1, 2)) == hash_block(root, (1, 2))
    assert len({hash_block(r, t) for r in roots for t in [(1, 2), (2, 1), (258,), (1,)]}) == 16


def test_the_longest_common_run_of_full_blocks_is_found(cache):
    compute(cache, request([1, 2, 3, 4, 5, 6, 7]))
    assert hit_length(cache, [1, 2, 3, 4, 5, 6, 7, 8]) == 3
    assert hit_length(cache, [1, 2, 3, 4, 9, 9, 9]) == 2
    assert hit_length(cache, [1, 9, 3, 4, 5, 6, 7]) == 0
    assert hit_length(cache, [3, 4, 5]) == 0, "KV depends on everything before it"


def test_the_last_token_is_always_computed(cache):
    compute(cache, request([1, 2, 3, 4]))
    assert hit_length(cache, [1, 2, 3, 4]) == 1
    assert hit_length(cache, [1, 2, 3, 4, 5]) == 2
    assert hit_length(cache, [1, 2]) == 0


def test_generated_tokens_are_found_too(cache):
    first = request([1, 2, 3])
    first.token_ids += [4, 5]
    compute(cache, first)
    assert hit_length(cache, [1, 2, 3, 4, 5, 6, 7]) == 2


def test_tenants_with_different_salts_share_nothing(cache):
    compute(cache, request([1, 2, 3], salt="a"))
    assert [hit_length(cache, [1, 2, 3], salt=salt) for salt in ("a", "b", "", None)] == [1, 0, 0, 0]


def test_a_block_is_published_only_once_its_kv_is_computed(cache):
    first = request([1, 2, 3, 4, 5])
    first.block_table = BlockTable(2, cache.pool)
    first.block_table.append_slots(0, 5)
    for computed, hits in [(0, 0), (1, 0), (2, 1), (3, 1), (5, 2)]:
        first.num_computed_tokens = computed
        cache.publish(first)
        assert hit_length(cache, [1, 2, 3, 4, 5]) == hits


def test_an_equal_block_computed_twice_is_published_once_and_no_table_changes(cache):
    one, two = (compute(cache, request([1, 2, 3, 4, 5])) for _ in range(2))
    assert not set(one.block_ids) & set(two.block_ids)
    assert cache.pool.num_cached == 2
    assert [block.block_hash for block in two.blocks] == [None] * 3
    assert cache.match(request([1, 2, 3, 4, 5])) == one.blocks[:2]
    cache.pool.check([one.blocks, two.blocks])


def test_a_copy_continues_the_chain_of_the_first(cache):
    compute(cache, request([1, 2, 3, 4]))
    compute(cache, request([1, 2, 3, 4, 5, 6, 7]))
    assert hit_length(cache, [1, 2, 3, 4, 5, 6, 7]) == 3


def test_requests_with_prompt_logprobs_find_nothing_but_are_found(cache):
    compute(cache, request([1, 2, 3], prompt_logprobs=0))
    assert hit_length(cache, [1, 2, 3], prompt_logprobs=0) == 0
    assert hit_length(cache, [1, 2, 3]) == 1


def test_nothing_is_hashed_while_caching_is_off():
    cache = PrefixCache(BlockPool(4, enable_prefix_caching=False), block_size=2)
    first = request([1, 2, 3])
    compute(cache, first)
    assert first.block_hashes == [] and cache.match(request([1, 2, 3])) == []


def test_an_evicted_block_is_not_found(cache):
    table = compute(cache, request([1, 2, 3, 4, 5]))
    table.release()
    assert hit_length(cache, [1, 2, 3, 4, 5]) == 2
    cache.pool.allocate(15)
    assert hit_length(cache, [1, 2, 3, 4, 5]) == 1, "the tail went first"
    cache.pool.allocate(1)
    assert hit_length(cache, [1, 2, 3, 4, 5]) == 0
    assert cache.pool.num_evicted == 2


def test_a_hash_collision_gives_a_miss_not_foreign_kv(cache, monkeypatch):
    """Equal hashes for different tokens: only a comparison of token ids can tell."""
    monkeypatch.setattr(prefix_cache, "hash_block", lambda parent, tokens: b"same")
    compute(cache, request([1, 2, 3]))
    assert hit_length(cache, [1, 2, 3]) == 1
    assert hit_length(cache, [8, 9, 3]) == 0


def test_a_hash_collision_of_prefixes_gives_a_miss_even_where_the_block_itself_agrees(cache, monkeypatch):
    """[1,2]+[5,6] and [8,9]+[5,6] with equal hashes: the second block's tokens agree, its KV does not."""
    monkeypatch.setattr(prefix_cache, "hash_block", lambda parent, tokens: bytes([len(parent)]) + parent[:1] * 2)
    monkeypatch.setattr(prefix_cache, "root_hash", lambda salt: b"r")
    compute(cache, request([8, 9, 5, 6, 7]))
    compute(cache, request([1, 2]))  # takes the first block's hash over
    assert hit_length(cache, [1, 2, 5, 6, 7]) == 1
    assert hit_length(cache, [8, 9, 5, 6, 7]) == 0


def test_a_hash_collision_of_tenants_gives_a_miss(cache, monkeypatch):
    monkeypatch.setattr(prefix_cache, "root_hash", lambda salt: b"")
    compute(cache, request([1, 2, 3], salt="a"))
    assert hit_length(cache, [1, 2, 3], salt="b") == 0
