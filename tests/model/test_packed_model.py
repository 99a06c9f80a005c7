"""Packed models: equal to their source in every number, never taken for a source that has changed."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from minipaged.config import SamplingParams
from minipaged.errors import ConfigError, ModelFormatError, UnsupportedModelError
from minipaged.model import catalog, packed_file, packed_model
from minipaged.model.architectures import config_from_hf, load_weights
from minipaged.model.loader import load_model
from minipaged.model.pack import pack_model
from minipaged.model.packed_file import PackedFile
from minipaged.model.packed_model import PackedModel
from minipaged.model.packed_weights import empty_weights, named_arrays, weights_from
from minipaged.model.safetensors_file import SafetensorsSource
from minipaged.model.weight_packer import WeightPacker
from tests.support.engines import generate, make_engine
from tests.support.model_file_fuzzer import write_gguf_model

FORMATS = ("float32", "bfloat16", "int8", "int4")
OPTIONS = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantization": "int8"},
    "int4": {"quantization": "int4"},
}
PARITY = Path(__file__).parent.parent / "fixtures" / "parity"
CASES = sorted(path.name for path in PARITY.iterdir() if path.is_dir())
DRAFT = catalog.BUILTIN / "tiny-draft"


@pytest.fixture(autouse=True)
def packed_folder(tmp_path, monkeypatch) -> Path:
    """Where packed models are looked for; compiled kernels stay where they are."""
    monkeypatch.setattr(packed_model, "home", lambda: tmp_path / "home")
    return tmp_path / "home" / "packed"


@pytest.fixture
def copy(tmp_path) -> Path:
    """A model directory that may be changed."""
    return Path(shutil.copytree(DRAFT, tmp_path / "model"))


def change(path: Path, **changes) -> None:
    """Write the packed file anew with parts of its header changed; ``None`` removes one."""
    file = PackedFile(path)
    arrays = changes.pop("arrays", file.arrays)
    header = {key: value for key, value in {**file.header, **changes}.items() if value is not None}
    packed_file.write(path, header, arrays)


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("case", CASES)
def test_weights_of_every_architecture_come_back(tmp_path, case, weight_format):
    config = config_from_hf(json.loads((PARITY / case / "config.json").read_text()))
    weights = load_weights(config, SafetensorsSource(PARITY / case), WeightPacker(weight_format))
    arrays = named_arrays(weights)
    packed_file.write(tmp_path / "a.mpk", {}, arrays)
    back = weights_from(config, weight_format, PackedFile(tmp_path / "a.mpk").arrays, ModelFormatError)
    assert (back.embedding is back.lm_head) == (weights.embedding is weights.lm_head)
    found = named_arrays(back)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
        assert found[name].dtype == array.dtype


@pytest.mark.parametrize("weight_format", FORMATS)
def test_a_packed_model_computes_what_its_source_does(tmp_path, weight_format):
    path = pack_model("tiny", weight_format, tmp_path / "tiny.mpk")
    params = SamplingParams(temperature=0, max_tokens=12, logprobs=3, prompt_logprobs=3)
    found = []
    for name, options in (("tiny", OPTIONS[weight_format]), (str(path), {})):
        kv = {"kv_cache_dtype": "float32" if weight_format == "float32" else "auto"}
        with_options = {"device": "cpu", "num_threads": 1} | options | kv
        engine = make_engine(name, **with_options)
        assert (engine.model.packed_as == weight_format) == (name != "tiny")
        assert engine.formats.weights == weight_format
        output = generate(engine, "ROMEO: what light", params)
        found.append((output.prompt_logprobs, output.outputs[0]))
        engine.close()
    assert found[0] == found[1]


def test_everything_but_the_weights_comes_back(tmp_path):
    write_gguf_model(tmp_path / "model.gguf")
    for name in ("tiny", str(tmp_path / "model.gguf")):
        source = load_model(name)
        packed = load_model(str(pack_model(name, "int8", tmp_path / "a.mpk")))
        assert packed.config == source.config
        assert packed.generation_config == source.generation_config
        for text in ("", "First Citizen: before<|im_end|>we proceed", "ABC\n  é"):
            assert packed.tokenizer.encode(text) == source.tokenizer.encode(text)
        ids = range(source.tokenizer.vocab_size)
        assert [packed.tokenizer.token_text(i) for i in ids] == [source.tokenizer.token_text(i) for i in ids]
        for attribute in ("bos_token_id", "eos_token_ids", "special_token_ids", "prepend_bos", "byte_level"):
            assert getattr(packed.tokenizer, attribute) == getattr(source.tokenizer, attribute)
        assert (packed.chat_template is None) == (source.chat_template is None)
        if source.chat_template:
            messages = [{"role": "user", "content": "Hello"}]
            assert packed.chat_template.render(messages) == source.chat_template.render(messages)


def test_a_packed_model_beside_its_source_is_used_and_reported(copy, packed_folder, caplog):
    caplog.set_level(logging.INFO, "minipaged")
    assert load_model(str(copy), weight_format="int8").packed_as is None
    path = pack_model(str(copy), "int8")
    assert path.parent == packed_folder
    model = load_model(str(copy), weight_format="int8")
    assert model.packed_as == "int8" and model.path == copy
    assert f"using the packed weights in {path}" in caplog.text
    assert load_model(str(copy)).packed_as is None
    assert load_model(str(copy), weight_format="int4").packed_as is None


@pytest.mark.parametrize("changed", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"])
def test_a_stale_file_is_not_used(copy, caplog, changed):
    pack_model(str(copy), "int8")
    file = copy / changed
    if not file.exists():
        file.write_text("{}")
    times = file.stat()
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    assert load_model(str(copy), weight_format="int8").packed_as is None
    assert "is not used: the model's files have changed" in caplog.text
    pack_model(str(copy), "int8")
    assert load_model(str(copy), weight_format="int8").packed_as == "int8"


def test_a_file_of_other_code_or_a_damaged_one_is_not_used(copy, caplog):
    path = pack_model(str(copy), "int8")
    for part in ("sources", "layout"):
        kept = PackedFile(path).header[part]
        change(path, **{part: "0" * 64})
        caplog.clear()
        assert load_model(str(copy), weight_format="int8").packed_as is None
        assert "another version of minipaged made it" in caplog.text
        change(path, **{part: kept})
    path.write_bytes(path.read_bytes()[:-1])
    caplog.clear()
    assert load_model(str(copy), weight_format="int8").packed_as is None
    assert "its arrays need" in caplog.text


def test_a_file_of_another_layout_is_refused(tmp_path):
    path = pack_model("tiny-draft", "int8", tmp_path / "a.mpk")
    change(path, layout="0" * 64)
    with pytest.raises(ModelFormatError, match="another layout; pack it again"):
        PackedModel(path).weights()


def test_arrays_that_do_not_fit_the_configuration_are_refused(tmp_path):
    path = pack_model("tiny-draft", "int8", tmp_path / "a.mpk")
    good = dict(PackedFile(path).arrays)
    name = "layers.0.qkv.weight.data"

    def refused(match: str, arrays: dict, **changes):
        change(path, arrays=arrays, **changes)
        with pytest.raises(ModelFormatError, match=match):
            PackedModel(path).weights()

    refused(f"{name}' is missing", {key: array for key, array in good.items() if key != name} | {"x": good[name]})
    refused(f"{name}' is uint8 .*; the model needs uint8", good | {name: good[name][:, 1:].copy()})
    refused(f"{name}' is int8", good | {name: good[name].view(np.int8)})
    refused("'extra' is unknown", good | {"extra": good[name]})
    larger = PackedFile(path).header["config"] | {"num_hidden_layers": 4000}
    refused("fewer arrays", good, config=larger)
    wider = larger | {"num_hidden_layers": 1, "intermediate_size": 2**20}
    refused("gate_up.weight.data' is uint8", good, config=wider)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("weight_format", "int3"),
        ("weight_format", None),
        ("stamps", 5),
        ("config", None),
        ("tokenizer", {"bos_token_id": "0", "eos_token_ids": [], "prepend_bos": False}),
        ("tokenizer", {"bos_token_id": None, "eos_token_ids": None, "prepend_bos": False}),
        ("chat_template", {"templates": {"default": ""}, "special_tokens": 3}),
        ("generation_config", []),
    ],
)
def test_headers_with_a_wrong_part_are_refused(tmp_path, part, value):
    path = pack_model("tiny-draft", "int8", tmp_path / "a.mpk")
    change(path, **{part: value})
    with pytest.raises(ModelFormatError, match=str(path)):
        load_model(str(path)).source.weights()


def test_what_a_packed_model_is_not_for(tmp_path):
    path = pack_model("tiny-draft", "int8", tmp_path / "a.mpk")
    with pytest.raises(ConfigError, match="packed for the cpu backend"):
        make_engine(str(path), device="reference")
    with pytest.raises(ConfigError, match="holds int8 weights, but quantization='int4'"):
        make_engine(str(path), device="cpu", quantization="int4")
    with pytest.raises(ConfigError, match="is a packed model .* already"):
        pack_model(str(path), "int4")
    with pytest.raises(UnsupportedModelError, match="use device='cpu'"):
        PackedModel(path).read("final_norm.weight")


def test_a_model_that_changes_while_it_is_packed_is_refused(copy, monkeypatch, packed_folder):
    def read(*arguments):
        (copy / "config.json").touch()
        return load_weights(*arguments)

    monkeypatch.setattr("minipaged.model.pack.load_weights", read)
    with pytest.raises(ModelFormatError, match="was changed while it was read"):
        pack_model(str(copy), "int8")
    assert not packed_folder.exists()


def test_the_outline_occupies_no_memory():
    config = config_from_hf(json.loads((PARITY / CASES[0] / "config.json").read_text()))
    huge = dataclasses.replace(config, vocab_size=2**24, intermediate_size=2**24)
    assert named_arrays(empty_weights(huge, "int8", 1000))["embedding.data"].nbytes > 2**28


def test_inspecting_lists_matrices(tmp_path):
    source = load_model("tiny-draft").source
    packed = PackedModel(pack_model("tiny-draft", "int4", tmp_path / "a.mpk"))
    count = sum(int(np.prod(source.shape(name))) for name in source.names())
    assert sum(int(np.prod(packed.shape(name))) for name in packed.names()) == count
    assert packed.stored_as("embedding")[0] == "int8" and packed.stored_as("layers.0.o.weight")[0] == "int4"
