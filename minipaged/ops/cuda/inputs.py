"""What a step tells the device: one piece of memory, sent by one copy.

::

    input_ids       int32 [N]       -1: padding, a row that no sequence has
    positions       int32 [N]       -1: padding
    slot_mapping    int64 [N]       -1: K and V are not stored
    sequences       int32 [N]       row of block_tables
    logits_indices  int32 [N]
    block_tables    int32 [N, max_blocks]      last, so that only the rows in use are sent

for at most N tokens. Addresses never change: a recorded graph reads what was sent last.
"""

from __future__ import annotations

import numpy as np

from minipaged.ops.interface import Batch

from .device import Device, DeviceArray

FIELDS = (("input_ids", 4), ("positions", 4), ("slot_mapping", 8), ("sequences", 4), ("logits_indices", 4))
ALIGNMENT = 256  # bytes


def input_bytes(max_num_tokens: int, max_blocks: int) -> int:
    """Bytes of the memory that :class:`StepInputs` takes, here and on the device."""
    return sum(_field_bytes(item_bytes, max_num_tokens) for _, item_bytes in FIELDS) + 4 * max_num_tokens * max_blocks


def _field_bytes(item_bytes: int, max_num_tokens: int) -> int:
    return -(-item_bytes * max_num_tokens // ALIGNMENT) * ALIGNMENT


class StepInputs:
    """The memory above, here and on the device, as attributes: addresses on the device."""

    def __init__(self, device: Device, max_num_tokens: int, max_blocks: int):
        self.device, self.max_blocks = device, max_blocks
        offsets, end = {}, 0
        for name, item_bytes in FIELDS:
            offsets[name] = end
            end += _field_bytes(item_bytes, max_num_tokens)
        self._tables_offset = end
        total = input_bytes(max_num_tokens, max_blocks)
        self._device_memory = DeviceArray(device, (total,), np.uint8)
        self._host_memory = device.host_array(total)
        self._host = {
            name: self._host_memory[offset : offset + item_bytes * max_num_tokens].view(f"i{item_bytes}")
            for (name, item_bytes), offset in zip(FIELDS, offsets.values(), strict=True)
        }
        self._host_tables = self._host_memory[end:].view(np.int32).reshape(max_num_tokens, max_blocks)
        address = self._device_memory.address
        self.input_ids, self.positions, self.slot_mapping, self.sequences, self.logits_indices = (
            address + offset for offset in offsets.values()
        )
        self.block_tables = address + self._tables_offset

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self._device_memory.nbytes

    def send(self, batch: Batch, num_rows: int) -> None:
        """Send a step of at most ``num_rows`` tokens; the rows beyond its own become padding."""
        host, num_tokens, num_logits = self._host, len(batch.input_ids), len(batch.logits_indices)
        host["input_ids"][:num_tokens] = batch.input_ids
        host["positions"][:num_tokens] = batch.positions
        host["slot_mapping"][:num_tokens] = batch.slot_mapping
        lengths = np.diff(batch.query_start_loc)
        host["sequences"][:num_tokens] = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        host["logits_indices"][:num_logits] = batch.logits_indices
        for name in ("input_ids", "positions", "slot_mapping"):
            host[name][num_tokens:num_rows] = -1
        host["sequences"][num_tokens:num_rows] = 0
        num_sequences, used = batch.block_tables.shape
        self._host_tables[:num_sequences, :used] = batch.block_tables
        sent = self._tables_offset + 4 * num_sequences * self.max_blocks
        self.device.upload(self._device_memory.address, self._host_memory[:sent])

    def free(self) -> None:
        """Give the device's memory back."""
        self._device_memory.free()
