"""The architectures that can be run: from ``config.json`` to features, from tensors to weights.

Whatever is not implemented is refused by name. A feature that is switched on in ``config.json`` but
not known here, or a tensor left over in the file, is an error too: a model is run as its authors
meant it, or not at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from minipaged.errors import ModelFormatError, UnsupportedModelError
from minipaged.model.adapters import common, gemma, gpt2, llama, moe, phi3
from minipaged.model.config import ModelConfig
from minipaged.model.hf_config import ConfigReader
from minipaged.model.tensor_reader import TensorReader, read_weights
from minipaged.model.weights import ModelWeights, Pack, TensorSource


@dataclass(frozen=True)
class Architecture:
    """An adapter: the ``model_type`` it belongs to, how its configuration and its tensors are read,
    and (a regular expression) stored tensors that carry nothing."""

    model_type: str
    read_config: Callable[[ConfigReader], ModelConfig]
    read_weights: Callable[[ModelConfig, TensorReader], ModelWeights]
    ignored_tensors: str = ""


ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": Architecture("llama", llama.llama, common.weights),
    "MistralForCausalLM": Architecture("mistral", llama.mistral, common.weights),
    "Qwen2ForCausalLM": Architecture("qwen2", llama.qwen2, common.weights),
    "Qwen3ForCausalLM": Architecture("qwen3", llama.qwen3, common.weights),
    "Gemma2ForCausalLM": Architecture("gemma2", gemma.gemma2, gemma.weights),
    "Gemma3ForCausalLM": Architecture("gemma3_text", gemma.gemma3, gemma.weights),
    "Phi3ForCausalLM": Architecture("phi3", phi3.phi3, common.weights),
    "GPT2LMHeadModel": Architecture("gpt2", gpt2.gpt2, gpt2.weights, gpt2.IGNORED_TENSORS),
    "MixtralForCausalLM": Architecture("mixtral", moe.mixtral, moe.weights),
    "Qwen3MoeForCausalLM": Architecture("qwen3_moe", moe.qwen3_moe, moe.weights),
}


def config_from_hf(values: dict) -> ModelConfig:
    """The features that a ``config.json`` (transformers 4 or 5 spelling) describes.

    Raises :class:`~minipaged.errors.ModelFormatError` where it is malformed or contradicts itself,
    and :class:`~minipaged.errors.UnsupportedModelError` where it asks for something not implemented.
    """
    name = _architecture_name(values)
    reader = ConfigReader({**values, "architectures": [name]})
    reader.agree("torch_dtype", "dtype")
    config = ARCHITECTURES[name].read_config(reader)
    reader.finish()
    return config


def load_weights(config: ModelConfig, source: TensorSource, pack: Pack | None = None) -> ModelWeights:
    """The weights of a model in float32, each tensor read straight into its place.

    With ``pack``, each matrix takes the form that it gives, before the next one is read.

    Names and shapes are checked before anything is allocated. Raises
    :class:`~minipaged.errors.ModelFormatError` for tensors that are missing, misshaped, unexpected,
    or contradict ``tie_word_embeddings``.
    """
    architecture = ARCHITECTURES[config.architecture]
    return read_weights(
        source, lambda tensors: architecture.read_weights(config, tensors), architecture.ignored_tensors, pack
    )


def _architecture_name(values: dict) -> str:
    names, model_type = values.get("architectures"), values.get("model_type")
    known = ", ".join(ARCHITECTURES)
    if names is None:
        names = [name for name, a in ARCHITECTURES.items() if a.model_type == model_type]
        if not names:
            raise UnsupportedModelError(
                f"config.json: architectures is missing and model_type is {model_type!r}. Implemented: {known}."
            )
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise ModelFormatError(f"config.json: architectures is {names!r}; it must be a list of one name.")
    name = names[0]
    if name not in ARCHITECTURES:
        raise UnsupportedModelError(f"config.json: architecture {name!r} is not implemented. Implemented: {known}.")
    if model_type not in (None, ARCHITECTURES[name].model_type):
        raise ModelFormatError(
            f"config.json: architecture {name!r} belongs to model_type {ARCHITECTURES[name].model_type!r}, "
            f"but model_type is {model_type!r}."
        )
    return name
