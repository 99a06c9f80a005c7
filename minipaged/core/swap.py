"""Keeping the KV of preempted requests in host memory, where that is cheaper than computing it again.

    preempted   its blocks ──swap_out──▶ host blocks    (the device's blocks are free at once)
    admitted    new blocks ◀──swap_in─── host blocks    (but for what the prefix cache still has)

A request holds host blocks only while it waits. Within a step all swaps out come before all swaps in,
and both before the block copies of the step: that is the order in which they must be carried out.

Which is cheaper is judged by what this machine has shown: the least time that a block took to copy, and
that a token took to compute. Until both are known a request is swapped, which makes them known.
"""

from __future__ import annotations

import math

from minipaged.core.request import Request
from minipaged.core.scheduler_output import SchedulerOutput
from minipaged.errors import IntegrityError


class SwapSpace:
    """``num_blocks`` blocks of host memory (0: requests are never swapped) of ``block_size`` tokens."""

    def __init__(self, num_blocks: int, block_size: int):
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_swapped_out = 0
        self.num_swapped_in = 0
        self._free = list(range(num_blocks - 1, -1, -1))
        self._seconds_per_block = math.inf
        self._seconds_per_token = math.inf

    @property
    def num_free(self) -> int:
        """Host blocks that hold nothing."""
        return len(self._free)

    def store(self, request: Request, output: SchedulerOutput) -> None:
        """Plan to copy out the blocks of a request that is about to lose them, if that pays and there is room."""
        count = -(-request.num_computed_tokens // self.block_size)
        if not 0 < count <= self.num_free or not self._is_cheaper(request, count):
            return
        request.host_block_ids = [self._free.pop() for _ in range(count)]
        request.num_host_tokens = request.num_computed_tokens
        output.swap_out += zip(request.block_table.block_ids[:count], request.host_block_ids, strict=True)
        self.num_swapped_out += count

    def restore(self, request: Request, output: SchedulerOutput) -> None:
        """Plan to copy a request's KV back, behind what it was admitted with, and let go of its host blocks.

        Its block table has blocks for all its tokens; ``num_computed_tokens`` are there, in whole blocks.
        """
        if request.num_host_tokens > request.num_computed_tokens:
            first = request.num_computed_tokens // self.block_size
            end = len(request.host_block_ids)
            output.swap_in += zip(request.host_block_ids[first:], request.block_table.block_ids[first:end], strict=True)
            self.num_swapped_in += end - first
            request.num_computed_tokens = request.num_host_tokens
        self.drop(request)

    def drop(self, request: Request) -> None:
        """Let go of a request's host blocks, if it has any."""
        self._free += request.host_block_ids
        request.host_block_ids = []
        request.num_host_tokens = 0

    # -- cost -------------------------------------------------------------------------------------

    def note_copies(self, num_blocks: int, seconds: float) -> None:
        """Learn from swaps that took ``seconds``."""
        self._seconds_per_block = min(self._seconds_per_block, seconds / num_blocks)

    def note_computed(self, num_tokens: int, seconds: float) -> None:
        """Learn from a step that took ``seconds``."""
        self._seconds_per_token = min(self._seconds_per_token, seconds / num_tokens)

    def _is_cheaper(self, request: Request, num_blocks: int) -> bool:
        if math.inf in (self._seconds_per_block, self._seconds_per_token):
            return True
        # What others hold too will most likely still be there.
        num_lost = sum(block.ref_cnt == 1 for block in request.block_table.blocks[:num_blocks])
        return 2 * num_blocks * self._seconds_per_block < num_lost * self.block_size * self._seconds_per_token

    # -- laws -------------------------------------------------------------------------------------

    def check(self, waiting: list[Request], running: list[Request]) -> None:
        """Verify that each host block is free or held by one waiting request.

        Raises:
            IntegrityError: a bug in minipaged, with what was found.
        """
        held = [block_id for request in waiting for block_id in request.host_block_ids]
        if sorted(held + self._free) != list(range(self.num_blocks)):
            raise IntegrityError(
                f"{len(held)} host blocks are held and {self.num_free} free of {self.num_blocks}; "
                "some are lost or in two places."
            )
        for request in waiting + running:
            blocks = 0 if request in running else -(-request.num_host_tokens // self.block_size)
            if len(request.host_block_ids) != blocks:
                raise IntegrityError(f"{request!r} holds {len(request.host_block_ids)} host blocks, not {blocks}.")
