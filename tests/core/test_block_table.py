"""Growing, forking, copying before writing, rolling back: to exact block counts."""

from __future__ import annotations

import random

import pytest

from minipaged.core.block_pool import BlockPool, NoFreeBlocksError
from minipaged.core.block_table import BlockTable

BLOCK_SIZES = [2**i for i in range(9)]


def make(num_tokens=0, block_size=4, num_blocks=8):
    pool = BlockPool(num_blocks)
    table = BlockTable(block_size, pool)
    if num_tokens:
        assert table.append_slots(0, num_tokens) == []
    return pool, table


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_slots_are_contiguous_in_a_fresh_pool(block_size):
    _, table = make(3 * block_size, block_size)
    assert [table.slot(position) for position in range(3 * block_size)] == list(range(3 * block_size))
    assert table.capacity == 3 * block_size


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_a_token_takes_a_block_only_when_the_last_is_full(block_size):
    pool, table = make(1, block_size, num_blocks=3)
    for position in range(1, 3 * block_size):
        expected = 1 if position % block_size == 0 else 0
        assert table.num_blocks_needed(position, position + 1) == expected
        free = pool.num_free
        table.append_slots(position, position + 1)
        assert free - pool.num_free == expected
    with pytest.raises(NoFreeBlocksError):
        table.append_slots(3 * block_size, 3 * block_size + 1)
    assert len(table.blocks) == 3
    pool.check([table.blocks])


def test_fork_shares_every_block_and_copies_none():
    pool, table = make(6)
    twin = table.fork()
    assert twin.block_ids == table.block_ids == [0, 1]
    assert [block.ref_cnt for block in table.blocks] == [2, 2]
    assert pool.num_free == 6
    pool.check([table.blocks, twin.blocks])


def test_the_first_to_write_copies_the_partial_tail_and_the_last_owns_it():
    pool, table = make(6)
    twin = table.fork()
    assert twin.num_blocks_needed(6, 7) == 1, "the copy counts"
    assert twin.append_slots(6, 7) == [(1, 2)]
    assert twin.block_ids == [0, 2] and table.block_ids == [0, 1]
    assert table.num_blocks_needed(6, 7) == 0
    assert table.append_slots(6, 7) == []
    pool.check([table.blocks, twin.blocks])


def test_a_fork_on_a_block_boundary_needs_no_copy():
    pool, table = make(8)
    twin = table.fork()
    assert twin.append_slots(8, 9) == [] and table.append_slots(8, 9) == []
    assert twin.block_ids == [0, 1, 2] and table.block_ids == [0, 1, 3]
    pool.check([table.blocks, twin.blocks])


def test_three_forks_make_two_copies():
    pool, table = make(2)
    tables = [table, table.fork(), table.fork()]
    copies = [t.append_slots(2, 3) for t in tables]
    assert copies == [[(0, 1)], [(0, 2)], []]
    pool.check([t.blocks for t in tables])


def test_a_write_over_several_blocks_copies_only_what_it_touches():
    pool, table = make(12, num_blocks=12)
    twin = table.fork()
    assert twin.num_blocks_needed(5, 18) == 4
    assert [source for source, _ in twin.append_slots(5, 18)] == [1, 2]
    assert twin.block_ids[0] == 0 and len(twin.block_ids) == 5
    pool.check([table.blocks, twin.blocks])


def test_no_room_for_the_copy_raises_and_changes_nothing():
    pool, table = make(6, num_blocks=2)
    twin = table.fork()
    with pytest.raises(NoFreeBlocksError):
        twin.append_slots(6, 7)
    assert twin.block_ids == [0, 1]
    pool.check([table.blocks, twin.blocks])


def test_truncate_gives_back_exactly_the_blocks_behind():
    pool, table = make(20)
    for num_tokens, blocks in [(17, 5), (16, 4), (9, 3), (8, 2), (1, 1), (0, 0)]:
        table.truncate(num_tokens)
        assert len(table.blocks) == len(table.block_ids) == blocks == 8 - pool.num_free
        pool.check([table.blocks])


def test_writing_into_a_published_block_after_a_rollback_unpublishes_it():
    pool, table = make(8)
    for i, block in enumerate(table.blocks):
        pool.publish(block, bytes([i]), (0,), None)
    table.truncate(6)
    assert pool.num_cached == 2
    assert table.append_slots(6, 7) == []
    assert list(pool.cached.values()) == [table.blocks[0]]


def test_a_shared_published_block_is_copied_and_stays_published():
    pool, table = make(8)
    pool.publish(table.blocks[1], b"h", (0,), None)
    twin = table.fork()
    twin.truncate(6)
    assert twin.append_slots(6, 7) == [(1, 2)]
    assert pool.cached == {b"h": table.blocks[1]}


def test_release_after_any_history_gives_every_block_back():
    rng = random.Random(1)
    for _ in range(100):
        pool, table = make(1, rng.choice([1, 2, 4]), num_blocks=20)
        tables = {table: 1}
        for _ in range(40):
            table = rng.choice(list(tables))
            kind = rng.choice(["append", "append", "fork", "truncate", "release"])
            start = tables[table]
            if kind == "append":
                end = start + rng.randint(1, 5)
                needed = table.num_blocks_needed(start, end)
                if needed <= pool.num_free:
                    free = pool.num_free
                    copies = table.append_slots(start, end)
                    assert free - pool.num_free == needed
                    assert all(source != destination for source, destination in copies)
                    tables[table] = end
            elif kind == "fork":
                tables[table.fork()] = start
            elif kind == "truncate":
                tables[table] = rng.randint(0, start)
                table.truncate(tables[table])
            elif len(tables) > 1:
                table.release()
                del tables[table]
            pool.check([t.blocks for t in tables])
        for table in tables:
            table.release()
        assert pool.num_free == 20


def test_a_list_of_block_ids_never_changes():
    rng = random.Random(5)
    pool = BlockPool(64)
    tables, seen = [BlockTable(4, pool)], []
    for _ in range(400):
        table = rng.choice(tables)
        num_tokens = rng.randrange(table.capacity + 1)
        match rng.randrange(4):
            case 0 if len(tables) < 6:
                tables.append(table.fork())
            case 1:
                table.truncate(num_tokens)
            case _ if table.num_blocks_needed(num_tokens, num_tokens + 5) <= pool.num_free:
                table.append_slots(num_tokens, num_tokens + 5)
        assert table.block_ids == [block.block_id for block in table.blocks]
        seen.append((table.block_ids, tuple(table.block_ids)))
    assert len({ids for _, ids in seen}) > 100
    assert all(tuple(block_ids) == known for block_ids, known in seen)
