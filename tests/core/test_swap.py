"""Swap space: what is stored and restored, what it costs, and that no host block is lost."""

from __future__ import annotations

import pytest

from minipaged.config import SamplingParams
from minipaged.core.block_pool import BlockPool
from minipaged.core.block_table import BlockTable
from minipaged.core.request import Request
from minipaged.core.scheduler_output import SchedulerOutput
from minipaged.core.swap import SwapSpace
from minipaged.errors import IntegrityError


def running(pool: BlockPool, num_computed: int, request_id: str = "r") -> Request:
    request = Request(request_id, list(range(num_computed + 1)), SamplingParams(max_tokens=4))
    request.block_table = BlockTable(4, pool)
    request.block_table.append_slots(0, num_computed)
    request.num_computed_tokens = num_computed
    return request


def swap_out(swap: SwapSpace, request: Request) -> list:
    output = SchedulerOutput()
    swap.store(request, output)
    request.block_table.release()
    request.num_computed_tokens = 0
    return output.swap_out


def test_out_and_in_again_behind_a_prefix_hit():
    pool, swap = BlockPool(8), SwapSpace(5, 4)
    request = running(pool, 10)
    assert swap_out(swap, request) == [(0, 0), (1, 1), (2, 2)]
    assert swap.num_free == 2
    swap.check([request], [])
    request.block_table = BlockTable(4, pool)
    pool.allocate(2)
    request.block_table.append_slots(0, 11)
    request.num_computed_tokens = 4  # a hit of one block
    output = SchedulerOutput()
    swap.restore(request, output)
    assert output.swap_in == [(1, 3), (2, 4)] and request.num_computed_tokens == 10
    assert swap.num_free == 5 and (swap.num_swapped_out, swap.num_swapped_in) == (3, 2)
    swap.check([], [request])


def test_a_hit_as_long_as_what_was_swapped_needs_no_copy():
    swap, request = SwapSpace(5, 4), running(BlockPool(8), 8)
    swap_out(swap, request)
    request.num_computed_tokens = 8
    output = SchedulerOutput()
    swap.restore(request, output)
    assert output.swap_in == [] and request.num_computed_tokens == 8 and swap.num_free == 5


def test_what_does_not_fit_or_was_not_computed_is_left():
    pool, swap = BlockPool(8), SwapSpace(2, 4)
    assert swap_out(swap, running(pool, 9)) == [] and swap.num_free == 2
    assert swap_out(swap, running(pool, 0)) == []
    first, second = running(pool, 8, "a"), running(pool, 4, "b")
    assert len(swap_out(swap, first)) == 2 and swap_out(swap, second) == []
    swap.drop(first)
    assert swap.num_free == 2 and len(swap_out(swap, running(pool, 4))) == 1


def test_the_cheaper_way_is_taken():
    """3 blocks out and in against 12 tokens: at 1 s a block, from half a second a token on."""
    for seconds_per_token, swapped in ((0.6, True), (0.4, False)):
        swap = SwapSpace(8, 4)
        swap.note_copies(10, 10.0)
        swap.note_computed(10, 10 * seconds_per_token)
        swap.note_copies(1, 50.0)  # a slow moment teaches nothing
        swap.note_computed(1, 50.0)
        assert bool(swap_out(swap, running(BlockPool(8), 12))) == swapped


def test_blocks_that_others_hold_are_not_counted_as_lost():
    pool, swap = BlockPool(8), SwapSpace(8, 4)
    swap.note_copies(1, 1.0)
    swap.note_computed(1, 0.6)
    request = running(pool, 12)
    pool.share(request.block_table.blocks[:1])
    assert swap_out(swap, request) == []


def test_lost_and_doubled_host_blocks_are_found():
    for damage in ("lost", "doubled", "running", "short"):
        swap, request = SwapSpace(4, 4), running(BlockPool(8), 8)
        swap_out(swap, request)
        swap.check([request], [])
        if damage == "lost":
            swap._free.pop()
        elif damage == "doubled":
            swap._free.append(0)
        elif damage == "short":
            request.num_host_tokens = 3
        queues = ([], [request]) if damage == "running" else ([request], [])
        with pytest.raises(IntegrityError):
            swap.check(*queues)
