"""The container of packed models and saved prefixes: a checked header, then arrays used where they lie in the file.

::

    8 bytes   b"minipack" or, of a saved prefix, b"miniprfx"
    4         version of this format, little-endian as all numbers
    4         length of the header
    32        sha256 of the header
    16        zeros
    header    JSON: {"arrays": [[name, dtype, shape], ...], and whatever the writer adds}
    arrays    in that order, each at the next multiple of 64 bytes (a cache line)
    zeros     to a multiple of 64, and 64 more: kernels may load past the end of an array

Offsets are not stored but follow from the shapes, so that arrays cannot overlap or leave the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from minipaged.errors import ConfigError, ModelFormatError, ModelNotFoundError
from minipaged.model.safetensors_file import MAX_DIMENSIONS, MAX_ELEMENTS, MAX_HEADER_BYTES, parse_object
from minipaged.model.slabs import map_file

MAGIC = b"minipack"
KINDS = {"packed model": MAGIC, "saved prefix": b"miniprfx"}
VERSION = 2
PREAMBLE = 64
ALIGNMENT = 64
DTYPES = ("float32", "float16", "uint16", "int32", "int8", "uint8")
CHUNK = 1 << 24

Report = Callable[[int], object]
"""Called with the number of bytes that were just written."""


class PackedFile:
    """An open file: ``header`` (a dict, ``arrays`` taken out) and ``arrays``, read-only views of the mapped file.

    Raises :class:`ModelNotFoundError` if there is no such file, :class:`ModelFormatError` if it is no
    packed file, of another version, truncated, or its header is damaged or lies.

    ``kind`` is what it should be, by its first bytes.
    """

    def __init__(self, path: str | Path, kind: str = "packed model"):
        self.path = path = Path(path)
        self._kind = kind
        try:
            size = path.stat().st_size
            if size < PREAMBLE:
                raise self._bad(f"it has {size} bytes, fewer than the first part of a header ({PREAMBLE})")
            self._bytes = map_file(path, size)
        except FileNotFoundError:
            raise ModelNotFoundError(f"{path} does not exist.") from None
        except OSError as error:
            raise ModelFormatError(f"{path} cannot be read: {error.strerror}.") from None
        self.header, start = self._read_header()
        self.arrays = self._map_arrays(self.header.pop("arrays", None), start)

    def _read_header(self) -> tuple[dict, int]:
        """The header, and where it ends."""
        preamble = self._bytes[:PREAMBLE].tobytes()
        if preamble[:8] != KINDS[self._kind]:
            raise self._bad(f"it is not a {self._kind}")
        version = int.from_bytes(preamble[8:12], "little")
        if version != VERSION:
            raise self._bad(f"it has version {version} of the format, not {VERSION}, which is read here; make it again")
        length = int.from_bytes(preamble[12:16], "little")
        if length > min(len(self._bytes) - PREAMBLE, MAX_HEADER_BYTES):
            raise self._bad(
                f"its header has {length} bytes, the file {len(self._bytes)}, and the limit is {MAX_HEADER_BYTES}"
            )
        header = self._bytes[PREAMBLE : PREAMBLE + length].tobytes()
        if hashlib.sha256(header).digest() != preamble[16:48] or any(preamble[48:]):
            raise self._bad("its header is damaged (the sha256 is another)")
        return parse_object(header, self.path), PREAMBLE + length

    def _map_arrays(self, entries, position: int) -> dict[str, np.ndarray]:
        """The views, after all entries have been checked; Python integers do not overflow."""
        if not isinstance(entries, list):
            raise self._bad("its header has no list of arrays")
        places: dict[str, tuple[int, np.dtype, tuple[int, ...]]] = {}
        for entry in entries:
            name, dtype, shape = self._checked(entry)
            if name in places:
                raise self._bad(f"array {name!r} appears twice")
            start = aligned(position)
            places[name] = start, dtype, shape
            position = start + math.prod(shape) * dtype.itemsize
        if aligned(position) + ALIGNMENT != len(self._bytes):
            raise self._bad(
                f"its arrays need {aligned(position) + ALIGNMENT} bytes, but the file has {len(self._bytes)}"
            )
        return {
            name: self._bytes[start : start + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
            for name, (start, dtype, shape) in places.items()
        }

    def _checked(self, entry) -> tuple[str, np.dtype, tuple[int, ...]]:
        if not isinstance(entry, list) or len(entry) != 3 or not isinstance(entry[0], str):
            raise self._bad(f"{repr(entry)[:80]} is not an array's name, dtype and shape")
        name, dtype, shape = entry
        if dtype not in DTYPES:
            raise self._bad(f"array {name!r} has dtype {repr(dtype)[:60]}; known are {', '.join(DTYPES)}")
        if (
            not isinstance(shape, list)
            or not 0 < len(shape) <= MAX_DIMENSIONS
            or any(type(size) is not int or not 0 <= size <= MAX_ELEMENTS for size in shape)
            or math.prod(shape) > MAX_ELEMENTS
        ):
            raise self._bad(f"array {name!r} has shape {repr(shape)[:60]}; it must be 1 to {MAX_DIMENSIONS} sizes")
        return name, np.dtype(dtype).newbyteorder("<"), tuple(shape)

    def _bad(self, problem: str) -> ModelFormatError:
        return ModelFormatError(f"{self.path}: {problem}.")


def aligned(position: int) -> int:
    """The next place where an array may begin."""
    return -(-position // ALIGNMENT) * ALIGNMENT


def is_packed(path: Path, kind: str = "packed model") -> bool:
    """Whether a file calls itself one of this kind."""
    with path.open("rb") as file:
        return file.read(8) == KINDS[kind]


def write(
    path: Path,
    header: Mapping,
    arrays: Mapping[str, np.ndarray],
    report: Report = lambda count: None,
    kind: str = "packed model",
) -> None:
    """Write a file of this kind; it appears under ``path`` at once and complete, or not at all.

    ``header`` holds JSON's types only. Raises :class:`ConfigError` where the file cannot be written,
    or a file of another kind would be overwritten.
    """
    entries = [[name, array.dtype.name, list(array.shape)] for name, array in arrays.items()]
    text = json.dumps({**header, "arrays": entries}, ensure_ascii=False, allow_nan=False).encode()
    numbers = VERSION.to_bytes(4, "little") + len(text).to_bytes(4, "little")
    preamble = KINDS[kind] + numbers + hashlib.sha256(text).digest()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not (path.is_file() and is_packed(path, kind)):
            raise ConfigError(f"{path} exists and is not a {kind}; it is left alone. Choose another file.")
        with _replacing(path) as file:
            file.write(preamble.ljust(PREAMBLE, b"\0") + text)
            for array in arrays.values():
                _pad(file)
                data = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(-1).view(np.uint8)
                for start in range(0, len(data), CHUNK):
                    chunk = data[start : start + CHUNK]
                    file.write(chunk)
                    report(len(chunk))
            _pad(file)
            file.write(bytes(ALIGNMENT))
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror or error}. Choose another file, or set MINIPAGED_HOME to a "
            "directory that you can write to and that has space."
        ) from None


def _pad(file) -> None:
    file.write(bytes(aligned(file.tell()) - file.tell()))


@contextlib.contextmanager
def _replacing(path: Path):
    """A file to write to, which becomes ``path`` if the block ends well and vanishes if it does not."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
