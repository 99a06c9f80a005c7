"""GGUF headers: what is read, and everything that must be refused, each by what is wrong with it."""

from __future__ import annotations

import struct
import tracemalloc

import gguf
import numpy as np
import pytest

from minipaged.errors import ModelError, ModelFormatError, ModelNotFoundError, UnsupportedModelError
from minipaged.model import gguf_header
from minipaged.model.gguf_header import read_header
from minipaged.model.gguf_quants import TYPES


def string(text) -> bytes:
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(data)) + data


def entry(key, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def array(kind: int, count: int, values: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + values


def tensor(name, shape, type_: int, offset: int) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, type_, offset)


def file_bytes(entries=(), tensors=(), data=b"", version=3, counts=None, alignment=32) -> bytes:
    num_tensors, num_entries = counts or (len(tensors), len(entries))
    head = b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_entries) + b"".join(entries) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data


@pytest.fixture
def read(tmp_path):
    def read(*args, **kwargs):
        path = tmp_path / "model.gguf"
        path.write_bytes(args[0] if args and isinstance(args[0], bytes) else file_bytes(*args, **kwargs))
        return read_header(path)

    return read


def test_types_are_those_of_the_gguf_package():
    ours = {type_.id: (type_.name, type_.block_size, type_.type_size) for type_ in TYPES.values()}
    theirs = {type_.value: (type_.name, *size) for type_, size in gguf.GGML_QUANT_SIZES.items()}
    assert ours == {id_: theirs[id_] for id_ in ours}
    assert len(ours) == 33


@pytest.mark.parametrize("version", [2, 3])
def test_every_kind_of_value(read, version):
    scalars = {0: ("B", 200), 1: ("b", -3), 2: ("H", 60000), 3: ("h", -300), 4: ("I", 2**32 - 1), 5: ("i", -(2**31))}
    scalars |= {6: ("f", 0.5), 7: ("B", 1), 10: ("Q", 2**64 - 1), 11: ("q", -(2**63)), 12: ("d", 1e300)}
    entries = [entry(f"k{kind}", kind, struct.pack("<" + code, value)) for kind, (code, value) in scalars.items()]
    entries += [
        entry("text", 8, string("Grüße 🎉")),
        entry("words", 9, array(8, 2, string("a") + string(""))),
        entry("numbers", 9, array(5, 3, struct.pack("<3i", 1, -2, 3))),
        entry("flags", 9, array(7, 2, b"\x01\x00")),
        entry("nothing", 9, array(6, 0, b"")),
    ]
    metadata = read(entries, version=version).metadata
    for kind, (_, value) in scalars.items():
        assert metadata[f"k{kind}"] == value and isinstance(metadata[f"k{kind}"], (int, float))
    assert metadata["k7"] is True
    assert metadata["text"] == "Grüße 🎉" and metadata["words"] == ["a", ""]
    assert metadata["numbers"].tolist() == [1, -2, 3] and metadata["flags"].tolist() == [True, False]
    assert metadata["nothing"].size == 0


def test_tensors_in_any_order_and_alignment(read):
    tensors = [tensor("b", (2, 3), 0, 64), tensor("a", (32,), 8, 0), tensor("c", (1,), 30, 128)]
    aligned = [entry("general.alignment", 4, struct.pack("<I", 64))]
    header = read(aligned, tensors, bytes(130), alignment=64)
    b, a, c = (header.tensors[name] for name in "bac")
    assert (b.shape, b.nbytes, b.type.name) == ((3, 2), 24, "F32")
    assert (a.shape, a.nbytes, a.type.name) == ((32,), 34, "Q8_0")
    assert a.offset % 64 == 0 and b.offset == a.offset + 64 and c.offset == a.offset + 128 and c.nbytes == 2


GOOD = tensor("a", (4,), 0, 0)
BAD_FILES = {
    "empty": (b"", "needed at byte 0 of 0"),
    "not gguf": (b"PK\3\4" + bytes(40), "letters GGUF"),
    "truncated": (file_bytes()[:20], "truncated"),
    "many tensors": (file_bytes(counts=(2**63, 0)), "number of tensors is 9223372036854775808; the limit"),
    "more tensors than bytes": (file_bytes(counts=(1000, 0)), "too many for the"),
    "many entries": (file_bytes(counts=(0, 2**32)), "number of metadata entries"),
    "long key": (file_bytes([struct.pack("<QQ", 2**40, 0)]), "a metadata key has 1099511627776 bytes"),
    "key past the end": (file_bytes([struct.pack("<QQ", 5000, 0)]), "truncated"),
    "key not utf-8": (file_bytes([entry(b"\xff\xfe", 4, bytes(4))]), "not valid UTF-8"),
    "duplicate key": (file_bytes([entry("k", 4, bytes(4))] * 2), "'k' appears twice"),
    "bad value type": (file_bytes([entry("k", 13, bytes(8))]), "value type 13"),
    "bad array type": (file_bytes([entry("k", 9, array(99, 0, b""))]), "array of type 99"),
    "long string": (file_bytes([entry("k", 8, struct.pack("<Q", 2**62))]), "k has 4611686018427387904 bytes"),
    "huge array": (file_bytes([entry("k", 9, array(5, 2**61, b""))]), "elements in k is 2305843009213693952"),
    "huge string array": (file_bytes([entry("k", 9, array(8, 2**40, b""))]), "strings in k is 1099511627776"),
    "array past the end": (file_bytes([entry("k", 9, array(5, 100, b""))]), "too many for the"),
    "bool of 2": (file_bytes([entry("k", 7, b"\x02")]), "must be 0 or 1"),
    "bools of 2": (file_bytes([entry("k", 9, array(7, 2, b"\x00\x02"))]), "only 0 .false. and 1"),
    "alignment 0": (file_bytes([entry("general.alignment", 4, bytes(4))]), "power of two"),
    "alignment 48": (file_bytes([entry("general.alignment", 4, struct.pack("<I", 48))]), "power of two"),
    "alignment text": (file_bytes([entry("general.alignment", 8, string("32"))]), "power of two"),
    "no dimensions": (file_bytes(tensors=[tensor("a", (), 0, 0)], data=bytes(16)), "0 dimensions"),
    "5 dimensions": (file_bytes(tensors=[tensor("a", (1,) * 5, 0, 0)], data=bytes(16)), "5 dimensions"),
    "a billion dimensions": (file_bytes(tensors=[string("a") + struct.pack("<I", 2**30)], data=bytes(64)), "dimens"),
    "a dimension of 0": (file_bytes(tensors=[tensor("a", (4, 0), 0, 0)], data=bytes(16)), "must hold 1 to"),
    "overflowing product": (file_bytes(tensors=[tensor("a", (2**32, 2**32), 0, 0)], data=bytes(16)), "must hold 1 to"),
    "wrapping product": (file_bytes(tensors=[tensor("a", (2**63, 2, 4), 0, 0)], data=bytes(16)), "must hold 1 to"),
    "part of a block": (file_bytes(tensors=[tensor("a", (33,), 8, 0)], data=bytes(68)), "multiple of 32"),
    "past the end": (file_bytes(tensors=[tensor("a", (5,), 0, 0)], data=bytes(16)), "the file has only"),
    "far past the end": (file_bytes(tensors=[GOOD, tensor("b", (4,), 0, 2**63)], data=bytes(64)), "leaves a hole"),
    "overlap": (file_bytes(tensors=[GOOD, tensor("b", (4,), 0, 0)], data=bytes(64)), "overlaps"),
    "overlap by less": (file_bytes(tensors=[GOOD, tensor("b", (4,), 0, 16)], data=bytes(64)), "overlaps"),
    "hole": (file_bytes(tensors=[GOOD, tensor("b", (4,), 0, 64)], data=bytes(96)), "leaves a hole"),
    "duplicate tensor": (file_bytes(tensors=[GOOD, tensor("a", (4,), 0, 32)], data=bytes(64)), "'a' appears twice"),
    "long tensor name": (file_bytes(tensors=[tensor("a" * 300, (4,), 0, 0)], data=bytes(64)), "tensor name has 300"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_header_is_refused_before_memory_is_used(read, case):
    data, words = BAD_FILES[case]
    tracemalloc.start()
    try:
        with pytest.raises(ModelFormatError, match=words):
            read(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 << 20  # the buffer that the file is read with, and little more


@pytest.mark.parametrize(
    "data, words",
    [
        (file_bytes(version=1), "version 1"),
        (file_bytes(version=4), "version 4"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (file_bytes([entry("k", 9, array(9, 1, bytes(12)))]), "array of arrays"),
        (file_bytes(tensors=[tensor("a", (4,), 99, 0)], data=bytes(64)), "type 99"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(read, data, words):
    with pytest.raises(UnsupportedModelError, match=words):
        read(data)


def test_every_truncation_is_refused(read):
    whole = file_bytes(
        [entry("k", 8, string("text")), entry("n", 9, array(8, 2, string("a") + string("b")))], [GOOD], bytes(16)
    )
    assert read(whole).tensors["a"].nbytes == 16
    for length in range(len(whole)):
        with pytest.raises(ModelFormatError):
            read(whole[:length])


def test_a_huge_array_of_strings_is_bounded(read, monkeypatch):
    monkeypatch.setattr(gguf_header, "MAX_STRINGS", 10)
    words = array(8, 6, string("ab") * 6)
    assert len(read([entry("a", 9, words)]).metadata["a"]) == 6
    with pytest.raises(ModelFormatError, match="strings in b is 6; the limit is 4"):
        read([entry("a", 9, words), entry("b", 9, words)])


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(ModelNotFoundError, match="does not exist"):
        read_header(tmp_path / "none.gguf")
    with pytest.raises(ModelError):
        read_header(tmp_path)


def test_arrays_of_numbers_keep_their_type_and_cannot_be_changed(read):
    values = read([entry("k", 9, array(6, 3, struct.pack("<3f", 1, 2, 3)))]).metadata["k"]
    assert values.dtype == np.float32 and not values.flags.writeable
