"""From a model's name or path to its parts: features, tensors, tokenizer, template, defaults."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from minipaged.errors import ModelNotFoundError
from minipaged.model import catalog
from minipaged.model.architectures import config_from_hf
from minipaged.model.chat import ChatTemplate
from minipaged.model.config import ModelConfig
from minipaged.model.json_file import read_object
from minipaged.model.packed_file import is_packed
from minipaged.model.packed_model import PackedModel
from minipaged.model.packed_model import find as find_packed
from minipaged.model.tokenizer import Tokenizer
from minipaged.model.weights import TensorSource


@dataclass
class LoadedModel:
    """A model ready for a runner: nothing of its tensors has been read yet.

    ``hf_config`` is what ``config`` was read from, in ``config.json``'s spelling.
    """

    name: str
    path: Path
    config: ModelConfig
    source: TensorSource | PackedModel
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    hf_config: dict
    generation_config: dict = field(default_factory=dict)

    @property
    def packed_as(self) -> str | None:
        """The format of the weights of a packed model (``"int8"``, ...), ``None`` for any other."""
        return self.source.weight_format if isinstance(self.source, PackedModel) else None


def load_model(name: str, *, pull: bool = True, weight_format: str | None = None) -> LoadedModel:
    """Open ``name`` (catalog name, directory, GGUF file or packed file), pulling it first if ``pull`` allows.

    With ``weight_format``, weights that ``minipaged pack`` has put aside in this format are taken, if
    the model's own files are unchanged since.

    Raises a :class:`~minipaged.errors.ModelError` for files that are missing, malformed, contradict
    each other or describe something unsupported.
    """
    path = catalog.resolve(name, pull=pull)
    if path.is_file() and is_packed(path):
        packed = PackedModel(path)
        model = _load_packed(name, path, packed, packed.generation_config)
    elif weight_format is not None and (packed := find_packed(path, weight_format)):
        defaults = packed.generation_config if path.is_dir() else _recommended(name)
        model = _load_packed(name, path, packed, defaults)
    else:
        model = _load_directory(name, path) if path.is_dir() else _load_gguf(name, path)
    if model.packed_as is None:  # a packed one was checked before it was packed; this takes a while
        model.tokenizer.check_fits(model.config.vocab_size)
    return model


def _load_directory(name: str, path: Path) -> LoadedModel:
    from minipaged.model.safetensors_file import SafetensorsSource

    if not (path / "config.json").is_file():
        raise ModelNotFoundError(f"{path} holds no config.json; a model directory needs one.")
    hf_config = read_object(path / "config.json")
    generation_config = read_object(path / "generation_config.json")
    hf_config = {**hf_config, **_eos_override(generation_config)}
    tokenizer = Tokenizer.from_directory(path)
    return LoadedModel(
        name=name,
        path=path,
        config=config_from_hf(hf_config),
        source=SafetensorsSource(path),
        tokenizer=tokenizer,
        chat_template=ChatTemplate.from_directory(path),
        hf_config=hf_config,
        generation_config=generation_config,
    )


def _load_gguf(name: str, path: Path) -> LoadedModel:
    from minipaged.model.gguf import GGUFFile

    file = GGUFFile(path)
    hf_config = file.hf_config()
    model = LoadedModel(
        name=name,
        path=path,
        config=config_from_hf(hf_config),
        source=file,
        tokenizer=file.tokenizer(),
        chat_template=file.chat_template(),
        hf_config=hf_config,
        generation_config=_recommended(name),
    )
    file.forget_vocabulary()
    return model


def _load_packed(name: str, path: Path, packed: PackedModel, generation_config: dict) -> LoadedModel:
    return LoadedModel(
        name=name,
        path=path,
        config=packed.config,
        source=packed,
        tokenizer=packed.tokenizer(),
        chat_template=packed.chat_template(),
        hf_config=packed.hf_config,
        generation_config=generation_config,
    )


def _recommended(name: str) -> dict:
    """Sampling that the catalog recommends; a GGUF file says nothing about it."""
    return catalog.ENTRIES[name].generation_config if name in catalog.ENTRIES else {}


def _eos_override(generation_config: dict) -> dict:
    """Generation stops where ``generation_config.json`` says, if it says anything."""
    eos = generation_config.get("eos_token_id")
    return {} if eos is None else {"eos_token_id": eos}
