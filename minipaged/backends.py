"""Which devices can compute here, and why the others cannot."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from minipaged import sizing
from minipaged.config import QUANTIZATIONS, EngineConfig
from minipaged.errors import BackendUnavailableError, ConfigError, MinipagedError
from minipaged.model.config import ModelConfig

log = logging.getLogger("minipaged")

CPU_DEFAULT_WEIGHTS = "bfloat16"
"""What the cpu backend's ``dtype="auto"`` means without ``quantization``."""


@dataclass(frozen=True)
class Backend:
    """One device as seen on this machine: ``reason`` says what it is, or why it is not available.

    ``capability``: of a CUDA device. ``emulated``: it works, but nobody wants it unasked.
    """

    name: str
    available: bool
    reason: str
    capability: tuple[int, int] = (0, 0)
    emulated: bool = False


@dataclass(frozen=True)
class Formats:
    """How a backend keeps numbers: ``weights`` and ``kv_cache`` are ``"float32"``, ``"int8"``, ...;
    ``activations`` is what a product reads on a CUDA device."""

    weights: str
    kv_cache: str
    activations: str = "float32"


def _probe_cuda() -> Backend:
    from minipaged.ops.cuda import available

    found = available.examine()
    return Backend("cuda", found.problem is None, found.problem or found.name, found.capability, found.emulated)


def _probe_cpu() -> Backend:
    try:
        import numba

        from minipaged.ops.cpu import features

        level = features.current().level
    except ImportError as error:
        return Backend("cpu", False, f"Numba cannot be imported: {error}")
    except MinipagedError as error:
        return Backend("cpu", False, str(error))
    return Backend("cpu", True, f"Numba {numba.__version__}, {level} instructions")


def _probe_reference() -> Backend:
    return Backend("reference", True, "NumPy, float32")


# The fastest first. Each is probed only where it is asked for: reference must not wait for Numba.
_PROBES = {"cuda": _probe_cuda, "cpu": _probe_cpu, "reference": _probe_reference}

# What each backend takes for the options that not all of them take.
_OFFERED = {
    "reference": {
        "dtype": ("auto", "float32"),
        "quantization": (None,),
        "kv_cache_dtype": ("auto", "float32"),
    },
    "cpu": {
        "dtype": ("auto", "float32", "bfloat16"),
        "quantization": (None, "int8", "int4"),
        "kv_cache_dtype": ("auto", "float32", "bfloat16", "int8"),
    },
    "cuda": {
        "dtype": ("auto", "float32", "float16", "bfloat16"),
        "quantization": (None, "int8", "int4"),
        "kv_cache_dtype": ("auto", "float32", "float16", "bfloat16", "int8"),
    },
}


def examine(name: str) -> Backend:
    """The state of one backend on this machine."""
    return _PROBES[name]()


def probe() -> list[Backend]:
    """Every backend, the fastest first, with its state on this machine."""
    return [examine(name) for name in _PROBES]


def choose(device: str) -> Backend:
    """The backend for ``device``; ``"auto"`` takes the first that is available and logs why.

    Raises :class:`BackendUnavailableError` if the named device cannot be used here.
    """
    if device == "auto":
        passed_over = []
        for name in _PROBES:
            backend = examine(name)
            if backend.available and not backend.emulated:
                log.info("device=auto chose %s (%s); %s", backend.name, backend.reason, "; ".join(passed_over))
                return backend
            passed_over.append(f"{backend.name}: {backend.reason}")
    backend = examine(device)
    if not backend.available:
        usable = ", ".join(repr(b.name) for b in probe() if b.available)
        raise BackendUnavailableError(f"device {device!r} cannot be used: {backend.reason}. Usable here: {usable}.")
    if backend.emulated:
        log.warning(
            "MINIPAGED_CUDA=emulate: kernels run in the PTX interpreter as on %s. That shows whether they are right, "
            "and is many thousand times slower than a card.",
            backend.reason,
        )
    return backend


def check_options(backend: Backend, config: EngineConfig) -> None:
    """Raise :class:`ConfigError` for an option that ``backend`` does not implement."""
    for name, values in _OFFERED[backend.name].items():
        value = getattr(config, name)
        if value not in values:
            raise ConfigError(
                f"{name} is {value!r}, which the {backend.name} backend does not offer; "
                f"it takes {' or '.join(map(repr, values))}."
            )


@contextmanager
def importing_ahead(backend: Backend) -> Iterator[None]:
    """Let a thread import what the cpu backend needs, while the body reads a model.

    Numba fills its tables for the better part of a second; a tokenizer is parsed meanwhile, by a library
    that lets other threads run. An error is left to whoever imports the same next. The thread has ended afterwards,
    also where the body raises: a process that ends while LLVM is being set up may crash.
    """
    if backend.name != "cpu":
        yield
        return
    thread = threading.Thread(target=_import_cpu, name="minipaged-start", daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def _import_cpu() -> None:
    from numba.core.compiler_lock import global_compiler_lock
    from numba.core.registry import cpu_target

    import minipaged.model.cpu_decoder  # noqa: F401

    with global_compiler_lock:
        cpu_target.typing_context.refresh()
        cpu_target.target_context.refresh()


def choose_formats(backend: Backend, config: EngineConfig, packed_as: str | None = None) -> Formats:
    """How ``backend`` shall keep weights and KV under these options.

    ``packed_as`` is the format of a packed model's weights, which takes effect where the options say
    nothing. Raises :class:`ConfigError` where they say something else, or ``backend`` is not cpu.

    ``dtype="float32"`` without quantization keeps everything in float32. The cpu backend's
    ``dtype="auto"`` is ``CPU_DEFAULT_WEIGHTS``; its KV cache is float32 if ``dtype`` is, int8 beside quantised
    weights where the CPU multiplies bytes (VNNI), else bfloat16.
    The cuda backend's is bfloat16, or float16 on cards before compute capability 8.0, which multiply
    that faster; its activations and KV cache follow ``dtype``.
    """
    if packed_as and backend.name != "cpu":
        raise ConfigError(
            f"{config.model} holds weights that are packed for the cpu backend; use device='cpu', "
            f"or with device={config.device!r} the model that it was made from."
        )
    if backend.name == "reference":
        return Formats("float32", "float32")
    if backend.name == "cuda":
        activations = config.dtype
        if activations == "auto":
            activations = "bfloat16" if backend.capability >= (8, 0) else "float16"
        kv_cache = activations if config.kv_cache_dtype == "auto" else config.kv_cache_dtype
        return Formats(config.quantization or activations, kv_cache, activations)
    weights = config.quantization or (CPU_DEFAULT_WEIGHTS if config.dtype == "auto" else config.dtype)
    if packed_as and weights != packed_as:
        if config.quantization is not None or config.dtype != "auto":
            raise ConfigError(
                f"{config.model} holds {packed_as} weights, but quantization={config.quantization!r} and "
                f"dtype={config.dtype!r} ask for {weights}; leave these options out, or pack the model so."
            )
        weights = packed_as
    kv_cache = config.kv_cache_dtype
    if kv_cache == "auto":
        kv_cache = _default_kv_cache(config.dtype, weights)
    return Formats(weights, kv_cache)


def _default_kv_cache(dtype: str, weights: str) -> str:
    """int8 KV costs little in perplexity beside quantised weights, and half the memory and its traffic."""
    from minipaged.ops.cpu import features

    if dtype == "float32":
        return "float32"
    return "int8" if weights in QUANTIZATIONS and features.current().has_vnni else "bfloat16"


def packed_format(backend: Backend, config: EngineConfig) -> str | None:
    """The format of the packed weights that ``backend`` could use under these options; ``None``: of no kind."""
    return choose_formats(backend, config).weights if backend.name == "cpu" else None


def kv_block_bytes(formats: Formats, backend: Backend, model: ModelConfig, block_size: int) -> int:
    """Bytes of one KV block: K and V of ``block_size`` tokens in every layer."""
    if backend.name == "cpu":
        from minipaged.ops.cpu.kv import KVLayout

        layout = KVLayout(formats.kv_cache, block_size, model.num_kv_heads, model.head_dim)
        return model.num_layers * layout.block_bytes
    if backend.name == "cuda":
        from minipaged.ops.cuda.kv import CudaKVLayout

        layout = CudaKVLayout(formats.kv_cache, block_size, model.num_kv_heads, model.head_dim)
        return model.num_layers * layout.block_bytes
    return sizing.kv_block_bytes(model, block_size, bytes_per_value=4)


def memory_for_kv_cache(
    backend: Backend, models: list[tuple[ModelConfig, Formats]], config: EngineConfig, max_model_len: int
) -> int | None:
    """Bytes of a device's memory that the weights and buffers of all ``models`` will leave; ``None``: the backend
    lives in the host's.

    Raises :class:`~minipaged.errors.OutOfDeviceMemoryError` if not even they fit.
    """
    if backend.name != "cuda":
        return None
    from minipaged.ops.cuda import memory
    from minipaged.ops.cuda.available import open_device
    from minipaged.ops.cuda.kv import staging_bytes

    device = open_device()
    try:
        max_blocks = -(-max_model_len // config.block_size)
        needs = [
            memory.Needs(model, formats.weights, formats.activations, config.max_num_batched_tokens, max_blocks)
            for model, formats in models
        ]
        reserved = 0
        if config.swap_space:
            model, formats = models[0]
            reserved = staging_bytes(kv_block_bytes(formats, backend, model, config.block_size))
        return memory.left_for_kv_cache(device, needs, reserved)
    finally:
        device.close()


def set_num_threads(num_threads: int | None) -> None:
    """Let BLAS use ``num_threads`` threads; ``None`` leaves it its own choice.

    BLAS has one pool a process: the engine that was made last decides for all.
    """
    if num_threads is not None:
        from threadpoolctl import threadpool_limits

        threadpool_limits(limits=num_threads, user_api="blas")
