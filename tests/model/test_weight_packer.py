"""Packing while reading: the same as packing the whole matrix; Q4_0 and Q4_1 become int4 without any rounding."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from minipaged.errors import ModelFormatError
from minipaged.model import slabs
from minipaged.model.architectures import config_from_hf, load_weights
from minipaged.model.gguf import GGUFFile
from minipaged.model.packed_weights import named_arrays
from minipaged.model.safetensors_file import SafetensorsSource
from minipaged.model.weight_packer import WeightPacker
from minipaged.ops.cpu import packing
from tests.support.gguf_files import letters_vocabulary, write_gguf

FORMATS = ("float32", "bfloat16", "int8", "int4")
PARITY = Path(__file__).parent.parent / "fixtures" / "parity"
CASES = sorted(path.name for path in PARITY.iterdir() if path.is_dir())
HIDDEN, INNER, VOCAB = 256, 512, 1000


class WholeMatrices(WeightPacker):
    """Packs as the definition says: every matrix is read in float32 first."""

    def start(self, *arguments):
        return None


def llama_file(path: Path, type_: Type, damage: bool = False) -> GGUFFile:
    """One layer of Llama with every matrix in a quantised type."""
    rng = np.random.default_rng(0)
    shapes = {
        "token_embd": (VOCAB, HIDDEN),
        **{f"blk.0.{name}": (HIDDEN, HIDDEN) for name in ("attn_q", "attn_output")},
        **{f"blk.0.{name}": (HIDDEN // 2, HIDDEN) for name in ("attn_k", "attn_v")},
        **{f"blk.0.{name}": (INNER, HIDDEN) for name in ("ffn_gate", "ffn_up")},
        "blk.0.ffn_down": (HIDDEN, INNER),
    }
    tensors = {}
    for name, shape in shapes.items():
        # Not what a quantiser makes of a matrix, in whose blocks the nibble 0 always occurs.
        quantised = gguf.quants.quantize(rng.normal(size=shape).astype(np.float32), type_)
        blocks = quantised.reshape(-1, gguf.GGML_QUANT_SIZES[type_][1])
        blocks[:, -16:] = rng.integers(3, 13, blocks[:, -16:].shape) * 17
        if damage and name == "blk.0.ffn_down":
            blocks[5, :2] = np.array([np.inf], np.float16).view(np.uint8)
        tensors[f"{name}.weight"] = (type_, blocks.reshape(shape[0], -1))
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        tensors[f"{name}.weight"] = np.ones(HIDDEN, np.float32)
    metadata = {
        "llama.context_length": 64,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": INNER,
        "llama.block_count": 1,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }
    write_raw(path, metadata | letters_vocabulary(VOCAB), tensors)
    return GGUFFile(path)


def write_raw(path: Path, metadata: dict, tensors: dict) -> None:
    """As :func:`write_gguf`, with blocks that are made already."""
    import tests.support.gguf_files as files

    kept, files.encode = files.encode, lambda array, type_: array
    try:
        write_gguf(path, "llama", metadata, tensors)
    finally:
        files.encode = kept


def assert_equal(weights, wanted) -> None:
    found, wanted = named_arrays(weights), named_arrays(wanted)
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("case", CASES)
def test_slabs_give_what_whole_matrices_give(monkeypatch, case, weight_format):
    monkeypatch.setattr(slabs, "SLAB_ELEMENTS", 200)
    config = config_from_hf(json.loads((PARITY / case / "config.json").read_text()))
    source = SafetensorsSource(PARITY / case)
    assert_equal(
        load_weights(config, source, WeightPacker(weight_format)),
        load_weights(config, source, WholeMatrices(weight_format)),
    )


@pytest.mark.parametrize("slab_elements", [HIDDEN * 7, 1 << 18])
@pytest.mark.parametrize(("type_", "weight_format"), [(Type.Q5_0, "int4"), (Type.Q4_0, "int8"), (Type.Q4_0, "float32")])
def test_slabs_of_quantised_files(tmp_path, monkeypatch, type_, weight_format, slab_elements):
    """Rows of q and k change places on their way (GGUF interleaves the halves of a head)."""
    monkeypatch.setattr(slabs, "SLAB_ELEMENTS", slab_elements)
    file = llama_file(tmp_path / "model.gguf", type_)
    config = config_from_hf(file.hf_config())
    wanted = load_weights(config, file, WholeMatrices(weight_format))
    assert_equal(load_weights(config, file, WeightPacker(weight_format)), wanted)


@pytest.mark.parametrize("slab_elements", [HIDDEN * 7, 1 << 18])
@pytest.mark.parametrize("type_", [Type.Q4_0, Type.Q4_1])
def test_nibbles_become_int4_as_they_are(tmp_path, monkeypatch, type_, slab_elements):
    monkeypatch.setattr("minipaged.model.gguf.SLAB_ELEMENTS", slab_elements)
    file = llama_file(tmp_path / "model.gguf", type_)
    config = config_from_hf(file.hf_config())
    found, wanted = load_weights(config, file, WeightPacker("int4")), load_weights(config, file)
    for name in ("qkv", "o", "gate_up", "down"):
        weight = getattr(found.layers[0], name).weight
        np.testing.assert_array_equal(unpacked(weight), getattr(wanted.layers[0], name).weight, err_msg=name)
    assert found.lm_head.format == "int8"


def unpacked(weight) -> np.ndarray:
    """int4 back to float32, by the drawing in ``packing.py``."""
    values = np.zeros((weight.num_panels, 48, weight.num_columns), np.float32)
    for k in range(weight.num_columns):
        byte = weight.words[:, k // 32, k % 32 // 8, :, k % 4]
        nibble = byte & 15 if k % 8 < 4 else byte >> 4
        scale, minimum = (array[:, k // 32].astype(np.float32) for array in (weight.scale, weight.minimum))
        values[:, :, k] = nibble * scale + minimum
    return values.reshape(-1, weight.num_columns)[: weight.num_rows]


def test_an_infinite_scale_is_refused(tmp_path):
    file = llama_file(tmp_path / "model.gguf", Type.Q4_0, damage=True)
    with pytest.raises(ModelFormatError, match="down_proj.weight' holds NaN or infinite"):
        load_weights(config_from_hf(file.hf_config()), file, WeightPacker("int4"))


@pytest.mark.parametrize("weight_format", ["int8", "int4"])
def test_no_float_copy_is_made(tmp_path, monkeypatch, weight_format):
    monkeypatch.setattr(slabs, "SLAB_ELEMENTS", 1 << 13)
    monkeypatch.setattr(packing.Arena, "PIECE", 1)  # each array by itself: no room is set aside for others
    file = llama_file(tmp_path / "model.gguf", Type.Q4_0)
    config = config_from_hf(file.hf_config())
    weights = load_weights(config, file, WeightPacker(weight_format))
    packed = sum(array.nbytes for array in named_arrays(weights).values())
    tracemalloc.start()
    try:
        load_weights(config, file, WeightPacker(weight_format))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    largest_in_float32 = 4 * VOCAB * HIDDEN
    assert peak < packed + largest_in_float32 // 2
