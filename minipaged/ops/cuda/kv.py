"""The KV cache in a device's memory, in the layout that the kernels share.

One array holds every layer's K and V::

    data     [layer, K or V, block, kv_head, offset, head_dim]    float32, float16, bfloat16 or int8
    scales   [layer, K or V, block, kv_head, offset]              float32, int8 only: one a token and head
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cuda_kernels import copy_blocks
from cuda_kernels.dtypes import BYTES
from minipaged.errors import ConfigError

from .device import Call, Device, DeviceArray, bind

STAGING_BYTES = 8 << 20
"""Of blocks that travel between device and host in one piece; at least one block does."""


@dataclass(frozen=True)
class CudaKVLayout:
    """Sizes, in bytes, of a block's K (or V) in one layer."""

    dtype: str
    block_size: int
    num_kv_heads: int
    head_dim: int

    @property
    def values_bytes(self) -> int:
        return self.num_kv_heads * self.block_size * self.head_dim * BYTES[self.dtype]

    @property
    def scales_bytes(self) -> int:
        return 4 * self.num_kv_heads * self.block_size if self.dtype == "int8" else 0

    @property
    def block_bytes(self) -> int:
        """One block of one layer, K and V."""
        return 2 * (self.values_bytes + self.scales_bytes)


class CudaKVCache:
    """K and V of ``num_blocks`` blocks in every layer.

    Fresh memory is all ones, NaN as a float: whoever reads what no token wrote shows it.
    """

    def __init__(self, device: Device, num_layers: int, num_blocks: int, layout: CudaKVLayout):
        if layout.values_bytes % 4:
            raise ConfigError(
                f"a KV block of {layout.values_bytes} bytes (block_size {layout.block_size}, head_dim "
                f"{layout.head_dim}, {layout.dtype}) cannot be copied in words of 4 bytes; "
                "block_size must be 4 or more here."
            )
        self.device, self.layout = device, layout
        self.num_layers, self.num_blocks, self.block_size = num_layers, num_blocks, layout.block_size
        self.data = DeviceArray(device, (num_layers * 2, num_blocks, layout.values_bytes), np.uint8)
        self.scales = None
        if layout.dtype == "int8":
            self.scales = DeviceArray(device, (num_layers * 2, num_blocks, layout.scales_bytes), np.uint8)
        for array in filter(None, (self.data, self.scales)):
            device.fill(array.address, array.nbytes, 0xFF)

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return self.data.nbytes + (self.scales.nbytes if self.scales else 0)

    def layer(self, index: int) -> dict[str, int]:
        """The addresses of one layer, by the names that kernels give them."""
        k, v = 2 * index, 2 * index + 1
        k_scales, v_scales = (self.scales.row(k), self.scales.row(v)) if self.scales else (0, 0)
        return {
            "k_cache": self.data.row(k),
            "v_cache": self.data.row(v),
            "k_scales": k_scales,
            "v_scales": v_scales,
        }

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        """Copy the content of block ``source`` to block ``destination``, for each pair, in every layer.

        All sources are read before any destination is written: a launch takes the pairs whose
        destination nobody has still to read. (Sources and destinations in a ring cannot occur: a
        destination is a block that was free.)
        """
        for group in self.copy_groups(pairs):
            table = DeviceArray.from_host(self.device, np.array(group, np.int32))
            self.device.run(self.copy_calls(table.address, len(group)))
            self.device.synchronize()
            table.free()

    def copy_groups(self, pairs: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
        """``pairs`` cut into launches, one after the other, each without a block that is both read and written."""
        waiting, groups = list(pairs), []
        while waiting:
            sources = {source for source, _ in waiting}
            now = [pair for pair in waiting if pair[1] not in sources]
            if not now:
                raise ValueError(f"block copies in a ring: {waiting}")
            waiting = [pair for pair in waiting if pair[1] in sources]
            groups.append(now)
        return groups

    def copy_calls(self, table: int, count: int) -> list[Call]:
        """The launches that copy ``count`` pairs, int32 ``[count, 2]`` at the address ``table``, none of their blocks
        both source and destination."""
        calls = []
        for array in filter(None, (self.data, self.scales)):
            words = self.num_blocks * array.shape[-1] // _word_bytes(array.shape[-1])
            calls.append(self._copy(array, array.address, array.address, table, count, words, words))
        return calls

    def _copy(self, array, source: int, destination: int, table: int, count: int, *layer_words: int) -> Call:
        """One launch for ``count`` pairs of blocks of the size that ``array`` has."""
        word = _word_bytes(array.shape[-1])
        return bind(
            self.device,
            copy_blocks.build(word),
            copy_blocks.launch_dims(count, 2 * self.num_layers)[0],
            source=source,
            destination=destination,
            pairs=table,
            words_per_block=array.shape[-1] // word,
            source_layer_words=layer_words[0],
            destination_layer_words=layer_words[1],
        )

    # -- blocks on their way to the host and back -------------------------------------------------

    @property
    def block_bytes(self) -> int:
        """Bytes of one block: K and V in every layer."""
        return self.num_layers * self.layout.block_bytes

    def read_blocks(self, block_ids: list[int]) -> np.ndarray:
        """A copy of the content of blocks, uint8 ``[len(block_ids), block_bytes]``.

        They are gathered on the device, some at a time, and come by one copy: K and V of all layers of a block
        side by side, then its scales.
        """
        content = np.empty((len(block_ids), self.block_bytes), np.uint8)
        for first in range(0, len(block_ids), self._staging.num_blocks):
            ids = block_ids[first : first + self._staging.num_blocks]
            self.device.run(self._staged(ids, to_host=True))
            self.device.download(self._staging.host[: self._staged_bytes(len(ids))], self._staging.blocks)
            self.device.synchronize()
            for part, begin, end in self._parts(len(ids)):
                content[first : first + len(ids), begin:end] = part
        return content

    def write_blocks(self, block_ids: list[int], content: np.ndarray) -> None:
        """Fill blocks with what :meth:`read_blocks` returned, here or in a cache of the same layout."""
        for first in range(0, len(block_ids), self._staging.num_blocks):
            ids = block_ids[first : first + self._staging.num_blocks]
            for part, begin, end in self._parts(len(ids)):
                part[...] = content[first : first + len(ids), begin:end]
            self.device.upload(self._staging.blocks, self._staging.host[: self._staged_bytes(len(ids))])
            self.device.run(self._staged(ids, to_host=False))
            self.device.synchronize()

    def prepare_staging(self) -> None:
        """Take the memory for :meth:`read_blocks` now, rather than when it is first needed."""
        assert self._staging

    @cached_property
    def _staging(self) -> _Staging:
        return _Staging(self.device, self.block_bytes)

    def _arrays(self, count: int) -> list[tuple[DeviceArray, int]]:
        """Data and scales, and where in staging the blocks of each begin, when ``count`` are on their way."""
        found = [(self.data, 0)]
        if self.scales:
            found.append((self.scales, -(-count * 2 * self.num_layers * self.layout.values_bytes // 16) * 16))
        return found

    def _staged_bytes(self, count: int) -> int:
        array, where = self._arrays(count)[-1]
        return where + count * 2 * self.num_layers * array.shape[-1]

    def _parts(self, count: int) -> list[tuple[np.ndarray, int, int]]:
        """Views of staging's host memory, uint8 ``[count, bytes]``, and the bytes of a block that each has."""
        parts, begin = [], 0
        for array, where in self._arrays(count):
            size = 2 * self.num_layers * array.shape[-1]
            parts.append((self._staging.host[where : where + count * size].reshape(count, size), begin, begin + size))
            begin += size
        return parts

    def _staged(self, block_ids: list[int], to_host: bool) -> list[Call]:
        """The launches that gather blocks in staging, or scatter them from there."""
        count, layers, staging = len(block_ids), 2 * self.num_layers, self._staging
        # Block j of staging has its layers side by side: block j * layers, with layers one block apart.
        there = [(block_id, j * layers) for j, block_id in enumerate(block_ids)]
        pairs = there if to_host else [(j, block_id) for block_id, j in there]
        staging.send_pairs(pairs)
        calls = []
        for array, where in self._arrays(count):
            words = array.shape[-1] // _word_bytes(array.shape[-1])
            cache, staged = (array.address, self.num_blocks * words), (staging.blocks + where, words)
            source, destination = (cache, staged) if to_host else (staged, cache)
            pointers, layer_words = zip(source, destination, strict=True)
            calls.append(self._copy(array, *pointers, staging.pairs, count, *layer_words))
        return calls

    def free(self) -> None:
        """Give the memory back."""
        if "_staging" in self.__dict__:
            self._staging.memory.free()
        for array in filter(None, (self.data, self.scales)):
            array.free()


def staging_bytes(block_bytes: int) -> int:
    """Bytes that blocks on their way to the host or back take on the device."""
    num_blocks = max(1, STAGING_BYTES // block_bytes)
    return -(-(num_blocks * block_bytes + 16) // 256) * 256 + 8 * num_blocks


class _Staging:
    """Where blocks stand in line for a copy between device and host: ``num_blocks`` at a time, here (``host``) and
    there (``blocks``, an address, like ``pairs``). Made when first needed, from what the pool has left."""

    def __init__(self, device: Device, block_bytes: int):
        self.device = device
        self.num_blocks = max(1, STAGING_BYTES // block_bytes)
        size = staging_bytes(block_bytes) - 8 * self.num_blocks
        self.memory = DeviceArray(device, (staging_bytes(block_bytes),), np.uint8)
        self.blocks, self.pairs = self.memory.address, self.memory.address + size
        self.host = device.host_array(size)
        self._pairs_host = device.host_array(8 * self.num_blocks)

    def send_pairs(self, pairs: list[tuple[int, int]]) -> None:
        """Send pairs of blocks; whatever was sent before has been used."""
        sent = self._pairs_host[: 8 * len(pairs)]
        sent[...] = np.array(pairs, np.int32).view(np.uint8).reshape(-1)
        self.device.upload(self.pairs, sent)


def _word_bytes(block_bytes: int) -> int:
    """Bytes that a thread copies at once."""
    return 16 if block_bytes % 16 == 0 else 4
