"""Safetensors files and indexes: what is read, and everything that must be refused."""

from __future__ import annotations

import json
import struct
import tracemalloc

import numpy as np
import pytest
from safetensors.numpy import save_file

from minipaged.errors import ModelError, ModelFormatError, ModelNotFoundError, UnsupportedModelError
from minipaged.model import safetensors_file, slabs
from minipaged.model.safetensors_file import INDEX_FILE, SINGLE_FILE, SafetensorsSource


def header(entries) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


def f32(shape, begin, end, dtype="F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.fixture
def source(tmp_path):
    def source(data: bytes) -> SafetensorsSource:
        (tmp_path / SINGLE_FILE).write_bytes(data)
        return SafetensorsSource(tmp_path)

    return source


def bfloat16(values: np.ndarray) -> np.ndarray:
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


@pytest.mark.parametrize("slab_elements", [4, 1 << 18])
def test_files_of_the_safetensors_package_are_read(tmp_path, monkeypatch, slab_elements):
    monkeypatch.setattr(slabs, "SLAB_ELEMENTS", slab_elements)
    rng = np.random.default_rng(0)
    tensors = {
        "matrix": rng.normal(size=(5, 7)).astype(np.float32),
        "half": rng.normal(size=(3, 2, 4)).astype(np.float16),
        "vector": rng.normal(size=9).astype(np.float32),
        "scalar": np.array(3, np.float32),
        "empty": np.zeros((0, 4), np.float32),
        "whole": np.arange(3),
    }
    save_file(tensors, tmp_path / SINGLE_FILE, metadata={"format": "np"})
    source = SafetensorsSource(tmp_path)
    assert sorted(source.names()) == sorted(tensors)
    for name in tensors.keys() - {"whole"}:
        assert source.shape(name) == tensors[name].shape
        got = source.read(name)
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, tensors[name].astype(np.float32))
    with pytest.raises(UnsupportedModelError, match="'whole' is stored as I64"):
        source.read("whole")


def test_bfloat16_and_places_to_read_into(source):
    values = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
    stored = bfloat16(values)
    file = source(header({"w": f32([6, 8], 0, 96, "BF16")}) + stored.tobytes())
    wanted = (stored.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(file.read("w"), wanted)
    rows = np.full((10, 8), np.nan, np.float32)
    file.read("w", out=rows[2:8])
    np.testing.assert_array_equal(rows[2:8], wanted)
    assert np.isnan(rows[[0, 1, 8, 9]]).all()
    columns = np.zeros((8, 6), np.float32)
    assert file.read("w", out=columns.T).base is columns
    np.testing.assert_array_equal(columns, wanted.T)


def test_shards(tmp_path):
    parts = {
        "a": {"x": np.ones(3, np.float32), "y": np.zeros((2, 2), np.float16)},
        "b": {"z": np.full(5, 2, np.float32)},
    }
    for shard, tensors in parts.items():
        save_file(tensors, tmp_path / f"{shard}.safetensors")
    weight_map = {name: f"{shard}.safetensors" for shard, tensors in parts.items() for name in tensors}
    (tmp_path / INDEX_FILE).write_text(json.dumps({"metadata": {"total_size": 40}, "weight_map": weight_map}))
    source = SafetensorsSource(tmp_path)
    assert source.names() == ["x", "y", "z"]
    assert source.read("z").tolist() == [2] * 5 and source.read("x").tolist() == [1] * 3


X = {"x": f32([2], 0, 8)}
NESTED = b'{"x":' * 200_000
BAD_HEADERS = {
    "empty file": (b"", "truncated"),
    "no header": (b"\1\0\0", "truncated"),
    "longer than the file": (struct.pack("<Q", 100) + b"{}", "truncated"),
    "longer than anything": (struct.pack("<Q", 2**64 - 1) + b"{}", "truncated"),
    "not json": (header(b"{,}"), "no valid JSON"),
    "not utf-8": (header(b'{"\xff": 1}'), "no valid JSON"),
    "utf-16": (header('{"x": 1}'.encode("utf-16")), "no valid JSON"),
    "a list": (header([]), "JSON list"),
    "deep": (header(NESTED), "no valid JSON"),
    "a number of 5000 digits": (header(b'{"x": ' + b"1" * 5000 + b"}"), "no valid JSON"),
    "duplicate tensor": (header(b'{"x": 1, "x": 2}'), "appears twice"),
    "duplicate field": (header(b'{"x": {"dtype": "F32", "dtype": "F16"}}'), "appears twice"),
    "entry is a list": (header({"x": []}), "must have dtype, shape and data_offsets"),
    "missing field": (header({"x": {"dtype": "F32", "shape": [2]}}), "must have dtype"),
    "another field": (header({"x": f32([2], 0, 8) | {"stride": [1]}}) + bytes(8), "must have dtype"),
    "negative size": (header({"x": f32([-2], 0, 8)}) + bytes(8), "has shape"),
    "fractional size": (header({"x": f32([2.0], 0, 8)}) + bytes(8), "has shape"),
    "a truth value as size": (header({"x": f32([True, 2], 0, 8)}) + bytes(8), "has shape"),
    "text as shape": (header({"x": f32("2", 0, 8)}) + bytes(8), "has shape"),
    "many dimensions": (header({"x": f32([1] * 9 + [2], 0, 8)}) + bytes(8), "at most 8 sizes"),
    "three offsets": (header({"x": f32([2], 0, 8) | {"data_offsets": [0, 4, 8]}}) + bytes(8), "data_offsets"),
    "reversed offsets": (header({"x": f32([2], 8, 0)}) + bytes(8), "data_offsets"),
    "offset is null": (header({"x": f32([2], None, 8)}) + bytes(8), "data_offsets"),
    "too few bytes": (header({"x": f32([3], 0, 8)}) + bytes(8), "needs 12 bytes, but has 8"),
    "overflowing product": (header({"x": f32([2**32, 2**32], 0, 0)}), "the limit is"),
    "wrapping product": (header({"x": f32([2**31, 2**31, 4], 0, 0)}), "the limit is"),
    "past the end": (header(X) + bytes(4), "end at byte"),
    "far past the end": (header({"x": f32([2**38], 0, 2**40)}) + bytes(8), "end at byte"),
    "behind the end": (header(X) + bytes(9), "but the file has"),
    "overlap": (header({**X, "y": f32([2], 4, 12)}) + bytes(12), "overlaps"),
    "same place": (header({**X, "y": f32([2], 0, 8)}) + bytes(8), "overlaps"),
    "hole": (header({**X, "y": f32([2], 12, 20)}) + bytes(20), "leaves a hole"),
    "hole at the beginning": (header({"x": f32([2], 4, 12)}) + bytes(12), "leaves a hole"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_bad_header_is_refused_before_memory_is_used(source, case):
    data, words = BAD_HEADERS[case]
    tracemalloc.start()
    try:
        with pytest.raises(ModelFormatError, match=words):
            source(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < (4 << 20) + 8 * len(data)


def test_limits_on_the_header(source, monkeypatch):
    many = header({str(i): f32([], 4 * i, 4 * i + 4) for i in range(100)}) + bytes(400)
    assert len(source(many).names()) == 100
    monkeypatch.setattr(safetensors_file, "MAX_JSON_ITEMS", 300)
    with pytest.raises(ModelFormatError, match="the limit is 300"):
        source(many)
    monkeypatch.setattr(safetensors_file, "MAX_HEADER_BYTES", 100)
    with pytest.raises(ModelFormatError, match="the limit is 100"):
        source(many)


@pytest.mark.parametrize("dtype", ["F128", "", 7, None, ["F32"]])
def test_unknown_dtypes_are_refused_by_name(source, dtype):
    with pytest.raises(UnsupportedModelError, match="dtype"):
        source(header({"x": f32([2], 0, 8, dtype)}) + bytes(8))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(source, value):
    for dtype, data in (
        ("F32", np.array([0, value], "<f4")),
        ("F16", np.array([0, value], "<f2")),
        ("BF16", bfloat16(np.array([0, value]))),
    ):
        file = source(header({"x": f32([2], 0, data.nbytes, dtype)}) + data.tobytes())
        with pytest.raises(ModelFormatError, match="'x' holds NaN or infinite"):
            file.read("x")


def test_wrong_requests(source):
    file = source(header(X) + bytes(8))
    with pytest.raises(ModelFormatError, match="no tensor 'y'"):
        file.read("y")
    with pytest.raises(ModelFormatError, match="no tensor 'y'"):
        file.shape("y")
    with pytest.raises(ModelFormatError, match=r"shape \(2,\) in the file, but \(3,\) is needed"):
        file.read("x", out=np.zeros(3, np.float32))


def test_no_files(tmp_path):
    with pytest.raises(ModelNotFoundError, match="neither model.safetensors nor"):
        SafetensorsSource(tmp_path)
    (tmp_path / SINGLE_FILE).mkdir()
    with pytest.raises(ModelError):
        SafetensorsSource(tmp_path)


@pytest.mark.parametrize(
    "index, words",
    [
        ("[]", "JSON list"),
        ("{", "no valid JSON"),
        ("{}", "weight_map must map"),
        ('{"weight_map": {"x": 1}}', "weight_map must map"),
        ('{"weight_map": {"x": "b.safetensors"}}', "which is missing"),
        ('{"weight_map": {"y": "a.safetensors"}}', "holds tensor 'y', but it does not"),
        ('{"weight_map": {"x": "a.safetensors", "x": "a.safetensors"}}', "appears twice"),
        ('{"weight_map": {"x": "../a.safetensors"}}', "not the name of a safetensors file"),
        ('{"weight_map": {"x": "/tmp/a.safetensors"}}', "not the name of a safetensors file"),
        ('{"weight_map": {"x": "..\\\\a.safetensors"}}', "not the name of a safetensors file"),
        ('{"weight_map": {"x": "sub/a.safetensors"}}', "not the name of a safetensors file"),
        ('{"weight_map": {"x": "a.safetensors\\u0000"}}', "not the name of a safetensors file"),
        ('{"weight_map": {"x": "\\ud800.safetensors"}}', "is missing"),
        ('{"weight_map": {"x": "config.json"}}', "not the name of a safetensors file"),
        ('{"weight_map": {"x": ""}}', "not the name of a safetensors file"),
        ('{"weight_map": {"x": ".."}}', "not the name of a safetensors file"),
    ],
)
def test_a_bad_index_is_refused(tmp_path, index, words):
    directory = tmp_path / "model"
    directory.mkdir()
    for place in (tmp_path, directory):
        (place / "a.safetensors").write_bytes(header(X) + bytes(8))
    (directory / INDEX_FILE).write_text(index)
    with pytest.raises(ModelFormatError, match=words):
        SafetensorsSource(directory)


def test_shards_may_be_links(tmp_path):
    """Download caches keep the files elsewhere and link to them."""
    (tmp_path / "blob").write_bytes(header(X) + bytes(8))
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "a.safetensors").symlink_to("../blob")
    (directory / INDEX_FILE).write_text('{"weight_map": {"x": "a.safetensors"}}')
    assert SafetensorsSource(directory).read("x").tolist() == [0, 0]
