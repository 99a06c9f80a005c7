"""How long a sequence may be, and how many KV blocks the pool gets, when the user did not say."""

from __future__ import annotations

import os
from pathlib import Path

from minipaged.config import EngineConfig
from minipaged.errors import ConfigError
from minipaged.model.config import ModelConfig

DEFAULT_KV_CACHE_LIMIT = 2 << 30
"""Bytes that the pool takes at most unless ``kv_cache_memory`` or ``num_blocks`` says otherwise."""


def resolve_max_model_len(config: EngineConfig, model: ModelConfig) -> int:
    """Tokens a sequence may have: the option, or what the model was made for.

    Raises :class:`ConfigError` if the option asks for more positions than the model has.
    """
    if config.max_model_len is None:
        return model.max_position_embeddings
    if config.max_model_len > model.max_position_embeddings:
        raise ConfigError(
            f"max_model_len is {config.max_model_len}, but {model.architecture} was made for "
            f"{model.max_position_embeddings} positions at most; lower max_model_len."
        )
    return config.max_model_len


def kv_block_bytes(model: ModelConfig, block_size: int, bytes_per_value: int) -> int:
    """Bytes of one block: K and V of ``block_size`` tokens in every layer."""
    return 2 * model.num_layers * block_size * model.num_kv_heads * model.head_dim * bytes_per_value


DEVICE_SHARE = 0.9
"""Of what a device's memory has left; the rest is for the driver's own needs."""


def resolve_num_blocks(
    config: EngineConfig, max_model_len: int, block_bytes: int, device_memory: int | None = None
) -> int:
    """Blocks of the pool: the option, or what fits ``kv_cache_memory``, or a sensible share.

    ``block_bytes``: of one block, in all layers. ``device_memory``: bytes left on a device that has
    memory of its own; ``None``: the pool lies in the host's.
    Raises :class:`ConfigError` if the memory given, or the memory free, does not hold the pool.
    """
    available = available_memory() if device_memory is None else device_memory
    if config.num_blocks is not None:
        needed = config.num_blocks * block_bytes
        if available is not None and needed > available:
            raise ConfigError(
                f"num_blocks is {config.num_blocks}: {needed:,} bytes of KV cache, but only {available:,} bytes "
                f"of memory are free, which hold {available // block_bytes} blocks; lower num_blocks."
            )
        return config.num_blocks
    if config.kv_cache_memory is not None:
        budget = config.kv_cache_memory
        if budget < block_bytes:
            raise ConfigError(
                f"kv_cache_memory is {budget:,} bytes, but one block of {config.block_size} tokens takes "
                f"{block_bytes:,} bytes; raise it."
            )
        if available is not None and budget > available:
            raise ConfigError(f"kv_cache_memory is {budget:,} bytes, but only {available:,} bytes are free; lower it.")
    elif device_memory is not None:
        budget = int(DEVICE_SHARE * device_memory)
    else:
        budget = DEFAULT_KV_CACHE_LIMIT if available is None else min(DEFAULT_KV_CACHE_LIMIT, available // 4)
    useful = config.max_num_seqs * -(-max_model_len // config.block_size)
    return max(1, min(budget // block_bytes, useful))


def resolve_num_host_blocks(config: EngineConfig, block_bytes: int) -> int:
    """Blocks of host memory that ``swap_space`` holds.

    Raises :class:`ConfigError` if that is less than one, or more memory than is free.
    """
    if config.swap_space == 0:
        return 0
    if config.swap_space < block_bytes:
        raise ConfigError(
            f"swap_space is {config.swap_space:,} bytes, but one block of {config.block_size} tokens takes "
            f"{block_bytes:,} bytes; raise it, or set 0 for none."
        )
    available = available_memory()
    if available is not None and config.swap_space > available:
        raise ConfigError(f"swap_space is {config.swap_space:,} bytes, but {available:,} bytes are free; lower it.")
    return config.swap_space // block_bytes


def available_memory() -> int | None:
    """Bytes that this process may still take (the machine's and the control group's), if known."""
    found = [limit for limit in (_free_memory(), _cgroup_memory()) if limit is not None]
    return min(found) if found else None


def _free_memory() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _cgroup_memory() -> int | None:
    root = Path("/sys/fs/cgroup")
    for limit, usage in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            left = int((root / limit).read_text()) - int((root / usage).read_text())
            return max(left, 0)
        except (OSError, ValueError):  # absent, or "max"
            continue
    return None
