"""The header of a GGUF file: metadata and tensor table, checked before anything is allocated or mapped.

The format is described in ggml's ``docs/gguf.md``. All numbers are little-endian: magic ``GGUF``,
version, number of tensors, number of metadata entries; the entries (key, value type, value); one
record a tensor (name, shape with the fastest-varying dimension first, type, offset); then, at the
next multiple of the alignment, the tensors' bytes.

Every count and length is compared with a limit and with the bytes that the file still has before
it is used, so a header that lies costs no more memory than the file is long.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from minipaged.errors import ModelFormatError, ModelNotFoundError, UnsupportedModelError
from minipaged.model.gguf_quants import TYPES, TensorType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_METADATA_ENTRIES = 1 << 14
MAX_TENSORS = 1 << 15
MAX_KEY_BYTES = 1 << 16
MAX_STRING_BYTES = 1 << 24
MAX_STRINGS = 1 << 20  # in all arrays together; each costs some 60 bytes more than in the file
MAX_TENSOR_NAME_BYTES = 256
MAX_DIMENSIONS = 4
MAX_ELEMENTS = 1 << 40
MAX_ALIGNMENT = 1 << 20
DEFAULT_ALIGNMENT = 32

STRING, ARRAY, BOOL = 8, 9, 7
SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", BOOL: "<u1", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: row-major ``shape``, ``offset`` and ``nbytes`` in bytes of the file."""

    name: str
    shape: tuple[int, ...]
    type: TensorType
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GGUFHeader:
    """Metadata values are ``int``, ``float``, ``bool``, ``str``, ``list[str]`` or NumPy arrays."""

    metadata: dict[str, object]
    tensors: dict[str, TensorInfo]
    file_size: int


def read_header(path: Path) -> GGUFHeader:
    """Read and check the header of a GGUF file.

    Raises :class:`ModelFormatError` for a header that is truncated, exceeds a limit or contradicts
    itself or the file's size, :class:`UnsupportedModelError` for versions, byte orders and tensor
    types that are not known.
    """
    try:
        with open(path, "rb", buffering=1 << 20) as file:
            return _HeaderReader(file, path, os.fstat(file.fileno()).st_size).read()
    except FileNotFoundError:
        raise ModelNotFoundError(f"{path} does not exist.") from None
    except OSError as error:
        raise ModelFormatError(f"{path} cannot be read: {error.strerror}.") from None


class _HeaderReader:
    """A cursor that knows how many bytes are left."""

    def __init__(self, file: BinaryIO, path: Path, size: int):
        self.file = file
        self.path = path
        self.size = size
        self.left = size
        self.strings_left = MAX_STRINGS

    def read(self) -> GGUFHeader:
        num_tensors, num_entries = self._preamble()
        metadata = self._metadata(num_entries)
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise self._bad(f"general.alignment is {alignment!r}; it must be a power of two up to {MAX_ALIGNMENT}")
        records = self._tensor_records(num_tensors)
        data_start = _round_up(self.size - self.left, alignment)
        return GGUFHeader(metadata, self._place(records, data_start, alignment), self.size)

    def _preamble(self) -> tuple[int, int]:
        if self._bytes(4) != MAGIC:
            raise self._bad("the file does not begin with the letters GGUF, so it is no GGUF file")
        version = self._number("<I")
        if version not in VERSIONS:
            if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS:
                raise UnsupportedModelError(f"{self.path} is a big-endian GGUF file; convert it to little-endian.")
            raise UnsupportedModelError(f"{self.path} is GGUF version {version}; versions 2 and 3 are supported.")
        num_tensors = self._count("tensors", MAX_TENSORS, 24)
        return num_tensors, self._count("metadata entries", MAX_METADATA_ENTRIES, 13)

    def _metadata(self, num_entries: int) -> dict[str, object]:
        metadata: dict[str, object] = {}
        for _ in range(num_entries):
            key = self._string("a metadata key", MAX_KEY_BYTES)
            if key in metadata:
                raise self._bad(f"metadata key {key!r} appears twice")
            metadata[key] = self._value(key)
        return metadata

    def _value(self, key: str):
        kind = self._number("<I")
        if kind == STRING:
            return self._string(key, MAX_STRING_BYTES)
        if kind == ARRAY:
            return self._array(key)
        if kind not in SCALARS:
            raise self._bad(f"{key} has value type {kind}, which does not exist")
        value = np.frombuffer(self._bytes(np.dtype(SCALARS[kind]).itemsize), SCALARS[kind])[0].item()
        return self._bool(key, value) if kind == BOOL else value

    def _array(self, key: str):
        kind = self._number("<I")
        if kind == ARRAY:
            raise UnsupportedModelError(f"{self.path}: {key} is an array of arrays, which is not supported.")
        if kind != STRING and kind not in SCALARS:
            raise self._bad(f"{key} is an array of type {kind}, which does not exist")
        if kind == STRING:
            count = self._count(f"strings in {key}", self.strings_left, 8)
            self.strings_left -= count
            return [self._string(key, MAX_STRING_BYTES) for _ in range(count)]
        itemsize = np.dtype(SCALARS[kind]).itemsize
        count = self._count(f"elements in {key}", None, itemsize)
        values = np.frombuffer(self._bytes(count * itemsize), SCALARS[kind])
        if kind == BOOL:
            if values.size and values.max() > 1:
                raise self._bad(f"{key} holds {values.max()} where only 0 (false) and 1 (true) may stand")
            return values.astype(bool)
        return values

    def _bool(self, key: str, value: int) -> bool:
        if value > 1:
            raise self._bad(f"{key} is {value}; a truth value must be 0 or 1")
        return bool(value)

    def _tensor_records(self, num_tensors: int) -> list[tuple[str, tuple[int, ...], TensorType, int]]:
        records, names = [], set()
        for _ in range(num_tensors):
            name = self._string("a tensor name", MAX_TENSOR_NAME_BYTES)
            if name in names:
                raise self._bad(f"tensor {name!r} appears twice")
            names.add(name)
            num_dims = self._number("<I")
            if not 1 <= num_dims <= MAX_DIMENSIONS:
                raise self._bad(f"tensor {name!r} has {num_dims} dimensions; it must be 1 to {MAX_DIMENSIONS}")
            shape = struct.unpack(f"<{num_dims}Q", self._bytes(8 * num_dims))[::-1]
            type_id, offset = struct.unpack("<IQ", self._bytes(12))
            if type_id not in TYPES:
                raise UnsupportedModelError(f"{self.path}: tensor {name!r} has type {type_id}, which is not known.")
            records.append((name, shape, TYPES[type_id], offset))
        return records

    def _place(self, records: list, data_start: int, alignment: int) -> dict[str, TensorInfo]:
        """Turn offsets into places in the file. Tensors must lie one behind the other, in any order,
        each padded to the alignment, as every writer stores them: no overlap and no holes."""
        expected = 0
        places = {}
        for name, shape, type_, offset in sorted(records, key=lambda record: record[3]):
            elements = 1
            for dimension in shape:  # Python integers: no product overflows
                elements *= dimension
            if not 0 < elements <= MAX_ELEMENTS:
                raise self._bad(f"tensor {name!r} has shape {shape}; it must hold 1 to {MAX_ELEMENTS} elements")
            if shape[-1] % type_.block_size:
                raise self._bad(
                    f"tensor {name!r} has rows of {shape[-1]} elements; type {type_.name} needs a multiple of "
                    f"{type_.block_size}"
                )
            if offset != expected:
                problem = "overlaps the tensor before it" if offset < expected else "leaves a hole before it"
                raise self._bad(f"tensor {name!r} is at offset {offset}, but {expected} is next: it {problem}")
            nbytes = elements // type_.block_size * type_.type_size
            if data_start + offset + nbytes > self.size:
                raise self._bad(
                    f"tensor {name!r} ends at byte {data_start + offset + nbytes}, but the file has only {self.size}; "
                    "it is truncated"
                )
            expected = _round_up(offset + nbytes, alignment)
            places[name] = TensorInfo(name, shape, type_, data_start + offset, nbytes)
        return places

    def _count(self, what: str, limit: int | None, min_bytes: int) -> int:
        """A 64-bit count of things that take at least ``min_bytes`` each."""
        count = self._number("<Q")
        if limit is not None and count > limit:
            raise self._bad(f"the number of {what} is {count}; the limit is {limit}")
        if count * min_bytes > self.left:
            raise self._bad(f"the number of {what} is {count}, too many for the {self.left} bytes that follow")
        return count

    def _string(self, what: str, limit: int) -> str:
        length = self._number("<Q")
        if length > limit:
            raise self._bad(f"{what} has {length} bytes; the limit is {limit}")
        try:
            return self._bytes(length).decode()
        except UnicodeDecodeError:
            raise self._bad(f"{what} is not valid UTF-8") from None

    def _number(self, format: str) -> int:
        return struct.unpack(format, self._bytes(struct.calcsize(format)))[0]

    def _bytes(self, length: int) -> bytes:
        if length > self.left:
            at = self.size - self.left
            raise self._bad(f"{length} bytes are needed at byte {at} of {self.size}; the file is truncated")
        self.left -= length
        data = self.file.read(length)
        if len(data) != length:
            raise self._bad("the file became shorter while it was read")
        return data

    def _bad(self, problem: str) -> ModelFormatError:
        return ModelFormatError(f"{self.path}: {problem}.")


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
