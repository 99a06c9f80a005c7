"""What a step tells the device: one piece of memory, sent by one copy.

::

    input_ids        int32 [N]       -1: padding, a row that no sequence has
    positions        int32 [N]       -1: padding
    slot_mapping     int64 [N]       -1: K and V are not stored
    sequences        int32 [N]       row of block_tables
    logits_indices   int32 [N]
    query_start_loc  int32 [N + 1]   a padding row is a sequence of its own, with nothing in its context
    context_lens     int32 [N]
    tiles            int32 [M, 2]    of attention (attention.py)
    block_tables     int32 [N, max_blocks]      last, so that only the rows in use are sent

for at most N tokens and M tiles. Addresses never change: a recorded graph reads what was sent last.
"""

from __future__ import annotations

import numpy as np

from minipaged.ops.interface import Batch

from .device import Device, DeviceArray

ALIGNMENT = 256  # bytes


def _field_bytes(max_num_tokens: int, max_num_tiles: int) -> dict[str, tuple[str, int]]:
    """Type and bytes of each field but the last."""
    counts = {
        "input_ids": ("i4", max_num_tokens),
        "positions": ("i4", max_num_tokens),
        "slot_mapping": ("i8", max_num_tokens),
        "sequences": ("i4", max_num_tokens),
        "logits_indices": ("i4", max_num_tokens),
        "query_start_loc": ("i4", max_num_tokens + 1),
        "context_lens": ("i4", max_num_tokens),
        "tiles": ("i4", 2 * max_num_tiles),
    }
    return {name: (kind, -(-int(kind[1]) * n // ALIGNMENT) * ALIGNMENT) for name, (kind, n) in counts.items()}


def max_tiles(config, max_num_tokens: int) -> int:
    """Tiles of a step, at most: no tile is empty, and the rows of a token are its query heads of a KV head."""
    return max_num_tokens * -(-config.num_heads // config.num_kv_heads // 8)


def input_bytes(max_num_tokens: int, max_num_tiles: int, max_blocks: int) -> int:
    """Bytes of the memory that :class:`StepInputs` takes, here and on the device."""
    fields = _field_bytes(max_num_tokens, max_num_tiles).values()
    return sum(nbytes for _, nbytes in fields) + 4 * max_num_tokens * max_blocks


class StepInputs:
    """The memory above, here and on the device, as attributes: addresses on the device."""

    input_ids: int
    positions: int
    slot_mapping: int
    sequences: int
    logits_indices: int
    query_start_loc: int
    context_lens: int
    tiles: int
    block_tables: int

    def __init__(self, device: Device, max_num_tokens: int, max_num_tiles: int, max_blocks: int):
        self.device, self.max_blocks = device, max_blocks
        total = input_bytes(max_num_tokens, max_num_tiles, max_blocks)
        self._device_memory = DeviceArray(device, (total,), np.uint8)
        self._host_memory = device.host_array(total)
        self._host: dict[str, np.ndarray] = {}
        end = 0
        for name, (kind, nbytes) in _field_bytes(max_num_tokens, max_num_tiles).items():
            self._host[name] = self._host_memory[end : end + nbytes].view(kind)
            setattr(self, name, self._device_memory.address + end)
            end += nbytes
        self._tables_offset = end
        self.block_tables = self._device_memory.address + end
        self._host_tables = self._host_memory[end:].view(np.int32).reshape(max_num_tokens, max_blocks)

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self._device_memory.nbytes

    def send(self, batch: Batch, num_rows: int, tiles: np.ndarray) -> None:
        """Send a step of at most ``num_rows`` tokens; the rows beyond its own become padding.

        ``tiles``: int32 ``[n, 2]``, empty where attention does without.
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
        sent = self._tables_offset + 4 * num_sequences * self.max_blocks
        self.device.upload(self._device_memory.address, self._host_memory[:sent])

    def free(self) -> None:
        """Give the device's memory back."""
        self._device_memory.free()
