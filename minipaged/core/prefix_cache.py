"""Finding KV that was computed before: hashes of prefixes, and the checks that make a hit safe.

A full block is named by a hash that stands for every token up to its end:

    root(cache_salt) ──┬─▶ sha256 ──▶ block_hash 0 ──┬─▶ sha256 ──▶ block_hash 1 ──▶ …
          token_ids[0:block_size] ┘       token_ids[block_size:2*block_size] ┘

Two rules make a hit safe. A block is published only after its KV was computed, so nobody reads
what is not yet written. And a hash only proposes: a hit counts if the token ids are equal too and
the block continues the very content that was matched before it, so equal hashes of different
prefixes give a miss, never foreign KV. Only full blocks are shared, and the last token of a
request is never taken from the cache, because its logits are needed.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable

from minipaged.config import SamplingParams
from minipaged.core.block_pool import Block, BlockPool
from minipaged.core.block_table import BlockTable
from minipaged.core.order import num_common_blocks, siblings
from minipaged.core.request import Request


def root_hash(cache_salt: str | None) -> bytes:
    """The hash before the first block; requests with different salts share nothing."""
    salt = b"" if cache_salt is None else b"salt:" + cache_salt.encode("utf-8", "surrogatepass")
    return hashlib.sha256(salt).digest()


def hash_block(parent_hash: bytes, token_ids: tuple[int, ...]) -> bytes:
    """32 bytes for the prefix that ends with this block, given the hash of the prefix before it."""
    return hashlib.sha256(parent_hash + struct.pack(f"<{len(token_ids)}I", *token_ids)).digest()


class PrefixCache:
    """Prefix lookups and publications of requests over the blocks of ``pool``."""

    def __init__(self, pool: BlockPool, block_size: int):
        self.pool = pool
        self.block_size = block_size

    def match(self, request: Request) -> list[Block]:
        """The longest run of cached blocks that begins the request, short of its last token."""
        hits: list[Block] = []
        if not (self.pool.enable_prefix_caching and request.use_prefix_cache):
            return hits
        parent_id = request.cache_salt
        for index in range((request.num_tokens - 1) // self.block_size):
            block = self._find(request, index, parent_id)
            if block is None:
                break
            hits.append(block)
            parent_id = block.content_id
        return hits

    def shared_prefix(self, request: Request, running: list[Request]) -> list[Block]:
        """Blocks that begin the request and are computed: cached ones, or those of a running sibling."""
        hits = self.match(request)
        if request.use_prefix_cache:
            for sibling in siblings(request, running):
                count = num_common_blocks(request, sibling, self.block_size)
                if count > len(hits):
                    hits = sibling.block_table.blocks[:count]
        return hits

    def is_being_computed(self, request: Request, num_hits: int, running: list[Request]) -> bool:
        """Whether a running request is about to compute the first block that is missing.

        Then waiting a little saves computing it twice. Meanwhile nobody is admitted, so those
        running can only come to an end of their prompts, and the wait with them.
        """
        end = (num_hits + 1) * self.block_size
        others = running if self.pool.enable_prefix_caching else siblings(request, running)
        if not others or not request.use_prefix_cache or end >= request.num_tokens:
            return False
        wanted = self.block_hash(request, num_hits)
        return any(
            other.num_computed_tokens < end <= other.num_tokens and self.block_hash(other, num_hits) == wanted
            for other in others
        )

    def publish(self, request: Request) -> None:
        """Make the request's full, computed blocks known, if their tokens are.

        Where an equal block is known already it stays, and the request keeps its own copy: a live
        block table is never rewritten.
        """
        if not self.pool.enable_prefix_caching:
            return
        num_tokens = min(request.num_computed_tokens, request.num_tokens)
        for index in range(request.num_published_blocks, num_tokens // self.block_size):
            block = self._find(request, index, request.published_id)
            if block is None:
                block = request.block_table.blocks[index]
                token_ids = self._token_ids(request, index)
                self.pool.publish(block, self.block_hash(request, index), token_ids, request.published_id)
            request.published_id = block.content_id
            request.num_published_blocks = index + 1

    def find(self, token_ids: list[int], cache_salt: str | None) -> list[int]:
        """Ids of the cached blocks that begin ``token_ids``, the last one too if it is full."""
        return [block.block_id for block in self.match(_whole(token_ids, cache_salt))]

    def insert(
        self, token_ids: list[int], cache_salt: str | None, write: Callable[[list[int], list[int]], None]
    ) -> None:
        """Publish full blocks whose KV comes from elsewhere; they stay in the cache until evicted.

        Args:
            token_ids: of whole blocks.
            cache_salt: as a request's.
            write: ``write(block_ids, indices)`` fills blocks with the KV of the prefix's blocks ``indices``,
                before anybody can find them. Those that are cached already are left out.

        Raises:
            NoFreeBlocksError: the pool has not enough free blocks; nothing changed.
        """
        request = _whole(token_ids, cache_salt)
        table = request.block_table = BlockTable(self.block_size, self.pool)
        table.share_prefix(self.match(request))
        try:
            known = len(table.blocks)
            table.append_slots(table.capacity, len(token_ids))
            if len(table.blocks) > known:
                write(table.block_ids[known:], list(range(known, len(table.blocks))))
            request.num_computed_tokens = len(token_ids)
            self.publish(request)
        finally:
            table.release()

    def block_hash(self, request: Request, index: int) -> bytes:
        """Hash of the request's full block ``index``; each is computed once."""
        hashes = request.block_hashes
        while len(hashes) <= index:
            parent = hashes[-1] if hashes else root_hash(request.cache_salt)
            hashes.append(hash_block(parent, self._token_ids(request, len(hashes))))
        return hashes[index]

    def _find(self, request: Request, index: int, parent_id: int | str | None) -> Block | None:
        block = self.pool.cached.get(self.block_hash(request, index))
        if block is None or block.parent_id != parent_id or block.token_ids != self._token_ids(request, index):
            return None
        return block

    def _token_ids(self, request: Request, index: int) -> tuple[int, ...]:
        return tuple(request.token_ids[index * self.block_size : (index + 1) * self.block_size])


def _whole(token_ids: list[int], cache_salt: str | None) -> Request:
    """A request of which every full block of ``token_ids`` can be found: one token is left to compute."""
    return Request("", [*token_ids, 0], SamplingParams(max_tokens=1), cache_salt=cache_salt)
