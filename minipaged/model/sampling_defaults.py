"""How a model's makers recommend to sample from it."""

from __future__ import annotations

from minipaged.config import SamplingParams
from minipaged.errors import InvalidParameterError, MinipagedError
from minipaged.model.loader import LoadedModel


def default_sampling_params(model: LoadedModel) -> SamplingParams:
    """What the model's ``generation_config.json`` recommends; greedy if it does not sample.

    Raises :class:`InvalidParameterError` if that is out of range.
    """
    given = model.generation_config
    options = {
        name: given[name]
        for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        if given.get(name) is not None
    }
    if given and not given.get("do_sample", False):
        options = {k: v for k, v in options.items() if k == "repetition_penalty"} | {"temperature": 0}
    try:
        return SamplingParams(**options)
    except MinipagedError as error:
        raise InvalidParameterError(f"generation_config.json of {model.path}: {error}") from None
