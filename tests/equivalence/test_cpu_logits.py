"""The equivalence law on the cpu backend: logits are bit-identical, alone or in any company.

For every architecture and every format of weights and KV: token by token, in chunks, beside other
sequences, after a prefix hit, on one thread and on two, in any blocks of any size.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from minipaged.model.architectures import config_from_hf, load_weights
from minipaged.model.cpu_decoder import CpuDecoder
from minipaged.model.safetensors_file import SafetensorsSource
from minipaged.model.weight_packer import WeightPacker
from minipaged.ops.cpu.kv import CpuKVCache, KVLayout
from minipaged.ops.interface import Batch
from minipaged.sampling.sampler import examine

FOLDER = Path(__file__).parent.parent / "fixtures" / "parity"
CASES = sorted(path.name for path in FOLDER.iterdir() if path.is_dir())
NONE = np.zeros(0, np.int32)
LENGTH, NUM_SLOTS, MAX_TOKENS = 40, 512, 160


class Machine:
    """A decoder with its pool; sequences are fed to it by hand."""

    def __init__(self, config, weights, kv_dtype: str, num_threads: int = 2, block_size: int = 16, seed: int = 0):
        layout = KVLayout(kv_dtype, block_size, config.num_kv_heads, config.head_dim)
        self.cache = CpuKVCache(config.num_layers, NUM_SLOTS // block_size, layout)
        self.cache.data[...] = 0xFF  # NaN in every format
        self.decoder = CpuDecoder(
            config, weights, self.cache, max_model_len=64, max_num_tokens=MAX_TOKENS, num_threads=num_threads
        )
        self.block_size = block_size
        self.free = list(np.random.default_rng(seed).permutation(NUM_SLOTS // block_size))

    def sequence(self) -> np.ndarray:
        """Blocks for one sequence."""
        return np.array([self.free.pop() for _ in range(-(-LENGTH // self.block_size))], np.int32)

    def step(self, parts: list[tuple[np.ndarray, np.ndarray, int, int]]) -> list[np.ndarray]:
        """Logits of every row for ``parts`` of (token ids, block table, start, end)."""
        size = self.block_size
        positions = [np.arange(start, end, dtype=np.int32) for _, _, start, end in parts]
        lengths = [end - start for _, _, start, end in parts]
        batch = Batch(
            input_ids=np.concatenate([ids[p] for (ids, *_), p in zip(parts, positions, strict=True)]),
            positions=np.concatenate(positions),
            slot_mapping=np.concatenate(
                [part[1][p // size].astype("i8") * size + p % size for part, p in zip(parts, positions, strict=True)]
            ),
            query_start_loc=np.cumsum([0, *lengths]).astype(np.int32),
            context_lens=np.array([end for *_, end in parts], np.int32),
            block_tables=np.stack([table for _, table, *_ in parts]),
            logits_indices=np.arange(sum(lengths), dtype=np.int32),
        )
        logits = self.decoder.forward(batch, self.cache)
        assert self.decoder.examined == examine(logits)
        return np.split(logits, np.cumsum(lengths)[:-1])

    def run(self, ids: np.ndarray, chunks: list[int], table: np.ndarray | None = None, start: int = 0) -> np.ndarray:
        """Logits of ``ids`` from position ``start``, alone, in chunks."""
        table, rows = self.sequence() if table is None else table, []
        for size in chunks:
            rows += self.step([(ids, table, start, start + size)])
            start += size
        return np.concatenate(rows)


@pytest.fixture(scope="module", params=CASES)
def model(request):
    folder = FOLDER / request.param
    config = config_from_hf(json.loads((folder / "config.json").read_text()))
    ids = np.random.default_rng(1).integers(0, config.vocab_size, (3, LENGTH)).astype(np.int32)
    packed = {w: load_weights(config, SafetensorsSource(folder), WeightPacker(w)) for w in FORMATS}
    return config, packed, ids


FORMATS = ["float32", "bfloat16", "int8", "int4"]


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("weights", FORMATS)
def test_logits_do_not_depend_on_company(model, weights, kv_dtype):
    config, packed, (ids, other, third) = model
    weights = packed[weights]
    machine = Machine(config, weights, kv_dtype)
    alone = machine.run(ids, [1] * LENGTH)
    assert np.isfinite(alone).all()

    np.testing.assert_array_equal(machine.run(ids, [LENGTH]), alone)
    np.testing.assert_array_equal(machine.run(ids, [7, 1, 23, 9]), alone)
    one_thread = Machine(config, weights, kv_dtype, num_threads=1, block_size=4, seed=3)
    np.testing.assert_array_equal(one_thread.run(ids, [LENGTH]), alone)
    np.testing.assert_array_equal(one_thread.run(ids, [3] * 13 + [1]), alone)

    # Beside a sequence that decodes and one whose prompt comes in chunks.
    machine = Machine(config, weights, kv_dtype, seed=5)
    mine, theirs, last = machine.sequence(), machine.sequence(), machine.sequence()
    rows = machine.step([(other, theirs, 0, 30), (ids, mine, 0, 11)])[1:]
    rows += machine.step([(third, last, 0, 16), (ids, mine, 11, 12), (other, theirs, 30, 31)])[1:2]
    rows += machine.step([(ids, mine, 12, LENGTH), (other, theirs, 31, 32), (third, last, 16, 40)])[:1]
    np.testing.assert_array_equal(np.concatenate(rows), alone)

    # A prefix hit: two blocks that another sequence computed, in other chunks.
    shared = np.concatenate([mine[:2], machine.sequence()[2:]])
    np.testing.assert_array_equal(machine.run(ids, [3, 5], shared, start=32), alone[32:])

    # So many rows that each thread keeps its own through a layer.
    machine = Machine(config, weights, kv_dtype, seed=6)
    assert 4 * LENGTH >= 32 * machine.decoder.team.num_threads**2
    rows = machine.step(
        [(other, machine.sequence(), 0, LENGTH) for _ in range(3)] + [(ids, machine.sequence(), 0, LENGTH)]
    )
    np.testing.assert_array_equal(rows[3], alone)


def test_only_wanted_rows_give_the_same(model):
    """The last layer drops the rows whose logits nobody wants; the others do not notice."""
    config, packed, (ids, *_) = model
    machine = Machine(config, packed["int8"], "bfloat16")
    whole = machine.run(ids, [LENGTH]).copy()
    forward = machine.decoder.forward

    def wanted_only(batch, cache):
        batch.logits_indices = np.array([0, 17, LENGTH - 1], np.int32)
        return forward(batch, cache)

    table = machine.sequence()
    machine.decoder.forward = lambda batch, cache: forward(dataclasses.replace(batch, logits_indices=NONE), cache)
    assert len(machine.step([(ids, table, 0, LENGTH)])[0]) == 0, "a chunk of a prompt"
    machine.decoder.forward = wanted_only
    table = machine.sequence()
    np.testing.assert_array_equal(machine.step([(ids, table, 0, LENGTH)])[0], whole[[0, 17, LENGTH - 1]])
