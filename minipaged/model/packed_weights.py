"""A decoder's packed weights as named arrays, and back.

The arrays of a :class:`~minipaged.model.weights.ModelWeights` are named by their path in it, such as
``layers.0.qkv.weight.data``. Which there must be, and in which shapes, the model's adapter says: it is
run as for a checkpoint, with a reader whose arrays occupy no memory.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np

from minipaged.errors import ModelFormatError
from minipaged.model.architectures import ARCHITECTURES
from minipaged.model.config import ModelConfig
from minipaged.model.tensor_reader import TensorReader
from minipaged.model.weight_packer import WeightPacker
from minipaged.model.weights import ModelWeights
from minipaged.ops.cpu.packing import PackedWeight, array_shape


def named_arrays(weights: ModelWeights) -> dict[str, np.ndarray]:
    """Every array that has elements, once: what is tied appears under its first name."""
    return {name: array for name, array in _walk(weights, "", set()) if array.size}


def _walk(value: Any, name: str, seen: set[int]) -> Iterator[tuple[str, np.ndarray]]:
    if id(value) in seen:
        return
    if isinstance(value, np.ndarray):
        seen.add(id(value))
        yield name, value
    else:
        for key, part in _parts(value):
            yield from _walk(part, _join(name, key), seen)
        seen.add(id(value))


def _join(name: str, key: Any) -> str:
    return f"{name}.{key}" if name else str(key)


def _parts(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, list):
        return list(enumerate(value))
    if dataclasses.is_dataclass(value):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    return []


def weights_from(
    config: ModelConfig, weight_format: str, arrays: dict[str, np.ndarray], problem: Callable[[str], Exception]
) -> ModelWeights:
    """The weights whose arrays were named by :func:`named_arrays`; nothing is copied.

    ``problem`` makes the error for arrays that are missing, left over, or of another shape or dtype than the
    model needs.
    """
    outline = empty_weights(config, weight_format, len(arrays))
    needed = named_arrays(outline)
    for name, array in needed.items():
        if name not in arrays:
            raise problem(f"array {name!r} is missing")
        if (arrays[name].shape, arrays[name].dtype) != (array.shape, array.dtype):
            raise problem(
                f"array {name!r} is {arrays[name].dtype} {arrays[name].shape}; the model needs "
                f"{array.dtype} {array.shape}"
            )
    if left := sorted(arrays.keys() - needed.keys()):
        raise problem(f"array {left[0]!r} is unknown to this architecture")
    return _with_arrays(outline, "", arrays, {})


def _with_arrays(value: Any, name: str, arrays: dict[str, np.ndarray], made: dict[int, Any]) -> Any:
    """``value`` with the arrays of those names; what was one object stays one."""
    if id(value) not in made:
        parts = {key: _with_arrays(part, _join(name, key), arrays, made) for key, part in _parts(value)}
        if isinstance(value, np.ndarray):
            made[id(value)] = arrays.get(name, value)  # arrays without elements are not stored
        elif isinstance(value, list):
            made[id(value)] = list(parts.values())
        else:
            made[id(value)] = dataclasses.replace(value, **parts) if parts else value
    return made[id(value)]


def empty_weights(config: ModelConfig, weight_format: str, max_arrays: int) -> ModelWeights:
    """Weights of the right structure, shapes and dtypes whose arrays occupy no memory.

    Raises :class:`ModelFormatError` as soon as the model turns out to need more than ``max_arrays``.
    """
    return ARCHITECTURES[config.architecture].read_weights(config, _Outline(weight_format, max_arrays))


class _NoTensors:
    """A checkpoint without tensors: adapters then take the names that they take for granted."""

    def names(self) -> list[str]:
        return []


class _Outline(TensorReader):
    """A reader of nothing: it makes arrays that have only a shape and a dtype."""

    def __init__(self, weight_format: str, max_arrays: int):
        super().__init__(_NoTensors(), dry_run=True, pack=WeightPacker(weight_format))
        self._format = weight_format
        self._left = max_arrays

    def array(self, shape: tuple[int, ...], parts: list, transposed: bool = False) -> np.ndarray:
        self._left -= 1
        if self._left < 0:
            raise ModelFormatError("a packed model has fewer arrays than its configuration needs; pack it again.")
        return _empty(shape, np.dtype(np.float32))

    def packed(self, matrix: np.ndarray, role: str = "linear") -> Any:
        kind = _kind(self._format, role)
        if isinstance(kind, np.dtype):
            return _empty(matrix.shape, kind)
        return PackedWeight(kind, *matrix.shape, _empty(*array_shape(kind, *matrix.shape)))


@cache
def _kind(weight_format: str, role: str) -> str | np.dtype:
    """What becomes of a matrix of this role: a packed format, or plain rows of a dtype."""
    packed = WeightPacker(weight_format)(np.zeros((1, 1), np.float32), role)
    return packed.format if isinstance(packed, PackedWeight) else packed.dtype


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    return np.broadcast_to(dtype.type(0), shape)


@cache
def layout_digest(weight_format: str) -> str:
    """A fingerprint of how numbers are packed: of a small matrix, packed.

    A version of minipaged that would pack otherwise does not take a file for one of its own.
    """
    matrix = ((np.arange(50 * 71) * 7919 % 1009 - 504) / 512).astype(np.float32).reshape(50, 71)  # exact everywhere
    digest = hashlib.sha256()
    for role in ("linear", "lm_head", "embedding"):
        packed = WeightPacker(weight_format)(matrix, role)
        for _, array in _walk(packed, "", set()):
            digest.update(array.tobytes())
    return digest.hexdigest()


def stored_tensors(weights: ModelWeights) -> dict[str, tuple[tuple[int, ...], str, int]]:
    """Shape, format and bytes of every matrix and vector, by its path in ``weights``."""
    return dict(_tensors(weights, "", set()))


def _tensors(value: Any, name: str, seen: set[int]) -> Iterator[tuple[str, tuple[tuple[int, ...], str, int]]]:
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, PackedWeight):
        yield name, ((value.num_rows, value.num_columns), value.format, value.nbytes)
    elif isinstance(value, np.ndarray):
        yield name, (value.shape, value.dtype.name, value.nbytes)
    else:
        for key, part in _parts(value):
            yield from _tensors(part, _join(name, key), seen)
