"""Checkpoints in safetensors files: one, or shards with an index; checked before anything is mapped.

A file is a 64-bit little-endian header length, the header in JSON (for each tensor its ``dtype``,
``shape`` and ``data_offsets``, counted from the end of the header), and the tensors' bytes. See
https://github.com/huggingface/safetensors for the format; its rules are enforced here too.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from minipaged.errors import ModelFormatError, ModelNotFoundError, UnsupportedModelError
from minipaged.model.slabs import as_rows, fill, let_go, map_file, target_array

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 1 << 24
MAX_JSON_ITEMS = 1 << 19  # about eight for a tensor; each costs some 60 bytes of memory
MAX_SHARDS = 4096
MAX_DIMENSIONS = 8
MAX_ELEMENTS = 1 << 40
METADATA_KEY = "__metadata__"
BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F6_E2M3": 6,
    "F6_E3M2": 6, "F4": 4, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8,
    "BOOL": 8, "C64": 64,
}  # fmt: skip
READABLE = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}


class SafetensorsSource:
    """The tensors of a model directory, memory-mapped (a :class:`~minipaged.model.weights.TensorSource`).

    float32, float16 and bfloat16 tensors can be read; others may be present.

    Raises :class:`ModelFormatError` if a header or the index is malformed, lies about sizes or names
    files outside of the directory, :class:`ModelNotFoundError` if there is no such file.
    """

    def __init__(self, directory: str | Path):
        directory = Path(directory)
        if (directory / INDEX_FILE).is_file():
            self._tensors = _open_shards(directory)
        elif (directory / SINGLE_FILE).is_file():
            file = SafetensorsFile(directory / SINGLE_FILE)
            self._tensors = {name: (file, info) for name, info in file.tensors.items()}
        else:
            raise ModelNotFoundError(f"{directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}.")

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._find(name)[1].shape

    def stored_as(self, name: str) -> tuple[str, int]:
        """See :meth:`minipaged.model.weights.TensorSource.stored_as`."""
        info = self._find(name)[1]
        return info.dtype, info.end - info.start

    def read(self, name: str, out: np.ndarray | None = None) -> np.ndarray:
        """See :meth:`minipaged.model.weights.TensorSource.read`."""
        file, info = self._find(name)
        if info.dtype not in READABLE:
            raise UnsupportedModelError(
                f"tensor {name!r} is stored as {info.dtype}; {', '.join(READABLE)} can be read. Convert the checkpoint."
            )
        out = target_array(name, info.shape, out)
        if out.size:
            values = file.bytes[info.start : info.end].view(READABLE[info.dtype])
            decode = _decode_bf16 if info.dtype == "BF16" else _decode_float
            fill(name, as_rows(out), lambda first, slab: decode(values[first : first + slab.size], slab))
            let_go(file.bytes)
        return out

    def _find(self, name: str) -> tuple[SafetensorsFile, TensorInfo]:
        try:
            return self._tensors[name]
        except KeyError:
            raise ModelFormatError(f"the checkpoint has no tensor {name!r}.") from None


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: ``start`` and ``end`` in bytes of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class SafetensorsFile:
    """One file: its checked header and, once it is read from, its memory map."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.tensors = self._read_header()
        except FileNotFoundError:
            raise ModelNotFoundError(f"{path} does not exist.") from None
        except OSError as error:
            raise ModelFormatError(f"{path} cannot be read: {error.strerror}.") from None

    @cached_property
    def bytes(self) -> np.ndarray:
        return map_file(self.path, self.size)

    def _read_header(self) -> dict[str, TensorInfo]:
        self.size = size = self.path.stat().st_size
        with open(self.path, "rb") as file:
            if size < 8:
                raise self._bad(f"it has {size} bytes, but the length of the header alone takes 8; it is truncated")
            length = int.from_bytes(file.read(8), "little")
            if length > size - 8:
                raise self._bad(f"its header has {length} bytes, but the file only {size}; it is truncated")
            if length > MAX_HEADER_BYTES:
                raise self._bad(f"its header has {length} bytes; the limit is {MAX_HEADER_BYTES}")
            header = parse_object(file.read(length), self.path)
        header.pop(METADATA_KEY, None)
        tensors = {name: self._tensor(name, entry, 8 + length) for name, entry in header.items()}
        self._check_coverage(tensors, 8 + length, size)
        return tensors

    def _tensor(self, name: str, entry, data_start: int) -> TensorInfo:
        """Check one entry by itself. Python integers do not overflow, so no product can wrap."""
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise self._bad(f"the entry of tensor {name!r} must have dtype, shape and data_offsets, and nothing else")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in BITS:
            raise UnsupportedModelError(f"{self.path}: tensor {name!r} has dtype {_show(dtype)}, which is not known.")
        if not _sizes(shape) or len(shape) > MAX_DIMENSIONS:
            raise self._bad(f"tensor {name!r} has shape {_show(shape)}; it must be at most {MAX_DIMENSIONS} sizes")
        if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise self._bad(f"tensor {name!r} has data_offsets {_show(offsets)}; it must be a begin and an end")
        elements = 1
        for dimension in shape:
            elements *= dimension
        if elements > MAX_ELEMENTS:
            raise self._bad(f"tensor {name!r} has {elements} elements; the limit is {MAX_ELEMENTS}")
        begin, end = offsets
        if elements * BITS[dtype] != (end - begin) * 8:
            raise self._bad(
                f"tensor {name!r} of {dtype} {shape} needs {elements * BITS[dtype] / 8:g} bytes, but has {end - begin}"
            )
        return TensorInfo(dtype, tuple(shape), data_start + begin, data_start + end)

    def _check_coverage(self, tensors: dict[str, TensorInfo], position: int, size: int) -> None:
        """The format wants the tensors to fill the file: no overlap, no hole, nothing behind them."""
        for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
            if info.start != position:
                problem = "overlaps the one before it" if info.start < position else "leaves a hole before it"
                raise self._bad(f"tensor {name!r} begins at byte {info.start}, but {position} is next: it {problem}")
            position = info.end
        if position != size:
            raise self._bad(f"its tensors end at byte {position}, but the file has {size} bytes")

    def _bad(self, problem: str) -> ModelFormatError:
        return ModelFormatError(f"{self.path}: {problem}.")


def _open_shards(directory: Path) -> dict[str, tuple[SafetensorsFile, TensorInfo]]:
    index = directory / INDEX_FILE
    if index.stat().st_size > MAX_HEADER_BYTES:
        raise ModelFormatError(f"{index} has {index.stat().st_size} bytes; the limit is {MAX_HEADER_BYTES}.")
    weight_map = parse_object(index.read_bytes(), index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ModelFormatError(f"{index}: weight_map must map tensor names to file names.")
    shards = sorted(set(weight_map.values()))
    if len(shards) > MAX_SHARDS:
        raise ModelFormatError(f"{index} names {len(shards)} files; the limit is {MAX_SHARDS}.")
    for shard in shards:
        # A name, not a path: a model must not be able to make us read other files.
        if Path(shard).name != shard or "\\" in shard or "\0" in shard or not shard.endswith(".safetensors"):
            raise ModelFormatError(f"{index}: {shard!r} is not the name of a safetensors file in the same directory.")
        if not (directory / shard).is_file():
            raise ModelFormatError(f"{index} names {shard!r}, which is missing; download the model again.")
    files = {shard: SafetensorsFile(directory / shard) for shard in shards}
    tensors = {}
    for name, shard in weight_map.items():
        if name not in files[shard].tensors:
            raise ModelFormatError(f"{index} says that {shard!r} holds tensor {name!r}, but it does not.")
        tensors[name] = (files[shard], files[shard].tensors[name])
    return tensors


def parse_object(data: bytes, path: Path) -> dict:
    """A JSON object without duplicate keys, at any depth."""
    items = sum(data.count(mark) for mark in (b",", b"[", b"{"))
    if items > MAX_JSON_ITEMS:
        raise ModelFormatError(f"{path}: the JSON has about {items} values; the limit is {MAX_JSON_ITEMS}.")

    def unique(pairs: list[tuple[str, object]]) -> dict:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key appears twice in one object")
        return found

    try:
        value = json.loads(data.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ModelFormatError(f"{path} holds no valid JSON header: {error}") from None
    if not isinstance(value, dict):
        raise ModelFormatError(f"{path}: the header is a JSON {type(value).__name__}; it must be an object.")
    return value


def _decode_float(values: np.ndarray, slab: np.ndarray) -> None:
    slab[:] = values


def _decode_bf16(values: np.ndarray, slab: np.ndarray) -> None:
    """bfloat16 is the upper half of a float32."""
    np.left_shift(values, 16, out=slab.view(np.uint32), dtype=np.uint32)


def _sizes(value) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size <= MAX_ELEMENTS * 8 for size in value)


def _show(value) -> str:
    return repr(value)[:60]
