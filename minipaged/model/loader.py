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
from minipaged.model.tokenizer import Tokenizer
from minipaged.model.weights import TensorSource


@dataclass
class LoadedModel:
    """A model ready for a runner: nothing of its tensors has been read yet."""

    name: str
    path: Path
    config: ModelConfig
    source: TensorSource
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    generation_config: dict = field(default_factory=dict)


def load_model(name: str, *, pull: bool = True) -> LoadedModel:
    """Open ``name`` (catalog name, directory or GGUF file), pulling it first if ``pull`` allows.

    Raises a :class:`~minipaged.errors.ModelError` for files that are missing, malformed, contradict
    each other or describe something unsupported.
    """
    path = catalog.resolve(name, pull=pull)
    model = _load_directory(name, path) if path.is_dir() else _load_gguf(name, path)
    model.tokenizer.check_fits(model.config.vocab_size)
    return model


def _load_directory(name: str, path: Path) -> LoadedModel:
    from minipaged.model.safetensors_file import SafetensorsSource

    if not (path / "config.json").is_file():
        raise ModelNotFoundError(f"{path} holds no config.json; a model directory needs one.")
    hf_config = read_object(path / "config.json")
    generation_config = read_object(path / "generation_config.json")
    config = config_from_hf({**hf_config, **_eos_override(generation_config)})
    tokenizer = Tokenizer.from_directory(path)
    return LoadedModel(
        name=name,
        path=path,
        config=config,
        source=SafetensorsSource(path),
        tokenizer=tokenizer,
        chat_template=ChatTemplate.from_directory(path),
        generation_config=generation_config,
    )


def _load_gguf(name: str, path: Path) -> LoadedModel:
    from minipaged.model.gguf import GGUFFile

    file = GGUFFile(path)
    return LoadedModel(
        name=name,
        path=path,
        config=config_from_hf(file.hf_config()),
        source=file,
        tokenizer=file.tokenizer(),
        chat_template=file.chat_template(),
        generation_config=catalog.ENTRIES[name].generation_config if name in catalog.ENTRIES else {},
    )


def _eos_override(generation_config: dict) -> dict:
    """Generation stops where ``generation_config.json`` says, if it says anything."""
    eos = generation_config.get("eos_token_id")
    return {} if eos is None else {"eos_token_id": eos}
