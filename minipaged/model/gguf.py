"""GGUF, the one-file model format of llama.cpp: tensors, configuration, tokenizer and chat template."""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from minipaged.errors import ModelFormatError
from minipaged.model.chat import ChatTemplate
from minipaged.model.gguf_config import hf_config, rope_factors_config
from minipaged.model.gguf_header import TensorInfo, read_header
from minipaged.model.gguf_names import ROPE_TENSORS, TensorView, hf_tensors
from minipaged.model.gguf_quants import dequantize
from minipaged.model.gguf_tokenizer import GGUFVocabulary
from minipaged.model.slabs import SLAB_ELEMENTS, as_rows, fill, let_go, map_file, target_array
from minipaged.model.tokenizer import Tokenizer

if TYPE_CHECKING:
    from minipaged.model.weight_packer import PackedRows

VOCABULARY_KEYS = tuple(f"tokenizer.ggml.{name}" for name in ("tokens", "scores", "merges", "token_type"))


class GGUFFile:
    """A GGUF file (version 2 or 3) as Hugging Face would have stored the model.

    It is a :class:`~minipaged.model.weights.TensorSource`: values are decoded to float32 while they
    are read, a slab at a time, from a memory map.

    Raises :class:`~minipaged.errors.ModelFormatError` or
    :class:`~minipaged.errors.UnsupportedModelError` if the header is not sound.

    Attributes:
        metadata: every key of the header; without its long lists after :meth:`forget_vocabulary`.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._header = read_header(self.path)
        self.metadata = self._header.metadata
        self._config = hf_config(self._header)
        self._views = hf_tensors(self._header, self._config)

    def names(self) -> list[str]:
        return list(self._views)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._view(name).shape

    def stored_as(self, name: str) -> tuple[str, int]:
        """See :meth:`minipaged.model.weights.TensorSource.stored_as`."""
        view = self._view(name)
        kind = view.info.type
        return kind.name, math.prod(view.shape) // kind.block_size * kind.type_size

    def read(self, name: str, out: np.ndarray | None = None) -> np.ndarray:
        """See :meth:`minipaged.model.weights.TensorSource.read`."""
        view = self._view(name)
        out = target_array(name, view.shape, out)
        if view.interleaved_heads:
            # [head, 2 i + j] in the file is [head, j * half + i] in Hugging Face's order.
            target = out.reshape(-1, 1) if out.ndim == 1 else out
            order = np.arange(target.shape[0]).reshape(view.interleaved_heads, 2, -1).swapaxes(1, 2).reshape(-1)
        else:
            target, order = out.T if view.transposed else as_rows(out), None
        if view.info.type.name in getattr(target, "block_types", ()) and not view.shift:
            self._copy_blocks(name, view, target, order)
        else:
            first_element = view.first_row * view.info.shape[-1]
            fill(
                name,
                target,
                lambda start, slab: self._decode(view.info, first_element + start, slab),
                order,
                view.shift,
            )
        let_go(self._bytes)
        return out

    def hf_config(self) -> dict:
        """The model's configuration in ``config.json``'s spelling."""
        vocabulary = self._vocabulary
        factors = {name: self._read_info(info) for name, info in self._header.tensors.items() if name in ROPE_TENSORS}
        return (
            self._config
            | rope_factors_config(self._header, self._config, factors)
            | {"bos_token_id": vocabulary.bos_token_id, "eos_token_id": vocabulary.eos_token_ids}
        )

    def tokenizer(self) -> Tokenizer:
        """The tokenizer, rebuilt from the vocabulary in the metadata."""
        vocabulary = self._vocabulary
        return Tokenizer(
            vocabulary.build(), bos_token_id=vocabulary.bos_token_id, eos_token_ids=vocabulary.eos_token_ids
        )

    def chat_template(self) -> ChatTemplate | None:
        source = self.metadata.get("tokenizer.chat_template")
        if source is None:
            return None
        if not isinstance(source, str):
            raise ModelFormatError(f"metadata tokenizer.chat_template is a {type(source).__name__}; it must be text.")
        return ChatTemplate(source, self._vocabulary.special_tokens())

    def forget_vocabulary(self) -> None:
        """Give back the memory of tokens, scores and merges (SmolLM2: 7 MiB); no tokenizer or template can be had
        any more."""
        self.__dict__.pop("_vocabulary", None)
        for key in VOCABULARY_KEYS:
            self.metadata.pop(key, None)

    @cached_property
    def _vocabulary(self) -> GGUFVocabulary:
        return GGUFVocabulary(self.metadata)

    @cached_property
    def _bytes(self) -> np.ndarray:
        return map_file(self.path, self._header.file_size)

    def _view(self, name: str) -> TensorView:
        try:
            return self._views[name]
        except KeyError:
            raise ModelFormatError(f"{self.path} has no tensor {name!r}.") from None

    def _read_info(self, info: TensorInfo) -> np.ndarray:
        out = np.empty(info.shape, dtype=np.float32)
        fill(info.name, as_rows(out), lambda start, slab: self._decode(info, start, slab))
        return out

    def _copy_blocks(self, name: str, view: TensorView, target: PackedRows, order: np.ndarray | None) -> None:
        """Hand over a tensor's blocks as they are stored, a slab of rows at a time."""
        rows, columns = target.shape
        _, _, block_size, type_size = view.info.type
        row_bytes = columns // block_size * type_size
        start = view.info.offset + view.first_row * row_bytes
        blocks = self._bytes[start : start + rows * row_bytes].reshape(rows, -1, type_size)
        step = max(1, SLAB_ELEMENTS // columns)
        for first in range(0, rows, step):
            places = slice(first, first + step) if order is None else order[first : first + step]
            target.put_blocks(name, view.info.type.name, places, blocks[first : first + step])

    def _decode(self, info: TensorInfo, first: int, slab: np.ndarray) -> None:
        """Decode the values of a tensor from the ``first`` on; whole blocks."""
        _, _, block_size, type_size = info.type
        start = info.offset + first // block_size * type_size
        dequantize(self._bytes[start : start + slab.size // block_size * type_size], info.type, slab)
