"""Every error a caller can meet, each with the value seen, the limit, and what to do.

All of them derive from :class:`MinipagedError`, so that ``except MinipagedError`` separates "this
was refused, and here is why" from a bug. They never carry half-done work: a call that raises
changes nothing.
"""


class MinipagedError(Exception):
    """Base of every error raised on purpose."""


class ConfigError(MinipagedError, ValueError):
    """An option of the engine is unknown, out of range, or contradicts another one."""


class InvalidParameterError(MinipagedError, ValueError):
    """A field of ``SamplingParams`` (or another per-request setting) is unknown or out of range."""


class RequestError(MinipagedError, ValueError):
    """A request that can never run; it is refused at admission and others never notice."""


class PromptTooLongError(RequestError):
    """Prompt plus ``max_tokens`` exceed ``max_model_len``."""


class PoolTooSmallError(RequestError):
    """A request needs more KV blocks than the whole pool has."""


class TokenRangeError(RequestError):
    """A token id lies outside the model's vocabulary."""


class UnknownRequestError(MinipagedError, KeyError):
    """No request with this id is known (it never existed, or its result was already taken)."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0]) if self.args else ""


class ModelError(MinipagedError):
    """Base of everything that is wrong with a model's files."""


class ModelNotFoundError(ModelError, FileNotFoundError):
    """No such model: neither a name in the catalog nor a path that holds one."""


class ModelFormatError(ModelError, ValueError):
    """A model file is truncated, malformed or contradicts itself."""


class UnsupportedModelError(ModelError):
    """The file is fine, but its architecture or one of its features is not implemented."""


class TokenizerError(ModelError):
    """The tokenizer or chat template cannot be loaded, or fails on this input."""


class DownloadError(MinipagedError):
    """A model could not be pulled (network, checksum, disk)."""


class LicenseNotAcceptedError(DownloadError):
    """The model's terms must be accepted first."""


class BackendUnavailableError(MinipagedError):
    """The requested device cannot be used on this machine; the text says why."""


class DeviceError(MinipagedError):
    """A CUDA device or its driver failed; no more steps can be computed with it."""


class OutOfDeviceMemoryError(DeviceError, MemoryError):
    """The device's memory does not hold what was asked for; the text has the sizes."""


class EngineClosedError(MinipagedError):
    """The engine was closed, or its thread died; no more requests can be made."""


class NumericalError(MinipagedError):
    """The model produced NaN or infinite logits for a request."""


class BenchmarkError(MinipagedError):
    """An engine that minipaged was compared with failed, or did other work than it was asked for."""


class SavedPrefixError(MinipagedError, ValueError):
    """A saved prefix cannot be used: its file is damaged, or it was made by another model or other settings."""


class TraceError(MinipagedError, ValueError):
    """A trace cannot be recorded now, or its file is damaged or was not written by minipaged."""


class IntegrityError(MinipagedError):
    """A law of the block pool was broken: a bug in minipaged, never the caller's fault."""
