"""The container of packed models: what it keeps, and everything that must be refused."""

from __future__ import annotations

import hashlib
import json
import os

import numpy as np
import pytest

from minipaged.errors import ConfigError, ModelFormatError, ModelNotFoundError
from minipaged.model import packed_file
from minipaged.model.packed_file import MAGIC, VERSION, PackedFile, is_packed, write

ARRAYS = {
    "bytes": np.arange(7, dtype=np.uint8),
    "half": np.arange(6, dtype=np.float16).reshape(2, 3),
    "whole": np.arange(-8, 8, dtype=np.int8).reshape(2, 2, 4),
    "empty": np.zeros((0, 3), np.float32),
    "single": np.linspace(0, 1, 33, dtype=np.float32),
}


def test_arrays_come_back_aligned_and_read_only(tmp_path):
    path, written = tmp_path / "new" / "a.mpk", []
    write(path, {"name": "ä", "number": 0.1}, ARRAYS, written.append)
    file = PackedFile(path)
    assert file.header == {"name": "ä", "number": 0.1}
    assert sum(written) == sum(array.nbytes for array in ARRAYS.values())
    assert list(file.arrays) == list(ARRAYS)
    for name, array in file.arrays.items():
        np.testing.assert_array_equal(array, ARRAYS[name])
        assert array.dtype == ARRAYS[name].dtype
        assert array.ctypes.data % 64 == 0 or not array.size
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0
    end = file.arrays["single"]
    slack = file._bytes.ctypes.data + len(file._bytes) - (end.ctypes.data + end.nbytes)
    assert slack >= 64, "a kernel that loads past the last array would leave the mapping"
    assert is_packed(path)


def container(header, data: bytes = b"", *, version: int = VERSION, magic: bytes = MAGIC, digest: bytes = b"") -> bytes:
    """A file of these parts; the header's place in it is honest."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    digest = digest or hashlib.sha256(text).digest()
    preamble = magic + version.to_bytes(4, "little") + len(text).to_bytes(4, "little") + digest + bytes(16)
    return preamble + text + data


def arrays(*entries) -> dict:
    return {"arrays": list(entries)}


def fit(header: dict, num_bytes: int) -> bytes:
    """A container whose length is right if its arrays need ``num_bytes`` from the next multiple of 64 on."""
    bare = container(header)
    start = packed_file.aligned(len(bare))
    return bare.ljust(packed_file.aligned(start + num_bytes) + 64, b"\0")


def test_a_file_made_by_hand_is_read(tmp_path):
    (tmp_path / "a.mpk").write_bytes(fit(arrays(["x", "int8", [3]], ["y", "int8", [64]]), 128))
    found = PackedFile(tmp_path / "a.mpk").arrays
    assert {name: array.shape for name, array in found.items()} == {"x": (3,), "y": (64,)}


BAD = {
    "empty": (b"", "has 0 bytes"),
    "short": (MAGIC + bytes(55), "has 63 bytes"),
    "other file": (b"GGUF" + bytes(100), "not a packed model"),
    "newer version": (container(arrays(), bytes(128), version=VERSION + 1), f"version {VERSION + 1}"),
    "header too long": (container(arrays())[:12] + (1000).to_bytes(4, "little") + bytes(48), "header has 1000 bytes"),
    "header damaged": (container(arrays(), bytes(128), digest=b"x" * 32), "damaged"),
    "reserved bytes used": (fit(arrays(), 0)[:60] + b"1234" + fit(arrays(), 0)[64:], "damaged"),
    "not JSON": (container(b"{"), "no valid JSON"),
    "not an object": (container(b"[]"), "must be an object"),
    "a key twice": (container(b'{"arrays": [], "arrays": []}'), "twice"),
    "no arrays": (container({}), "no list of arrays"),
    "no entry": (container(arrays(5)), "5 is not an array"),
    "entry too long": (container(arrays(["x", "int8", [1], 0])), "is not an array"),
    "name no text": (container(arrays([1, "int8", [1]])), "is not an array"),
    "unknown dtype": (container(arrays(["x", "float64", [1]])), "dtype 'float64'"),
    "dtype no text": (container(arrays(["x", ["int8"], [1]])), "dtype"),
    "object dtype": (container(arrays(["x", "object", [1]])), "dtype 'object'"),
    "shape no list": (container(arrays(["x", "int8", 4])), "shape 4"),
    "no dimension": (container(arrays(["x", "int8", []])), "shape"),
    "negative size": (container(arrays(["x", "int8", [-1]])), "shape"),
    "boolean size": (container(arrays(["x", "int8", [True]])), "shape"),
    "fractional size": (container(arrays(["x", "int8", [1.0]])), "shape"),
    "too many dimensions": (container(arrays(["x", "int8", [1] * 9])), "shape"),
    "product beyond all": (container(arrays(["x", "int8", [1 << 39, 1 << 39]])), "shape"),
    "larger than the file": (fit(arrays(["x", "int8", [1 << 39]]), 64), "its arrays need"),
    "an array twice": (fit(arrays(["x", "int8", [1]], ["x", "int8", [1]]), 128), "appears twice"),
    "one byte less": (fit(arrays(["x", "int8", [64]]), 64)[:-1], "its arrays need"),
    "one byte more": (fit(arrays(["x", "int8", [64]]), 64) + b"\0", "its arrays need"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused(tmp_path, name):
    data, message = BAD[name]
    (tmp_path / "a.mpk").write_bytes(data)
    with pytest.raises(ModelFormatError, match=message):
        PackedFile(tmp_path / "a.mpk")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ModelNotFoundError):
        PackedFile(tmp_path / "a.mpk")


def test_every_truncation_and_every_flipped_header_byte_is_seen(tmp_path):
    path = tmp_path / "a.mpk"
    write(path, {"name": "x"}, ARRAYS)
    good = path.read_bytes()
    length = int.from_bytes(good[12:16], "little")
    for end in range(0, len(good), 7):
        path.write_bytes(good[:end])
        with pytest.raises(ModelFormatError):
            PackedFile(path)
    for at in range(64 + length):
        path.write_bytes(good[:at] + bytes([good[at] ^ 0x10]) + good[at + 1 :])
        with pytest.raises(ModelFormatError):
            PackedFile(path)


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.mpk"
    write(path, {"name": "old"}, ARRAYS)

    def fail(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(path, {"name": "new"}, ARRAYS, fail)
    assert [file.name for file in tmp_path.iterdir()] == ["a.mpk"]
    old = PackedFile(path)
    assert old.header == {"name": "old"}
    write(path, {"name": "new"}, {"single": ARRAYS["single"] + 1})
    np.testing.assert_array_equal(old.arrays["single"], ARRAYS["single"])  # the open one keeps its memory
    assert PackedFile(path).header == {"name": "new"}


def test_other_files_are_not_overwritten(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF precious")
    with pytest.raises(ConfigError, match="left alone"):
        write(path, {}, ARRAYS)
    with pytest.raises(ConfigError, match="left alone"):
        write(tmp_path, {}, ARRAYS)
    assert path.read_bytes() == b"GGUF precious"


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="cannot be written"):
        write(tmp_path / "file" / "a.mpk", {}, ARRAYS)


@pytest.mark.skipif(os.name == "nt", reason="no permission bits")
def test_permissions_follow_the_umask(tmp_path):
    write(tmp_path / "a.mpk", {}, ARRAYS)
    (tmp_path / "b").touch()
    assert (tmp_path / "a.mpk").stat().st_mode == (tmp_path / "b").stat().st_mode
