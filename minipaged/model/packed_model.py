"""Packed models: one self-contained file with weights as the cpu backend multiplies them, and all else.

Opening one parses a header and maps the file: no tensor is read, converted or copied. Where such a file
lies in ``$MINIPAGED_HOME/packed`` for a model (``minipaged pack`` puts it there), it is used in the place
of the model's own files, as long as those are unchanged.
"""

from __future__ import annotations

import hashlib
import logging
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from minipaged.errors import ModelError, ModelFormatError, UnsupportedModelError
from minipaged.home import home
from minipaged.model.architectures import config_from_hf
from minipaged.model.chat import ChatTemplate
from minipaged.model.config import ModelConfig
from minipaged.model.packed_file import PackedFile
from minipaged.model.tokenizer import MAX_FILE_BYTES, Tokenizer, parse_backend
from minipaged.model.weights import ModelWeights

log = logging.getLogger("minipaged")

SUFFIX = ".mpk"
TOKENIZER = "tokenizer.json"
READ_FROM_DIRECTORIES = ("*.json", "*.safetensors", "*.jinja", "additional_chat_templates/*.jinja")


class PackedModel:
    """An open packed model. It lists its weights as a :class:`~minipaged.model.weights.TensorSource` does.

    Raises :class:`ModelFormatError` if the file is not sound (see :class:`PackedFile`) or a part of the
    header is missing.

    Attributes:
        weight_format: ``"float32"``, ``"bfloat16"``, ``"int8"`` or ``"int4"``, what it was packed as.
        sources: digest of the code that read the model and packed it.
        layout: digest of how numbers were packed.
        stamps: size and time of change of the files it was made from.
        hf_config: the configuration in ``config.json``'s spelling.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        file = PackedFile(self.path)
        self._header, self._arrays = file.header, file.arrays
        self.weight_format: str = self._get("weight_format", str)
        self.sources: str = self._get("sources", str)
        self.layout: str = self._get("layout", str)
        self.stamps: dict = self._get("stamps", dict)
        self.hf_config: dict = self._get("config", dict)
        self.generation_config: dict = self._get("generation_config", dict)
        self._tokenizer_json = self._arrays.pop(TOKENIZER, None)

    @cached_property
    def config(self) -> ModelConfig:
        return config_from_hf(self.hf_config)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer; :class:`TokenizerError` if it is not valid."""
        data, settings = self._tokenizer_json, self._get("tokenizer", dict)
        if data is None or data.dtype != np.uint8 or data.ndim != 1 or data.size > MAX_FILE_BYTES:
            raise self._bad(f"it has no array {TOKENIZER!r} of at most {MAX_FILE_BYTES} bytes")
        bos, eos, prepend = (settings.get(key) for key in ("bos_token_id", "eos_token_ids", "prepend_bos"))
        if (
            not isinstance(eos, list)
            or not isinstance(prepend, bool)
            or any(type(i) is not int or i < 0 for i in [*eos, 0 if bos is None else bos])
        ):
            raise self._bad("the tokenizer's special tokens in its header are not token ids")
        backend = parse_backend(data.tobytes(), self.path)
        return Tokenizer(backend, bos_token_id=bos, eos_token_ids=eos, prepend_bos=prepend)

    def chat_template(self) -> ChatTemplate | None:
        if self._header.get("chat_template") is None:
            return None
        given = self._get("chat_template", dict)
        tokens = given.get("special_tokens")
        if not isinstance(tokens, dict) or not all(isinstance(text, str) for text in tokens.values()):
            raise self._bad("special_tokens of the chat template are not texts")
        return ChatTemplate(given.get("templates"), tokens)

    def weights(self) -> ModelWeights:
        """The weights, in the file's memory.

        Raises :class:`ModelFormatError` if the arrays are not those that the configuration needs, or were
        packed by a minipaged that packed otherwise.
        """
        from minipaged.model.packed_weights import layout_digest, weights_from

        if self.layout != layout_digest(self._known_format()):
            raise self._bad("another version of minipaged packed it, in another layout; pack it again")
        return weights_from(self.config, self.weight_format, self._arrays, self._bad)

    # -- the weights as a list --------------------------------------------------------------------

    def names(self) -> list[str]:
        return list(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored[name][0]

    def stored_as(self, name: str) -> tuple[str, int]:
        """See :meth:`minipaged.model.weights.TensorSource.stored_as`; here it is the packed format."""
        return self._stored[name][1:]

    def read(self, name: str, out: np.ndarray | None = None) -> np.ndarray:
        """Always an error: packed weights cannot be had as they were."""
        raise UnsupportedModelError(
            f"{self.path} holds weights that are packed for the cpu backend; use device='cpu', "
            "or the model that it was made from."
        )

    @cached_property
    def _stored(self) -> dict[str, tuple[tuple[int, ...], str, int]]:
        from minipaged.model.packed_weights import stored_tensors

        return stored_tensors(self.weights())

    # -- helpers ----------------------------------------------------------------------------------

    def staleness(self, source: Path) -> str | None:
        """Why the file no longer stands for the model at ``source``; ``None`` if it does."""
        from minipaged.model.packed_weights import layout_digest

        if self.stamps != stamps(source):
            return "the model's files have changed"
        if self.sources != sources_digest() or self.layout != layout_digest(self._known_format()):
            return "another version of minipaged made it"
        return None

    def _known_format(self) -> str:
        from minipaged.ops.cpu.products import FORMATS

        if self.weight_format not in FORMATS:
            raise self._bad(f"its weights are {self.weight_format[:40]!r}; known are {', '.join(FORMATS)}")
        return self.weight_format

    def _get(self, key: str, type_: type) -> Any:
        value = self._header.get(key)
        if not isinstance(value, type_):
            raise self._bad(f"{key} in its header is a {type(value).__name__}; it must be a {type_.__name__}")
        return value

    def _bad(self, problem: str) -> ModelFormatError:
        return ModelFormatError(f"{self.path}: {problem}.")


@cache
def sources_digest() -> str:
    """sha256 over the sources of this package: what they would read and pack today, they did then."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def stamps(source: Path) -> dict[str, list[int]]:
    """``{name: [bytes, time of last change in ns]}`` of every file that a model is read from."""
    if source.is_dir():
        files = [file for pattern in READ_FROM_DIRECTORIES for file in sorted(source.glob(pattern))]
        return {str(file.relative_to(source).as_posix()): _stamp(file) for file in files}
    return {source.name: _stamp(source)}


def _stamp(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns]


def place(source: Path, weight_format: str) -> Path:
    """Where the packed form of the model at ``source`` belongs."""
    source = source.resolve()
    digest = hashlib.sha256(str(source).encode(errors="surrogateescape")).hexdigest()[:8]
    return home() / "packed" / f"{source.name if source.is_dir() else source.stem}-{weight_format}-{digest}{SUFFIX}"


def find(source: Path, weight_format: str) -> PackedModel | None:
    """The packed form of the model at ``source``, if there is one that still stands for it; the log says which."""
    path = place(source, weight_format)
    if not path.is_file():
        return None
    try:
        packed = PackedModel(path)
        problem = packed.staleness(source)
    except ModelError as error:
        problem = str(error)
    if problem:
        log.warning(
            "%s is not used: %s. The weights are packed anew from %s; `minipaged pack` replaces the file.",
            path, problem, source,
        )  # fmt: skip
        return None
    log.info("using the packed weights in %s, which were made from %s", path, source)
    return packed
