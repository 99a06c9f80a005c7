"""The pool of KV blocks: who holds each block, and in which order free ones are used again.

A block is in one of three states, and :meth:`BlockPool.check` proves that it is in exactly one:

    in use        ref_cnt > 0, held by that many block tables, not in the free queue
    cached-free   ref_cnt == 0, in the free queue, its KV may still be found by the prefix cache
    free          ref_cnt == 0, in the free queue, nothing worth keeping

The free queue is an intrusive doubly linked list (the links live in the blocks), so taking a
block out of its middle, which is what a prefix hit does, costs O(1):

     front                                                                     back
    ┌──────────────────────┬──────────────────────────────────────────────────────┐
    │ free                 │ cached-free                                          │
    │ last freed … first   │ least recently used … most recently used             │
    └──────────────────────┴──────────────────────────────────────────────────────┘
      ▲ used again first                     within one sequence: tail … head ▲ freed last

Eviction order, in words: blocks without cached KV first; then the least recently used cached
block; and of blocks freed together the tail of the sequence before its head, because a cached
block can be found only while all blocks before it are. The queue is that of vLLM's
``FreeKVCacheBlockQueue``, with the uncached blocks moved to the front.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from minipaged.errors import IntegrityError, MinipagedError


class NoFreeBlocksError(MinipagedError):
    """More blocks were asked for than are free. Internal: the scheduler checks before it allocates."""


class Block:
    """One KV block: ``block_size`` slots of every layer, named by ``block_id``.

    Attributes:
        block_id: row of the physical KV memory.
        ref_cnt: block tables that hold this block.
        block_hash: key in the prefix cache, or ``None`` while it cannot be found there.
        token_ids: the tokens whose KV it holds, for verification; ``None`` unless published.
        content_id: number of the publication, never used twice, so that a child names not the
            block before it (which may hold other KV by now) but that block's content.
        parent_id: ``content_id`` of the block before it; for a first block the ``cache_salt``.
        prev, next: neighbours in the free queue, ``None`` while in use.
    """

    __slots__ = ("block_id", "ref_cnt", "block_hash", "token_ids", "content_id", "parent_id", "prev", "next")

    def __init__(self, block_id: int):
        self.block_id = block_id
        self.ref_cnt = 0
        self.block_hash: bytes | None = None
        self.token_ids: tuple[int, ...] | None = None
        self.content_id = 0
        self.parent_id: int | str | None = None
        self.prev: Block | None = None
        self.next: Block | None = None

    def __repr__(self) -> str:
        cached = " cached" if self.block_hash is not None else ""
        return f"<Block {self.block_id} ref_cnt={self.ref_cnt}{cached}>"


class BlockPool:
    """``num_blocks`` blocks, all free at first.

    Every method either does all it says or raises and changes nothing.

    Args:
        num_blocks: blocks in the pool, at least 1.
        enable_prefix_caching: whether blocks may be published at all.
        on_event: called as ``on_event(kind, block_id)`` after each change of a block, with kind
            ``"allocate"``, ``"share"``, ``"free"`` (one reference dropped), ``"publish"`` or
            ``"evict"``; for viewers and tests.
    """

    def __init__(
        self,
        num_blocks: int,
        enable_prefix_caching: bool = True,
        on_event: Callable[[str, int], None] | None = None,
    ):
        self.num_blocks = num_blocks
        self.enable_prefix_caching = enable_prefix_caching
        self.on_event = on_event
        self.blocks = [Block(block_id) for block_id in range(num_blocks)]
        self.cached: dict[bytes, Block] = {}
        self.num_free = 0
        self.num_evicted = 0
        self._num_published = 0
        self._num_touched = 0  # no block from this id on was ever taken: its memory was not written yet
        self._queue = Block(-1)  # sentinel: .next is the front, .prev the back
        self._queue.prev = self._queue.next = self._queue
        for block in self.blocks:
            self._insert_before(self._queue, block)

    def __del__(self):
        for block in (self._queue, *self.blocks):  # a ring would keep itself until the garbage collector comes by
            block.prev = block.next = None

    @property
    def num_cached(self) -> int:
        """Blocks that the prefix cache can find, in use or not."""
        return len(self.cached)

    # -- references ---------------------------------------------------------------------------

    def allocate(self, n: int, after: int | None = None) -> list[Block]:
        """Take ``n`` blocks, each with ``ref_cnt`` 1 and no content.

        Args:
            n: how many.
            after: a block id; where the blocks behind it are free and uncached they are taken
                first, so that a sequence tends to lie in one contiguous run of memory.

        Raises:
            NoFreeBlocksError: fewer than ``n`` blocks are free.
        """
        if n > self.num_free:
            raise NoFreeBlocksError(f"{n} blocks wanted, {self.num_free} of {self.num_blocks} are free.")
        taken: list[Block] = []
        if after is not None:
            for block in self.blocks[after + 1 : after + 1 + n]:
                if block.ref_cnt or block.block_hash is not None:
                    break
                self._unlink(block)
                taken.append(block)
        front: list[Block] = []
        while len(taken) + len(front) < n:
            block = self._queue.next
            self._unlink(block)
            front.append(block)
        front.sort(key=_block_id)  # a freed sequence lies tail first in the queue; make it a run again
        taken += front
        for block in taken:
            if block.block_hash is not None:
                self._forget(block)
                self.num_evicted += 1
            block.ref_cnt = 1
            self._num_touched = max(self._num_touched, block.block_id + 1)
            self._tell("allocate", block)
        return taken

    def going_on(self, block_id: int) -> int | None:
        """The ``after`` for a sequence that ends with ``block_id`` and grows: that, or ``None``.

        The system gives memory when it is first written, so a run does not go on into blocks that never were
        while others, free and uncached, have been.
        """
        front = self._queue.next
        return None if front.block_id < self._num_touched <= block_id + 1 and front.block_hash is None else block_id

    def share(self, blocks: Iterable[Block]) -> None:
        """Add one reference to each block; free ones leave the queue with their content."""
        for block in blocks:
            if block.ref_cnt == 0:
                self._unlink(block)
            block.ref_cnt += 1
            self._tell("share", block)

    def free(self, blocks: list[Block]) -> None:
        """Drop one reference to each block, given in sequence order.

        Raises:
            IntegrityError: a block is free already.
        """
        for block in blocks:
            if block.ref_cnt == 0:
                raise IntegrityError(f"block {block.block_id} is freed, but nothing holds it.")
        for block in reversed(blocks):
            block.ref_cnt -= 1
            if block.ref_cnt == 0:
                self._enqueue(block)
            self._tell("free", block)

    # -- content ------------------------------------------------------------------------------

    def publish(
        self, block: Block, block_hash: bytes, token_ids: tuple[int, ...], parent_id: int | str | None
    ) -> None:
        """Let the prefix cache find ``block``, whose KV has been computed, under ``block_hash``.

        Whatever was found under that hash before, or this block under another, is forgotten.
        """
        if block.block_hash is not None:
            self.unpublish(block)
        if block_hash in self.cached:
            self.unpublish(self.cached[block_hash])
        self._num_published += 1
        block.block_hash = block_hash
        block.token_ids = token_ids
        block.content_id = self._num_published
        block.parent_id = parent_id
        self.cached[block_hash] = block
        self._tell("publish", block)

    def unpublish(self, block: Block) -> None:
        """Make a published block impossible to find, because it is replaced or about to be written."""
        self._forget(block)
        if block.ref_cnt == 0:
            self._unlink(block)
            self._enqueue(block)

    def _forget(self, block: Block) -> None:
        del self.cached[block.block_hash]
        block.block_hash = block.token_ids = block.parent_id = None
        self._tell("evict", block)

    # -- the free queue -----------------------------------------------------------------------

    def _enqueue(self, block: Block) -> None:
        self._insert_before(self._queue.next if block.block_hash is None else self._queue, block)

    def _insert_before(self, right: Block, block: Block) -> None:
        left = right.prev
        left.next = right.prev = block
        block.prev, block.next = left, right
        self.num_free += 1

    def _unlink(self, block: Block) -> None:
        block.prev.next, block.next.prev = block.next, block.prev
        block.prev = block.next = None
        self.num_free -= 1

    def free_queue(self) -> list[Block]:
        """The free blocks in the order in which they would be used again."""
        order, block = [], self._queue.next
        while block is not self._queue and len(order) <= self.num_blocks:
            order.append(block)
            block = block.next
        return order

    def _tell(self, kind: str, block: Block) -> None:
        if self.on_event is not None:
            self.on_event(kind, block.block_id)

    # -- laws ---------------------------------------------------------------------------------

    def check(self, tables: Iterable[list[Block]]) -> None:
        """Verify the conservation law against every block table there is. O(blocks).

        Raises:
            IntegrityError: what is wrong, with the block concerned.
        """
        holders = [0] * self.num_blocks
        for table in tables:
            for block in table:
                holders[block.block_id] += 1
            _require(len(set(map(_block_id, table))) == len(table), "a block table holds a block twice")

        queue = self.free_queue()
        _require(len(queue) == self.num_free, f"num_free is {self.num_free}, the free queue has {len(queue)} blocks")
        _require(len(set(queue)) == len(queue), "the free queue holds a block twice")
        free = set(queue)
        for left, right in zip(queue, queue[1:], strict=False):
            _require(right.prev is left, f"the links of block {right.block_id} in the free queue disagree")
            in_order = left.block_hash is None or right.block_hash is not None
            _require(in_order, f"uncached block {right.block_id} would be used after a cached one")
        for block in self.blocks:
            name, count = f"block {block.block_id}", holders[block.block_id]
            _require(block.ref_cnt == count, f"{name} has ref_cnt {block.ref_cnt}, but {count} tables hold it")
            _require((count == 0) == (block in free), f"{name} has ref_cnt {count}, in the free queue: {block in free}")
            if block.block_hash is not None:
                _require(self.cached.get(block.block_hash) is block, f"{name} is published, but cannot be found")
        published = sum(block.block_hash is not None for block in self.blocks)
        _require(published == len(self.cached), f"{len(self.cached)} hashes for {published} published blocks")


def _block_id(block: Block) -> int:
    return block.block_id


def _require(condition: bool, text: str) -> None:
    if not condition:
        raise IntegrityError(f"{text}. This is a bug in minipaged.")
