"""What a step tells the device: one piece of memory, sent by one copy.

::

    words            int32 [W]       of the asks about its logits (asks.py), then pairs of blocks to copy: the end
                                     of it, so that only what is in use is sent
    reals ... facts  [A, ...]        the asks
    input_ids        int32 [N]       -1: padding, a row that no sequence has
    positions        int32 [N]       -1: padding
    slot_mapping     int64 [N]       -1: K and V are not stored
    sequences        int32 [N]       row of block_tables
    logits_indices   int32 [N]
    query_start_loc  int32 [N + 1]   a padding row is a sequence of its own, with nothing in its context
    context_lens     int32 [N]
    tiles            int32 [M, 2]    of attention (attention.py)
    block_tables     int32 [N, max_blocks]      last, so that only the rows in use are sent

for at most N tokens, M tiles and A asks. Addresses never change: a recorded graph reads what was sent last.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from minipaged.ops.interface import Batch

from .asks import FIELDS, Packed
from .device import Device, DeviceArray

ALIGNMENT = 256  # bytes
NO_COPIES = np.zeros((0, 2), np.int32)
MAX_COPIES = 1 << 14
"""Pairs of blocks that are sent with a step, at most: what :func:`~.asks.max_words` adds has room for them."""


@dataclass(frozen=True)
class InputSizes:
    """What a step has, at most: tokens, tiles of attention, blocks of a sequence; of its asks, as many at once,
    and the words of these."""

    num_tokens: int
    num_tiles: int
    max_blocks: int
    num_asks: int
    num_words: int

    @property
    def nbytes(self) -> int:
        """Bytes of the memory that :class:`StepInputs` takes, here and on the device."""
        return sum(nbytes for _, nbytes in _field_bytes(self).values()) + 4 * self.num_tokens * self.max_blocks


def _field_bytes(sizes: InputSizes) -> dict[str, tuple[str, int]]:
    """Type and bytes of each field but the last."""
    counts = {
        "words": ("i4", sizes.num_words),
        **{name: (kind, count * sizes.num_asks) for name, (kind, count) in FIELDS.items()},
        "input_ids": ("i4", sizes.num_tokens),
        "positions": ("i4", sizes.num_tokens),
        "slot_mapping": ("i8", sizes.num_tokens),
        "sequences": ("i4", sizes.num_tokens),
        "logits_indices": ("i4", sizes.num_tokens),
        "query_start_loc": ("i4", sizes.num_tokens + 1),
        "context_lens": ("i4", sizes.num_tokens),
        "tiles": ("i4", 2 * sizes.num_tiles),
    }
    return {name: (kind, -(-int(kind[1]) * n // ALIGNMENT) * ALIGNMENT) for name, (kind, n) in counts.items()}


def max_tiles(config, max_num_tokens: int) -> int:
    """Tiles of a step, at most: no tile is empty, and the rows of a token are its query heads of a KV head."""
    return max_num_tokens * -(-config.num_heads // config.num_kv_heads // 8)


class StepInputs:
    """The memory above, here and on the device, as attributes: addresses on the device."""

    words: int
    reals: int
    integers: int
    rows: int
    starts: int
    masks: int
    penalties: int
    facts: int
    input_ids: int
    positions: int
    slot_mapping: int
    sequences: int
    logits_indices: int
    query_start_loc: int
    context_lens: int
    tiles: int
    block_tables: int

    def __init__(self, device: Device, sizes: InputSizes):
        self.device, self.sizes, self.max_blocks = device, sizes, sizes.max_blocks
        self._device_memory = DeviceArray(device, (sizes.nbytes,), np.uint8)
        self._host_memory = device.host_array(sizes.nbytes)
        self._host: dict[str, np.ndarray] = {}
        end = 0
        for name, (kind, nbytes) in _field_bytes(sizes).items():
            self._host[name] = self._host_memory[end : end + nbytes].view(kind)
            setattr(self, name, self._device_memory.address + end)
            end += nbytes
            if name == "facts":
                self._asks_end = end
        self._tables_offset = end
        self.block_tables = self._device_memory.address + end
        self._host_tables = self._host_memory[end:].view(np.int32).reshape(sizes.num_tokens, self.max_blocks)

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self._device_memory.nbytes

    def send(
        self, batch: Batch, num_rows: int, tiles: np.ndarray, asks: Packed | None = None, copies: np.ndarray = NO_COPIES
    ) -> int:
        """Send a step of at most ``num_rows`` tokens; the rows beyond its own become padding.

        ``tiles``: int32 ``[n, 2]``, empty where attention does without. ``asks``: of its first turn, whose words end
        where ``copies``, int32 ``[n, 2]``, begin (:meth:`words_end`). Returns the address of the copies.
        """
        host, num_tokens, num_sequences = self._host, len(batch.input_ids), len(batch.context_lens)
        padding = num_rows - num_tokens
        lengths = np.diff(batch.query_start_loc)
        for name, values, fill in (
            ("input_ids", batch.input_ids, -1),
            ("positions", batch.positions, -1),
            ("slot_mapping", batch.slot_mapping, -1),
            ("sequences", np.repeat(np.arange(num_sequences, dtype=np.int32), lengths), 0),
            ("context_lens", batch.context_lens, 0),
        ):
            host[name][: len(values)] = values
            host[name][len(values) : len(values) + padding] = fill
        host["query_start_loc"][: num_sequences + 1] = batch.query_start_loc
        more = np.arange(1, padding + 1)
        host["query_start_loc"][num_sequences + 1 : num_sequences + 1 + padding] = num_tokens + more
        host["logits_indices"][: len(batch.logits_indices)] = batch.logits_indices
        host["tiles"][: tiles.size] = tiles.reshape(-1)
        used = batch.block_tables.shape[1]
        self._host_tables[:num_sequences, :used] = batch.block_tables
        first = words_end = self.words_end(len(copies))
        host["words"][first : first + copies.size] = copies.reshape(-1)
        if asks is not None:
            first = self._put(asks, words_end)
        begin = 4 * first if asks is not None or copies.size else self._asks_end
        sent = self._tables_offset + 4 * num_sequences * self.max_blocks
        self.device.upload(self._device_memory.address + begin, self._host_memory[begin:sent])
        return self.words + 4 * words_end

    def send_asks(self, asks: Packed) -> None:
        """Send a later turn of the same step; nothing that was sent before may be under way any more."""
        begin = 4 * self._put(asks, self.sizes.num_words)
        self.device.upload(self._device_memory.address + begin, self._host_memory[begin : self._asks_end])

    def words_end(self, num_copies: int = 0) -> int:
        """Where the words of the asks end."""
        return self.sizes.num_words - 2 * num_copies

    def _put(self, asks: Packed, words_end: int) -> int:
        """Write a turn to the host's memory; returns where its words begin."""
        for name, values in asks.fields.items():
            self._host[name][: values.size] = values.reshape(-1)
        first = words_end - len(asks.words)
        self._host["words"][first:words_end] = asks.words
        return first

    def free(self) -> None:
        """Give the device's memory back."""
        self._device_memory.free()
