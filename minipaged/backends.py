"""Which devices can compute here, and why the others cannot."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from minipaged.config import EngineConfig
from minipaged.errors import BackendUnavailableError, ConfigError

log = logging.getLogger("minipaged")


@dataclass(frozen=True)
class Backend:
    """One device as seen on this machine: ``reason`` says what it is, or why it is not available."""

    name: str
    available: bool
    reason: str


def probe() -> list[Backend]:
    """Every backend, the fastest first, with its state on this machine."""
    return [
        Backend("cuda", False, "not part of this version of minipaged"),
        Backend("cpu", False, "not part of this version of minipaged"),
        Backend("reference", True, "NumPy, float32"),
    ]


def choose(device: str) -> Backend:
    """The backend for ``device``; ``"auto"`` takes the first that is available and logs why.

    Raises :class:`BackendUnavailableError` if the named device cannot be used here.
    """
    backends = probe()
    if device == "auto":
        chosen = next(b for b in backends if b.available)
        passed_over = "; ".join(f"{b.name}: {b.reason}" for b in backends if not b.available)
        log.info("device=auto chose %s (%s); %s", chosen.name, chosen.reason, passed_over)
        return chosen
    backend = next(b for b in backends if b.name == device)
    if not backend.available:
        usable = ", ".join(repr(b.name) for b in backends if b.available)
        raise BackendUnavailableError(f"device {device!r} cannot be used: {backend.reason}. Usable here: {usable}.")
    return backend


def check_options(backend: Backend, config: EngineConfig) -> None:
    """Raise :class:`ConfigError` for an option that ``backend`` does not implement."""
    offered = {
        "dtype": ("auto", "float32"),
        "quantization": (None,),
        "kv_cache_dtype": ("auto", "float32"),
        "speculative_model": (None,),
        "swap_space": (0,),
    }
    for name, values in offered.items():
        value = getattr(config, name)
        if value not in values:
            raise ConfigError(
                f"{name} is {value!r}, which the {backend.name} backend does not offer; "
                f"it takes {' or '.join(map(repr, values))}."
            )


def set_num_threads(num_threads: int | None) -> None:
    """Let BLAS use ``num_threads`` threads; ``None`` leaves it its own choice.

    BLAS has one pool a process: the engine that was made last decides for all.
    """
    if num_threads is not None:
        from threadpoolctl import threadpool_limits

        threadpool_limits(limits=num_threads, user_api="blas")
