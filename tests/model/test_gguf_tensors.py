"""Decoding of GGUF tensors: every type, bit for bit as the ``gguf`` package decodes it."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from minipaged.errors import ModelFormatError, UnsupportedModelError
from minipaged.model import slabs
from minipaged.model.gguf import GGUFFile
from minipaged.model.gguf_quants import TYPES, dequantize
from tests.support.gguf_files import letters_vocabulary, random_blocks, write_gguf

NO_WEIGHTS = ("Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64")
WEIGHT_TYPES = [type_ for type_ in TYPES.values() if type_.name not in NO_WEIGHTS]
METADATA = {
    "llama.context_length": 64,
    "llama.embedding_length": 256,
    "llama.feed_forward_length": 16,
    "llama.block_count": 1,
    "llama.attention.head_count": 4,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
} | letters_vocabulary(20)
V = "model.layers.0.self_attn.v_proj.weight"
Q = "model.layers.0.self_attn.q_proj.weight"


def model(tmp_path, tensors) -> GGUFFile:
    tensors = {"token_embd.weight": np.zeros((20, 256))} | tensors
    return GGUFFile(write_gguf(tmp_path / "model.gguf", "llama", METADATA, tensors))


@pytest.mark.parametrize("type_", WEIGHT_TYPES, ids=lambda type_: type_.name)
def test_each_type_equals_the_gguf_package(type_):
    rng = np.random.default_rng(0)
    for _ in range(3):
        if type_.name == "F32":
            blocks = rng.normal(size=(8, 512)).astype(np.float32).view(np.uint8)
        elif type_.name == "F16":
            blocks = rng.normal(size=(8, 512)).astype(np.float16).view(np.uint8)
        else:
            blocks = random_blocks(Type(type_.id), 8, 512, rng)
        with np.errstate(all="ignore"):  # random bytes are not always finite numbers
            wanted = gguf.quants.dequantize(blocks, Type(type_.id))
            got = np.full((8, 512), np.nan, np.float32)
            dequantize(blocks.reshape(-1), type_, got.reshape(-1))
        np.testing.assert_array_equal(got.view(np.uint32), wanted.view(np.uint32))


@pytest.mark.parametrize(
    "name, tolerance",
    [
        ("F32", 0),
        ("F16", 2e-3),
        ("BF16", 0.02),
        ("Q8_0", 0.02),
        ("Q5_0", 0.2),
        ("Q5_1", 0.2),
        ("Q4_0", 0.4),
        ("Q4_1", 0.3),
    ],
)
def test_quantised_values_are_near_the_original(tmp_path, name, tolerance):
    values = np.random.default_rng(1).normal(size=(64, 256)).astype(np.float32)
    file = model(tmp_path, {"blk.0.attn_v.weight": (Type[name], values)})
    assert file.shape(V) == (64, 256)
    assert np.abs(file.read(V) - values).max() <= tolerance


@pytest.mark.parametrize("name", NO_WEIGHTS)
def test_types_that_hold_no_weights_are_refused(name):
    type_ = next(type_ for type_ in TYPES.values() if type_.name == name)
    with pytest.raises(UnsupportedModelError, match=name):
        dequantize(np.zeros(type_.type_size, np.uint8), type_, np.zeros(type_.block_size, np.float32))


@pytest.mark.parametrize("slab_elements", [256, 1024, 1 << 18])
def test_slabs_do_not_change_what_is_read(tmp_path, monkeypatch, slab_elements):
    """Straight, with interleaved heads, into rows of a larger array, into a transposed one."""
    monkeypatch.setattr(slabs, "SLAB_ELEMENTS", slab_elements)
    rng = np.random.default_rng(2)
    v, q = rng.normal(size=(2, 64, 256)).astype(np.float32)
    file = model(tmp_path, {"blk.0.attn_v.weight": v, "blk.0.attn_q.weight": q})
    np.testing.assert_array_equal(file.read(V), v)
    wanted = q.reshape(4, 8, 2, 256).swapaxes(1, 2).reshape(64, 256)
    np.testing.assert_array_equal(file.read(Q), wanted)

    both = np.full((130, 256), np.nan, np.float32)
    assert file.read(V, out=both[64:128]).base is both
    file.read(Q, out=both[:64])
    np.testing.assert_array_equal(both[:128], np.concatenate([wanted, v]))
    assert np.isnan(both[128:]).all()

    columns = np.zeros((256, 64), np.float32)
    file.read(Q, out=columns.T)
    np.testing.assert_array_equal(columns, wanted.T)


def test_biases_are_interleaved_too(tmp_path):
    bias = np.arange(64, dtype=np.float32)
    got = model(tmp_path, {"blk.0.attn_q.bias": bias}).read(Q.replace("weight", "bias"))
    np.testing.assert_array_equal(got, bias.reshape(4, 8, 2).swapaxes(1, 2).reshape(-1))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("type_", [Type.F32, Type.F16, Type.BF16, Type.Q8_0])
def test_values_that_are_not_finite_are_refused(tmp_path, value, type_):
    values = np.zeros((64, 256), np.float32)
    values[63, 255] = value
    with np.errstate(all="ignore"):
        file = model(tmp_path, {"blk.0.attn_v.weight": (type_, values)})
    with pytest.raises(ModelFormatError, match="v_proj.weight' holds NaN or infinite"):
        file.read(V)


def test_large_finite_values_are_accepted(tmp_path):
    values = np.full((64, 256), 3e38, np.float32)  # their sum overflows
    np.testing.assert_array_equal(model(tmp_path, {"blk.0.attn_v.weight": values}).read(V), values)


def test_wrong_requests(tmp_path):
    file = model(tmp_path, {"blk.0.attn_v.weight": np.zeros((64, 256))})
    with pytest.raises(ModelFormatError, match="has no tensor 'x'"):
        file.read("x")
    with pytest.raises(ModelFormatError, match=r"shape \(64, 256\) in the file, but \(256, 64\) is needed"):
        file.read(V, out=np.zeros((256, 64), np.float32))
    with pytest.raises(ValueError, match="float32"):
        file.read(V, out=np.zeros((64, 256)))


def test_a_file_that_shrinks_while_open(tmp_path):
    file = model(tmp_path, {})
    path = tmp_path / "model.gguf"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelFormatError, match="changed while it was open"):
        file.read("model.embed_tokens.weight")
