"""minipaged: a torch-free engine for large language models, with a paged KV cache.

>>> from minipaged import LLM, SamplingParams
>>> llm = LLM("tiny")
>>> llm.generate("ROMEO:", SamplingParams(temperature=0))[0].outputs[0].text

Names are imported when first used, so that ``import minipaged`` itself costs almost nothing.
"""

from importlib import import_module

__version__ = "0.1.0"

_EXPORTS = {
    "LLM": "minipaged.llm",
    "AsyncLLM": "minipaged.async_llm",
    "Engine": "minipaged.engine",
    "EngineConfig": "minipaged.config",
    "SamplingParams": "minipaged.config",
    "RequestOutput": "minipaged.outputs",
    "CompletionOutput": "minipaged.outputs",
    "EngineStats": "minipaged.outputs",
    "MinipagedError": "minipaged.errors",
}

__all__ = [*_EXPORTS, "__version__"]


def __getattr__(name: str):
    try:
        module = _EXPORTS[name]
    except KeyError:
        raise AttributeError(f"module 'minipaged' has no attribute {name!r}") from None
    value = getattr(import_module(module), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)
