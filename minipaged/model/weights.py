"""The weights of a decoder, matrices as float32 arrays or as a backend packed them, and where tensors come from."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


class TensorSource(Protocol):
    """Named tensors of a checkpoint, read one at a time (safetensors and GGUF implement this).

    Names are those of Hugging Face's checkpoints whatever the file format, e.g.
    ``model.layers.0.self_attn.q_proj.weight``; shapes are row-major ``[out, in]``.
    """

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def stored_as(self, name: str) -> tuple[str, int]:
        """The dtype that the tensor has in the file, as the file format calls it, and its bytes there."""
        ...

    def read(self, name: str, out: np.ndarray | None = None) -> np.ndarray:
        """The tensor in float32, written into ``out`` (same shape, float32) if that is given.

        Raises :class:`~minipaged.errors.ModelFormatError` for a missing tensor, a wrong shape, or
        values that are NaN or infinite.
        """
        ...


class Pack(Protocol):
    """``pack(matrix, role)``: a backend's own form of a float32 matrix ``[out, in]``, kept in its place.

    Roles: ``"linear"``; ``"gated"``, the rows of a gate, then those that it multiplies; ``"lm_head"``, which
    is the embedding too where the two are tied; ``"embedding"`` where they are not. Vectors, position
    embeddings and routers stay float32 arrays. With an attribute ``stacks`` that is true, all experts of a
    layer are given at once, ``[E, out, in]``.
    """

    def __call__(self, matrix: np.ndarray, role: str) -> Any: ...

    def start(self, num_rows: int, num_columns: int, role: str) -> Any:
        """A matrix to be written a few rows at a time: it has ``part(first_row, num_rows)`` to read a
        tensor into, and ``packed``, what becomes of it. ``None``: the whole matrix is needed at once."""
        ...


@dataclass
class Norm:
    """``weight [hidden]`` and, for LayerNorm, ``bias [hidden]``."""

    weight: np.ndarray
    bias: np.ndarray | None = None


@dataclass
class Linear:
    """``y = x @ weight.T + bias``; ``weight [out, in]``, ``bias [out]`` or ``None``."""

    weight: np.ndarray
    bias: np.ndarray | None = None


@dataclass
class Experts:
    """A mixture of experts: ``router [E, hidden]``, ``gate_up [E, 2 I, hidden]`` (gate rows first),
    ``down [E, hidden, I]``; packed, the latter two are lists of E matrices."""

    router: np.ndarray
    gate_up: np.ndarray
    down: np.ndarray


@dataclass
class LayerWeights:
    """One layer. ``qkv`` has the rows of q, then k, then v (``num_heads * head_dim``, twice
    ``num_kv_heads * head_dim``). ``gate_up`` has the gate's rows, then up's; only up's where the
    model is not gated. ``gate_up`` and ``down`` are ``None`` where ``experts`` is set."""

    input_norm: Norm
    qkv: Linear
    o: Linear
    mlp_norm: Norm
    gate_up: Linear | None = None
    down: Linear | None = None
    experts: Experts | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    post_attention_norm: Norm | None = None
    post_mlp_norm: Norm | None = None


@dataclass
class ModelWeights:
    """``embedding [vocab, hidden]``; ``lm_head [vocab, hidden]`` is the same array when tied;
    ``positions [max_position, hidden]`` for learned positions."""

    embedding: np.ndarray
    lm_head: np.ndarray
    final_norm: Norm
    layers: list[LayerWeights]
    positions: np.ndarray | None = None


def digest(weights: ModelWeights) -> str:
    """sha256, in hexadecimal, over the place, dtype, shape and bytes of every array, those on a device too."""
    found = hashlib.sha256()
    for name, array in _arrays(weights, ""):
        found.update(f"{name} {array.dtype} {array.shape}\n".encode())
        found.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return found.hexdigest()


def _arrays(value: Any, name: str) -> Iterator[tuple[str, np.ndarray]]:
    if isinstance(value, np.ndarray):
        yield name, value
    elif hasattr(value, "to_host"):
        yield name, value.to_host()
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _arrays(item, f"{name}.{index}")
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _arrays(getattr(value, field.name), f"{name}.{field.name}")
