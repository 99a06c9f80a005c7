"""The KV cache in a device's memory, in the layout that the kernels share.

One array holds every layer's K and V::

    data     [layer, K or V, block, kv_head, offset, head_dim]    float32, float16, bfloat16 or int8
    scales   [layer, K or V, block, kv_head, offset]              float32, int8 only: one a token and head
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cuda_kernels import copy_blocks
from cuda_kernels.dtypes import BYTES
from minipaged.errors import ConfigError

from .device import Call, Device, DeviceArray, bind


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
        waiting = list(pairs)
        while waiting:
            sources = {source for source, _ in waiting}
            now = [pair for pair in waiting if pair[1] not in sources]
            if not now:
                raise ValueError(f"block copies in a ring: {waiting}")
            waiting = [pair for pair in waiting if pair[1] in sources]
            table = DeviceArray.from_host(self.device, np.array(now, np.int32))
            self.device.run(self.copy_calls(table, len(now)))
            self.device.synchronize()
            table.free()

    def copy_calls(self, table: DeviceArray, count: int) -> list[Call]:
        """The launches that copy ``count`` pairs ``table [count, 2]``, none of them both source and destination."""
        calls = []
        for array in filter(None, (self.data, self.scales)):
            block_bytes = array.shape[-1]
            word = 16 if block_bytes % 16 == 0 else 4
            grid, _ = copy_blocks.launch_dims(count, 2 * self.num_layers)
            calls.append(
                bind(
                    self.device,
                    copy_blocks.build(word),
                    grid,
                    source=array,
                    destination=array,
                    pairs=table,
                    words_per_block=block_bytes // word,
                    source_layer_words=self.num_blocks * block_bytes // word,
                    destination_layer_words=self.num_blocks * block_bytes // word,
                )
            )
        return calls

    def free(self) -> None:
        """Give the memory back."""
        for array in filter(None, (self.data, self.scales)):
            array.free()
