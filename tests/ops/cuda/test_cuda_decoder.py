"""A step on the device: how many launches it takes, graphs and padding, rows nobody wants, the equivalence law."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from tests.support.cuda_devices import each_device, make_device  # noqa: F401

# isort: split

from minipaged.ops.cuda import attention, memory
from minipaged.ops.cuda.attention import PLAIN
from minipaged.ops.cuda.inputs import max_tiles
from minipaged.ops.cuda.sampling import Needs
from minipaged.ops.cuda.weights import total_bytes
from tests.support.cuda_machine import Machine, parity_config

LENGTH = 20


def token_ids(machine: Machine, count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(1).integers(0, machine.config.vocab_size, (count, LENGTH)).astype(np.int32))


@pytest.mark.parametrize(
    "name, per_layer, besides",
    [
        ("llama_gqa", 8, 4),  # embedding, final norm, lm_head, sampling
        ("gpt2_tied", 8, 4),
        ("qwen3_head_dim", 8, 4),
        ("gemma3_pattern", 8, 4),
        ("gemma2_soft_caps", 8, 5),  # the cap of the logits
    ],
)
def test_launches_of_a_decode_step(name, per_layer, besides):
    machine = Machine(make_device("emulated"), name)
    layers = Counter(call.kernel.name for call in machine.decoder._plan(1, 1, PLAIN))
    assert layers["embedding"] == 1
    calls = [*machine.decoder._plan(1, 1, PLAIN), *machine.decoder._logits_plan(0, 1)]
    calls += machine.decoder.sampling.calls(1, Needs())
    assert len(calls) == per_layer * machine.config.num_layers + besides


def test_a_graph_gives_what_its_launches_give(device):
    plain, graphs = (Machine(device, "llama_gqa", use_graphs=use) for use in (False, True))
    sequences = token_ids(plain, 3)
    results = []
    for machine in (plain, graphs):
        tables = [machine.blocks(LENGTH) for _ in sequences]
        parts = [(ids, table, 0, 5) for ids, table in zip(sequences, tables, strict=True)]
        rows = machine.step(parts)
        launches = device.num_launches
        for position in range(5, 9):  # three sequences are padded to four; the first two steps record and repeat
            rows += machine.step([(ids, table, position, position + 1) for ids, table, *_ in parts])
        results.append((rows, device.num_launches - launches))
    (expected, plain_launches), (found, graph_launches) = results
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_array_equal(a, b)
    assert plain_launches == graph_launches
    assert [bucket for bucket, *_ in graphs.decoder._graphs] == [4] and not plain.decoder._graphs


def test_without_recordings_the_launches_do(monkeypatch):
    device = make_device("emulated")
    monkeypatch.setattr(device, "record", lambda calls: None)
    machine = Machine(device, "llama_gqa")
    ids = token_ids(machine, 1)[0]
    expected = Machine(make_device("emulated"), "llama_gqa").run(ids[:4], [4])
    np.testing.assert_array_equal(machine.run(ids[:4], [1, 1, 1, 1]), expected)


def test_rows_nobody_wants_are_left_out(device):
    machine = Machine(device, "gemma3_pattern")
    ids = token_ids(machine, 1)[0]
    whole = machine.run(ids, [LENGTH])
    table = machine.blocks(LENGTH)
    assert machine.step([(ids, table, 0, 9)], wanted=[])[0].shape == (0, machine.config.vocab_size)
    (rows,) = machine.step([(ids, table, 9, LENGTH)], wanted=[0, 3, 10])
    np.testing.assert_array_equal(rows, whole[[9, 12, 19]])


def test_many_rows_of_logits_take_turns(monkeypatch):
    monkeypatch.setattr(memory, "MAX_LOGITS_ROWS", 8)
    machine = Machine(make_device("emulated"), "llama_gqa")
    ids = token_ids(machine, 1)[0]
    found = machine.run(ids, [LENGTH])
    monkeypatch.undo()
    np.testing.assert_array_equal(found, Machine(make_device("emulated"), "llama_gqa").run(ids, [LENGTH]))


@pytest.mark.parametrize("name", ["llama_gqa", "gpt2_tied", "mixtral_top2", "qwen3_moe_dense_layer"])
def test_memory_is_known_beforehand(name):
    device = make_device("emulated")
    machine = Machine(device, name)
    config, decoder = machine.config, machine.decoder
    matrices = memory.weight_bytes(config, "float32", "float32")
    assert matrices <= total_bytes(decoder.weights) <= 1.1 * matrices  # vectors weigh more in small models
    assert memory.buffer_bytes(config, "float32", 96) == decoder.buffers.nbytes
    assert memory.input_sizes(config, 96, 16).nbytes == decoder.inputs.nbytes


@pytest.mark.slow
def test_a_split_context_gives_the_same_bits(device, monkeypatch):
    """600 keys in two chunks: a block for each and a launch that folds them, or one block for both."""
    options = {"weights": "float16", "activations": "float16", "kv": "float16", "use_graphs": False}
    machine = Machine(device, "llama_gqa", block_size=16, num_blocks=40, max_model_len=640, **options)
    rng = np.random.default_rng(2)
    memory_of_kv = machine.cache.data
    memory_of_kv.fill(rng.standard_normal(memory_of_kv.nbytes // 2).astype("f2").view("u1").reshape(memory_of_kv.shape))
    ids = rng.integers(0, machine.config.vocab_size, 601).astype(np.int32)
    part = (ids, machine.blocks(601), 600, 601)

    split = attention.decode_shape(machine.config, 1, 601)
    assert split.num_chunks == 2
    names = Counter(call.kernel.name for call in machine.decoder._plan(1, 1, split))
    assert names["attention_reduce"] == names["attention_decode"] == machine.config.num_layers
    (expected,) = machine.step([part])
    monkeypatch.setattr(attention, "MAX_SPLIT_BLOCKS", 0)
    assert attention.decode_shape(machine.config, 1, 601).num_chunks == 0
    np.testing.assert_array_equal(machine.step([part])[0], expected)


def test_tiles_cover_every_row_once():
    config = parity_config("llama_gqa")
    group = config.num_heads // config.num_kv_heads
    lengths = np.array([1, 64, 3, 65])
    batch = SimpleNamespace(query_start_loc=np.cumsum([0, *lengths]))
    tiles = attention.make_tiles(config, batch, 133, decode=False)
    for sequence, length in enumerate(lengths):
        firsts = tiles[tiles[:, 0] == sequence, 1]
        np.testing.assert_array_equal(firsts, np.arange(0, length * group, 64))
    assert attention.make_tiles(config, batch, 5, decode=True).tolist() == [[i, 0] for i in range(5)]
    assert len(tiles) <= max_tiles(config, 133)


@pytest.mark.parametrize(
    "name, formats",
    [
        ("llama_gqa", {}),
        pytest.param(
            *("mistral_window", {"weights": "bfloat16", "activations": "bfloat16", "kv": "bfloat16"}),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("qwen3_moe_dense_layer", {"weights": "int8", "activations": "float16", "kv": "int8"}),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("gemma2_soft_caps", {"weights": "int4", "activations": "bfloat16", "kv": "float16"}),
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value.values()) or "float32",
)
def test_logits_do_not_depend_on_company(device, name, formats):
    """Bit for bit: alone, in chunks, token by token, beside others, after a prefix hit, in other blocks."""
    machine = Machine(device, name, **formats)
    ids, other, third = token_ids(machine, 3)
    whole = machine.run(ids, [LENGTH])
    assert np.isfinite(whole).all()
    np.testing.assert_array_equal(machine.run(ids, [7, 1, 9, 1, 1, 1]), whole)

    machine = Machine(device, name, block_size=8, seed=3, **formats)
    mine, theirs, last = machine.blocks(LENGTH), machine.blocks(LENGTH), machine.blocks(LENGTH)
    rows = machine.step([(other, theirs, 0, 13), (ids, mine, 0, 11)])[1:]
    rows += machine.step([(third, last, 0, 1), (ids, mine, 11, 12), (other, theirs, 13, 14)])[1:2]
    rows += machine.step([(ids, mine, 12, LENGTH), (other, theirs, 14, 15), (third, last, 1, 20)])[:1]
    np.testing.assert_array_equal(np.concatenate(rows), whole)

    shared = np.concatenate([mine[:2], machine.blocks(LENGTH)[2:]])
    np.testing.assert_array_equal(machine.run(ids, [1, 3], shared, start=16), whole[16:])
