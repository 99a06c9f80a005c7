"""Weights in a device's memory, packed for the products there while a model is read."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from cuda_kernels import packing

from .device import Device, DeviceArray


@dataclass
class DeviceWeight:
    """A matrix ``[num_outputs, width]``, or a stack of ``num_experts`` of them, as products read it.

    ``format``: ``"float32"``, ``"float16"``, ``"bfloat16"``, ``"int8"`` or ``"int4"``. ``fragments``: packed for
    tensor cores, and ``interleaved`` for a gated product there (both: :mod:`cuda_kernels.packing`). ``table``:
    the rows as :mod:`cuda_kernels.embedding` looks them up, where this matrix is an embedding too.
    """

    format: str
    num_outputs: int
    width: int
    data: DeviceArray | None
    scales: DeviceArray | None = None
    table: DeviceArray | None = None
    num_experts: int = 1
    fragments: bool = False
    interleaved: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        arrays = {a.address: a.nbytes for a in (self.data, self.scales, self.table) if a is not None}
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
        if role == "embedding":
            return DeviceWeight(self.activation, num_outputs, width, None, table=self._table(matrix))
        form = "int8" if (self.weight_format, role) == ("int4", "lm_head") else self.weight_format
        fragments = fits_tensor_cores(self.device.compute_capability, self.activation, form, width)
        interleaved = fragments and role == "gated"
        packed = [self._pack(form, one, fragments, interleaved) for one in matrix.reshape(-1, num_outputs, width)]
        data = DeviceArray.from_host(self.device, np.stack([one.data for one in packed]))
        scales = None
        if packed[0].scales.size:
            scales = DeviceArray.from_host(self.device, np.stack([one.scales for one in packed]))
        table = None
        if role == "lm_head" and self.tied:
            table = data if form == self.activation and not fragments else self._table(matrix)
        num_experts = stack[0] if stack else 1
        return DeviceWeight(form, num_outputs, width, data, scales, table, num_experts, fragments, interleaved)

    def start(self, num_rows: int, num_columns: int, role: str) -> None:
        """A whole matrix is packed at once."""

    def _pack(self, form: str, matrix: np.ndarray, fragments: bool, interleaved: bool) -> packing.Packed:
        if not fragments:
            return packing.pack_rows(form, matrix)
        return packing.pack_fragments(form, packing.interleave_gated(matrix) if interleaved else matrix)

    def _table(self, matrix: np.ndarray) -> DeviceArray:
        return DeviceArray.from_host(self.device, packing.to_bits(self.activation, matrix))


def fits_tensor_cores(capability: tuple[int, int], activation: str, weight_format: str, width: int) -> bool:
    """Whether :mod:`cuda_kernels.product` computes this product on such a card; else the plain one does."""
    if activation == "float32" or width % 8 or (activation == "bfloat16" and capability < (8, 0)):
        return False
    return weight_format in (activation, "int8", "int4")


def weights_on_device(device: Device, weights, activation: str):
    """Everything of a model's weights on the device: the matrices are there, vectors and what is neither follow.

    ``weights``: :class:`~minipaged.model.weights.ModelWeights`, whose matrices :class:`DevicePacker` has packed.
    """
    positions, weights.positions = weights.positions, None
    for layer in weights.layers:
        gate_up = layer.gate_up
        if gate_up is not None and gate_up.bias is not None and gate_up.weight.interleaved:
            gate_up.bias = packing.interleave_gated(gate_up.bias[:, None])[:, 0]
    moved = _to_device(device, weights)
    if positions is not None:
        moved.positions = DeviceArray.from_host(device, packing.to_bits(activation, positions))
    for layer in moved.layers:
        if layer.experts is not None:
            router = layer.experts.router
            layer.experts.router = DeviceWeight("float32", *router.shape, router)
    return moved


def _to_device(device: Device, weights):
    """A copy of a tree of dataclasses and lists in which every array has become a :class:`DeviceArray`."""
    if isinstance(weights, np.ndarray):
        return DeviceArray.from_host(device, np.asarray(weights, np.float32))
    if isinstance(weights, list):
        return [_to_device(device, item) for item in weights]
    if dataclasses.is_dataclass(weights) and not isinstance(weights, DeviceWeight):
        fields = dataclasses.fields(weights)
        return type(weights)(**{field.name: _to_device(device, getattr(weights, field.name)) for field in fields})
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
