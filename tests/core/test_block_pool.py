"""Blocks, references and the order in which free blocks are used again."""

from __future__ import annotations

import random

import pytest

from minipaged.core.block_pool import BlockPool, NoFreeBlocksError
from minipaged.errors import IntegrityError


def ids(blocks):
    return [block.block_id for block in blocks]


def publish(pool, blocks, name="x"):
    for i, block in enumerate(blocks):
        pool.publish(block, f"{name}{i}".encode(), (i,), None)


def test_a_fresh_pool_gives_one_contiguous_run():
    pool = BlockPool(8)
    assert ids(pool.allocate(3)) == [0, 1, 2]
    assert pool.num_free == 5


def test_a_sequence_grows_into_the_blocks_behind_it():
    pool = BlockPool(8)
    first = pool.allocate(3)
    pool.free(first)
    head = pool.allocate(1, after=4)
    assert ids(head) == [5]
    assert ids(pool.allocate(3, after=5)) == [6, 7, 0], "behind it as far as possible, then the front of the queue"


def test_a_sequence_grows_into_new_memory_only_when_no_other_is_free():
    pool = BlockPool(8)
    assert pool.going_on(5) == 5, "nothing was written yet"
    gone, last = pool.allocate(2), pool.allocate(2)
    assert pool.going_on(3) == 3, "what is free was never written"
    pool.free(gone[:1])
    assert pool.going_on(3) is None and ids(pool.allocate(1, pool.going_on(3))) == [0]
    assert pool.going_on(3) == 3
    pool.free(last[:1])
    assert pool.going_on(1) == 1, "the block behind it was written before"
    publish(pool, gone)
    pool.free(gone)
    assert ids(pool.allocate(1)) == [2]
    assert pool.going_on(3) == 3, "new memory before what the prefix cache holds"
    assert len(pool.allocate(4, pool.going_on(3))) == 4 and pool.going_on(7) == 7


def test_a_run_freed_tail_first_is_a_run_again():
    pool = BlockPool(4)
    blocks = pool.allocate(4)
    publish(pool, blocks)
    pool.free(blocks)
    assert ids(pool.free_queue()) == [3, 2, 1, 0]
    assert ids(pool.allocate(3)) == [1, 2, 3]


def test_too_many_blocks_raise_and_change_nothing():
    pool = BlockPool(4)
    held = pool.allocate(2)
    before = ids(pool.free_queue())
    with pytest.raises(NoFreeBlocksError, match="3 blocks wanted, 2 of 4"):
        pool.allocate(3, after=1)
    assert ids(pool.free_queue()) == before
    pool.check([held])


def test_uncached_blocks_are_used_before_cached_ones():
    pool = BlockPool(4)
    cached, plain = pool.allocate(2), pool.allocate(2)
    publish(pool, cached)
    pool.free(plain)
    pool.free(cached)
    assert set(ids(pool.allocate(2))) == {2, 3}
    assert (pool.num_evicted, pool.num_cached) == (0, 2)
    pool.allocate(1)
    assert (pool.num_evicted, pool.num_cached) == (1, 1)


def test_the_cached_neighbour_is_not_evicted_for_the_sake_of_contiguity():
    pool = BlockPool(4)
    a, b, c = pool.allocate(1), pool.allocate(1), pool.allocate(1)
    publish(pool, b)
    pool.free(b)
    assert ids(pool.allocate(1, after=0)) == [3]
    pool.check([a, c, [pool.blocks[3]]])


def test_the_least_recently_used_cached_block_goes_first():
    pool = BlockPool(3)
    blocks = pool.allocate(3)
    publish(pool, blocks)
    for block in blocks:
        pool.free([block])
    pool.share([blocks[0]])  # a hit
    pool.free([blocks[0]])
    assert [ids(pool.allocate(1))[0] for _ in range(3)] == [1, 2, 0]


def test_a_hit_takes_a_block_out_of_the_middle_of_the_queue():
    pool = BlockPool(3)
    blocks = pool.allocate(3)
    publish(pool, blocks)
    pool.free(blocks)
    pool.share([blocks[1]])
    assert ids(pool.free_queue()) == [2, 0]
    assert blocks[1].ref_cnt == 1 and blocks[1].block_hash == b"x1"
    pool.check([[blocks[1]]])


def test_publishing_again_replaces_and_a_free_loser_is_used_first():
    pool = BlockPool(3)
    (old,), (new,) = pool.allocate(1), pool.allocate(1)
    publish(pool, [old])
    pool.free([old])
    assert ids(pool.free_queue()) == [2, 0]
    publish(pool, [new])
    assert ids(pool.free_queue()) == [0, 2] and pool.cached == {b"x0": new}
    pool.check([[new]])


def test_a_content_id_is_never_used_twice():
    pool = BlockPool(1)
    seen = set()
    for i in range(5):
        (block,) = pool.allocate(1)
        publish(pool, [block], name=str(i))
        seen.add(block.content_id)
        pool.free([block])
    assert len(seen) == 5


def test_freeing_a_free_block_raises_and_changes_nothing():
    pool = BlockPool(2)
    blocks = pool.allocate(2)
    pool.free(blocks[:1])
    with pytest.raises(IntegrityError, match="block 0 is freed"):
        pool.free([blocks[1], blocks[0]])
    assert blocks[1].ref_cnt == 1
    pool.check([[blocks[1]]])


def test_events_tell_every_change():
    events = []
    pool = BlockPool(1, on_event=lambda kind, block_id: events.append(kind))
    (block,) = pool.allocate(1)
    publish(pool, [block])
    pool.share([block])
    pool.free([block])
    pool.free([block])
    pool.allocate(1)
    assert events == ["allocate", "publish", "share", "free", "free", "evict", "allocate"]


def lost(pool, table):
    table.pop()


def shared_without_reference(pool, table):
    table[0].ref_cnt = 2


def free_and_in_use(pool, table):
    pool._insert_before(pool._queue, table[0])


def twice_in_a_table(pool, table):
    table.append(table[0])
    table[0].ref_cnt = 2


def broken_link(pool, table):
    pool._queue.next.next.prev = pool._queue


def wrong_count(pool, table):
    pool.num_free += 1


def cached_before_uncached(pool, table):
    publish(pool, [pool._queue.next])


def hash_of_nobody(pool, table):
    pool.cached[b"?"] = table[0]


def published_but_not_found(pool, table):
    table[0].block_hash = b"?"


@pytest.mark.parametrize(
    "damage",
    [
        lost,
        shared_without_reference,
        free_and_in_use,
        twice_in_a_table,
        broken_link,
        wrong_count,
        cached_before_uncached,
        hash_of_nobody,
        published_but_not_found,
    ],
)
def test_check_finds(damage):
    pool = BlockPool(6)
    table = pool.allocate(3)
    pool.check([table])
    damage(pool, table)
    with pytest.raises(IntegrityError):
        pool.check([table])


def test_random_calls_keep_the_laws():
    rng = random.Random(0)
    for _ in range(30):
        pool, tables = BlockPool(rng.randint(1, 12)), []
        for step in range(100):
            kind = rng.choice(["allocate", "share", "free", "publish", "unpublish"])
            if kind == "allocate":
                n = rng.randint(1, 4)
                if n <= pool.num_free:
                    tables.append(pool.allocate(n, rng.choice([None, rng.randrange(pool.num_blocks)])))
            elif kind == "share" and pool.cached:
                block = rng.choice(list(pool.cached.values()))
                pool.share([block])
                tables.append([block])
            elif kind == "free" and tables:
                pool.free(tables.pop(rng.randrange(len(tables))))
            elif kind == "publish" and tables:
                pool.publish(rng.choice(rng.choice(tables)), bytes([rng.randrange(6)]), (step,), None)
            elif kind == "unpublish" and pool.cached:
                pool.unpublish(rng.choice(list(pool.cached.values())))
            pool.check(tables)
