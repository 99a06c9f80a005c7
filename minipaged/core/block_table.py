"""The block table of one sequence: which block holds the KV of each position.

    position      0 … 15     16 … 31    32 … 47              block_size 16
    block_ids   [   7     ,     8     ,     3    ]           slot of position 20 = 8 × 16 + 4
"""

from __future__ import annotations

from minipaged.core.block_pool import Block, BlockPool


class BlockTable:
    """Blocks of one sequence in the order of positions; holds one reference to each.

    Attributes:
        blocks: the blocks; position ``p`` lies in ``blocks[p // block_size]``.
        block_ids: their ids. A change makes a new list, so that a plan may hold this one, and who has seen a list
            knows what is in it.
    """

    __slots__ = ("block_size", "pool", "blocks", "block_ids")

    def __init__(self, block_size: int, pool: BlockPool):
        self.block_size = block_size
        self.pool = pool
        self.blocks: list[Block] = []
        self.block_ids: list[int] = []

    @property
    def capacity(self) -> int:
        """Tokens that fit into the blocks held."""
        return len(self.blocks) * self.block_size

    def slot(self, position: int) -> int:
        """Index of a position's slot in the physical KV memory."""
        return self.block_ids[position // self.block_size] * self.block_size + position % self.block_size

    def share_prefix(self, blocks: list[Block]) -> None:
        """Begin an empty table with blocks whose KV exists already (a prefix hit)."""
        self.pool.share(blocks)
        self.extend(blocks)

    def extend(self, blocks: list[Block]) -> None:
        """Append blocks whose reference passes to this table."""
        self.blocks += blocks
        self.block_ids = self.block_ids + [block.block_id for block in blocks]

    # -- writing ------------------------------------------------------------------------------
    #
    #   write positions [start, end) while another table holds blocks A and B too:
    #
    #        computed          start                       end
    #   ─────────────────────────┬───────────────────────────┐
    #   │      A      │      B      │      new     │     new │
    #   └── only read ┴─ copied ────┴── allocated ───────────┘
    #         shared     B → B'

    def is_writable(self, start: int, end: int) -> bool:
        """Whether positions ``[start, end)`` can be written as the table is: most often it can, for many steps."""
        if end > len(self.blocks) * self.block_size:
            return False
        for block in self.blocks[start // self.block_size : (end + self.block_size - 1) // self.block_size]:
            if block.ref_cnt > 1 or block.block_hash is not None:
                return False
        return True

    def num_blocks_needed(self, start: int, end: int) -> int:
        """Free blocks that :meth:`append_slots` would take: new ones, and copies of shared ones."""
        new = (end + self.block_size - 1) // self.block_size - len(self.blocks)
        copies = 0
        for block in self._written(start, end):
            if block.ref_cnt > 1:
                copies += 1
        return copies + max(new, 0)

    def append_slots(self, start: int, end: int) -> list[tuple[int, int]]:
        """Make positions ``[start, end)`` writable: allocate what is missing, copy what is shared.

        A published block about to be written (after a rollback into it) is unpublished first.

        Returns:
            ``(source, destination)`` block ids to copy, in this order, before anything is written.

        Raises:
            NoFreeBlocksError: fewer than :meth:`num_blocks_needed` blocks are free; nothing changed.
        """
        needed = self.num_blocks_needed(start, end)
        fresh = []
        if needed:
            after = self.pool.going_on(self.block_ids[-1]) if self.block_ids else None
            fresh = self.pool.allocate(needed, after)
        copies = []
        for index, block in enumerate(self._written(start, end), start // self.block_size):
            if block.ref_cnt > 1:
                self.blocks[index] = copy = fresh.pop()
                self.pool.free([block])
                copies.append((block.block_id, copy.block_id))
            elif block.block_hash is not None:
                self.pool.unpublish(block)
        if copies:
            self.block_ids = [block.block_id for block in self.blocks]
        if fresh:
            self.extend(fresh)
        return copies

    def _written(self, start: int, end: int) -> list[Block]:
        return self.blocks[start // self.block_size : (end + self.block_size - 1) // self.block_size]

    # -- the other ways a table changes ---------------------------------------------------------

    def fork(self) -> BlockTable:
        """A second table over the same blocks, the partly filled last one too. O(blocks), no copy."""
        twin = BlockTable(self.block_size, self.pool)
        twin.share_prefix(self.blocks)
        return twin

    def truncate(self, num_tokens: int) -> None:
        """Roll back to the blocks that the first ``num_tokens`` positions need; the rest is freed."""
        keep = (num_tokens + self.block_size - 1) // self.block_size
        if keep < len(self.blocks):
            self.pool.free(self.blocks[keep:])
            del self.blocks[keep:]
            self.block_ids = self.block_ids[:keep]

    def release(self) -> None:
        """Give every block back."""
        self.truncate(0)
