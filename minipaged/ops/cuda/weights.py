"""Weights in a device's memory, packed for the products there while a model is read."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from cuda_kernels.product_plain import GROUP

from .device import Device, DeviceArray


@dataclass
class DeviceWeight:
    """A matrix ``[num_outputs, width]``, or a stack of ``num_experts`` of them, as products read it.

    ``format``: ``"float32"``, ``"float16"``, ``"bfloat16"``, ``"int8"`` (``scales [outputs]``) or ``"int4"``
    (``scales [outputs, groups]``). ``table``: the rows as :mod:`cuda_kernels.embedding` looks them up, where
    this matrix is an embedding too.
    """

    format: str
    num_outputs: int
    width: int
    data: DeviceArray | None
    scales: DeviceArray | None = None
    table: DeviceArray | None = None
    num_experts: int = 1

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        arrays = {id(a): a.nbytes for a in (self.data, self.scales, self.table) if a is not None}
        return sum(arrays.values())


class DevicePacker:
    """How a model's matrices are kept on ``device`` (a :class:`~minipaged.model.weights.Pack`).

    ``weight_format`` is that of the products; an embedding is kept in ``activation``'s. ``tied``: the
    matrix in the role of ``lm_head`` is the embedding too.
    """

    stacks = True

    def __init__(self, device: Device, weight_format: str, activation: str, tied: bool):
        self.device, self.weight_format, self.activation, self.tied = device, weight_format, activation, tied

    def __call__(self, matrix: np.ndarray, role: str) -> DeviceWeight:
        *stack, num_outputs, width = matrix.shape
        num_experts = stack[0] if stack else 1
        if role == "embedding":
            return DeviceWeight(self.activation, num_outputs, width, None, table=self._table(matrix))
        form = "int8" if (self.weight_format, role) == ("int4", "lm_head") else self.weight_format
        packed = pack(form, matrix)
        data, scales = (None if array is None else DeviceArray.from_host(self.device, array) for array in packed)
        table = None
        if role == "lm_head" and self.tied:
            table = data if form == self.activation else self._table(matrix)
        return DeviceWeight(form, num_outputs, width, data, scales, table, num_experts)

    def start(self, num_rows: int, num_columns: int, role: str) -> None:
        """A whole matrix is packed at once."""

    def _table(self, matrix: np.ndarray) -> DeviceArray:
        return DeviceArray.from_host(self.device, pack(self.activation, matrix)[0])


def pack(form: str, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """A float32 matrix ``[..., outputs, width]`` in ``form``, and its scales."""
    if form == "float32":
        return np.ascontiguousarray(matrix, np.float32), None
    if form == "float16":
        return np.clip(matrix, -65504, 65504).astype(np.float16), None
    if form == "bfloat16":
        return to_bfloat16(matrix), None
    if form == "int8":
        scales = np.abs(matrix).max(axis=-1) / np.float32(127)
        inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales > 0)
        return np.rint(matrix * inverse[..., None]).astype(np.int8), scales.astype(np.float32)
    return _pack_int4(matrix)


def _pack_int4(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of two columns each (the first in the low nibble), scales float16 ``[..., outputs, groups]``.

    As GGUF's Q4_0: the value of largest magnitude in a group becomes -8, so ``scale`` has its sign, reversed.
    """
    *rows, width = matrix.shape
    groups = -(-width // GROUP)
    padded = np.zeros((*rows, groups * GROUP), np.float32)
    padded[..., :width] = matrix
    values = padded.reshape(*rows, groups, GROUP)
    extreme = np.take_along_axis(values, np.abs(values).argmax(axis=-1)[..., None], axis=-1)
    scales = (extreme / -8).astype(np.float16)
    divisor = scales.astype(np.float32)
    inverse = np.divide(1, divisor, out=np.zeros_like(divisor), where=divisor != 0)
    q = np.clip(np.rint(values * inverse) + 8, 0, 15).astype(np.uint8).reshape(*rows, -1, 2)
    return q[..., 0] | q[..., 1] << 4, scales[..., 0]


def to_bfloat16(matrix: np.ndarray) -> np.ndarray:
    """The bits of the nearest bfloat16, ties to even, uint16; the numbers are finite."""
    bits = np.ascontiguousarray(matrix, np.float32).view(np.uint32)
    return ((bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)).astype(np.uint16)


def to_device(device: Device, weights):
    """A copy of a tree of dataclasses and lists in which every array has become a :class:`DeviceArray`."""
    if isinstance(weights, np.ndarray):
        return DeviceArray.from_host(device, np.asarray(weights, np.float32))
    if isinstance(weights, list):
        return [to_device(device, item) for item in weights]
    if dataclasses.is_dataclass(weights) and not isinstance(weights, DeviceWeight):
        fields = dataclasses.fields(weights)
        return type(weights)(**{field.name: to_device(device, getattr(weights, field.name)) for field in fields})
    return weights


def total_bytes(weights) -> int:
    """Bytes on the device of everything in such a tree, shared arrays once."""
    found: dict[int, int] = {}

    def visit(value):
        if isinstance(value, DeviceArray):
            found[value.address] = value.nbytes
        elif isinstance(value, list):
            for item in value:
                visit(item)
        elif dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                visit(getattr(value, field.name))

    visit(weights)
    return sum(found.values())
