"""A decoder on a CUDA device with its pool, to which sequences are fed by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from minipaged.model.architectures import config_from_hf, load_weights
from minipaged.model.cuda_decoder import CudaDecoder
from minipaged.model.safetensors_file import SafetensorsSource
from minipaged.ops.cuda.device import Device
from minipaged.ops.cuda.kv import CudaKVCache, CudaKVLayout
from minipaged.ops.cuda.weights import DevicePacker
from minipaged.ops.interface import Batch

FIXTURES = Path(__file__).parents[1] / "fixtures" / "parity"


def parity_config(name: str):
    """The features of a parity fixture."""
    return config_from_hf(json.loads((FIXTURES / name / "config.json").read_text()))


class Machine:
    """One parity fixture on ``device``; its pool is full of NaN.

    ``weights``, ``activations``, ``kv``: formats, as :class:`~minipaged.backends.Formats` names them.
    """

    def __init__(
        self,
        device: Device,
        name: str,
        *,
        weights: str = "float32",
        activations: str = "float32",
        kv: str = "float32",
        block_size: int = 4,
        num_blocks: int = 40,
        max_model_len: int = 64,
        seed: int = 0,
        **options,
    ):
        config = parity_config(name)
        packer = DevicePacker(device, weights, activations, config.tie_word_embeddings)
        packed = load_weights(config, SafetensorsSource(FIXTURES / name), packer)
        layout = CudaKVLayout(kv, block_size, config.num_kv_heads, config.head_dim)
        self.device, self.config, self.block_size = device, config, block_size
        self.cache = CudaKVCache(device, config.num_layers, num_blocks, layout)
        options = {"max_num_tokens": 96} | options
        self.decoder = CudaDecoder(
            device, config, packed, self.cache, activation=activations, max_model_len=max_model_len, **options
        )
        self.free = list(np.random.default_rng(seed).permutation(num_blocks))

    def blocks(self, num_tokens: int) -> np.ndarray:
        """A block table for a sequence of so many tokens."""
        return np.array([self.free.pop() for _ in range(-(-num_tokens // self.block_size))], np.int32)

    def batch(self, parts: list[tuple], wanted: list[int] | None = None) -> Batch:
        """A step of ``parts`` of (token ids, block table, start, end); logits of all rows, or the ``wanted`` ones."""
        size = self.block_size
        positions = [np.arange(start, end, dtype=np.int32) for _, _, start, end in parts]
        tables = [table for _, table, *_ in parts]
        slots = [t[p // size].astype("i8") * size + p % size for t, p in zip(tables, positions, strict=True)]
        lengths = [end - start for *_, start, end in parts]
        block_tables = np.zeros((len(parts), max(map(len, tables))), np.int32)
        for row, table in zip(block_tables, tables, strict=True):
            row[: len(table)] = table
        rows = np.arange(sum(lengths)) if wanted is None else np.array(wanted)
        return Batch(
            input_ids=np.concatenate([ids[p] for (ids, *_), p in zip(parts, positions, strict=True)]),
            positions=np.concatenate(positions),
            slot_mapping=np.concatenate(slots),
            query_start_loc=np.cumsum([0, *lengths]).astype(np.int32),
            context_lens=np.array([end for *_, end in parts], np.int32),
            block_tables=block_tables,
            logits_indices=rows.astype(np.int32),
        )

    def step(self, parts: list[tuple], wanted: list[int] | None = None) -> list[np.ndarray]:
        """Logits for ``parts``, as :meth:`batch` takes them."""
        logits = self.decoder.forward(self.batch(parts, wanted), self.cache)
        lengths = [end - start for *_, start, end in parts]
        return [logits] if wanted is not None else np.split(logits, np.cumsum(lengths)[:-1])

    def run(self, ids: np.ndarray, chunks: list[int], table: np.ndarray | None = None, start: int = 0) -> np.ndarray:
        """Logits of ``ids`` from position ``start``, alone, in chunks."""
        table, rows = self.blocks(len(ids)) if table is None else table, []
        for size in chunks:
            rows += self.step([(ids, table, start, start + size)])
            start += size
        return np.concatenate(rows)
