"""Saved prefixes: the KV of a prompt in a file, so that another process need not compute it again.

    save    prompt ─▶ its full blocks, found in the prefix cache ─▶ [token ids | KV of each block] ─▶ file
    load    file ─▶ checked ─▶ free blocks, filled and then published: the next request with that prefix hits

A file is of use only where the very same numbers would be computed. So it names everything that they
depend on: the weights (their digest), how the backend keeps weights and KV, the block size, the
instructions that the kernels use, or the card that runs them. A file of which anything differs, or a
byte is damaged, is refused.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minipaged import __version__
from minipaged.core.block_pool import NoFreeBlocksError
from minipaged.engine import Engine
from minipaged.errors import ConfigError, ModelError, PoolTooSmallError, RequestError, SavedPrefixError
from minipaged.model import packed_file

KIND = "saved prefix"
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")  # where max_model_len decides about frequencies


@dataclass
class SavedPrefix:
    """``token_ids`` of whole blocks, and their KV: ``blocks``, uint8 ``[blocks, bytes]``."""

    token_ids: list[int]
    blocks: np.ndarray


def export(engine: Engine, token_ids: list[int], cache_salt: str | None = None) -> SavedPrefix:
    """Copy the KV of the prompt's full blocks out of the engine, between two steps.

    Raises:
        RequestError: the prompt does not fill a block.
        SavedPrefixError: the KV is not (or no longer) in the prefix cache.
    """
    scheduler, block_size = engine.scheduler, engine.config.block_size
    wanted = len(token_ids) // block_size
    if wanted == 0:
        raise RequestError(
            f"the prompt has {len(token_ids)} tokens, fewer than one block of {block_size}; only full blocks can be "
            "saved. Lengthen the prompt or lower block_size."
        )
    found = scheduler.prefix_cache.find(token_ids[: wanted * block_size], cache_salt)
    if len(found) < wanted:
        raise SavedPrefixError(
            f"{len(found)} of the prompt's {wanted} blocks are in the prefix cache: other requests took the place of "
            f"the rest. Save when there is less to do, or raise num_blocks ({scheduler.pool.num_blocks})."
        )
    blocks = engine.runner.kv_cache.read_blocks(found)
    return SavedPrefix(token_ids[: wanted * block_size], blocks)


def insert(engine: Engine, prefix: SavedPrefix, cache_salt: str | None = None) -> None:
    """Put a prefix into the engine's prefix cache, between two steps.

    Raises:
        PoolTooSmallError: it does not fit into the blocks that are free.
    """
    kv_cache, pool = engine.runner.kv_cache, engine.scheduler.pool
    try:
        engine.scheduler.prefix_cache.insert(
            prefix.token_ids,
            cache_salt,
            lambda block_ids, indices: kv_cache.write_blocks(block_ids, prefix.blocks[indices]),
        )
    except NoFreeBlocksError:
        raise PoolTooSmallError(
            f"the saved prefix has {len(prefix.blocks)} blocks of {engine.config.block_size} tokens; "
            f"{pool.num_free} of the pool's {pool.num_blocks} are free. Raise num_blocks, or load it earlier."
        ) from None


def check_usable(engine: Engine) -> None:
    """Raise :class:`ConfigError` if this engine can neither save nor load prefixes."""
    if not engine.scheduler.pool.enable_prefix_caching:
        raise ConfigError(
            "prefixes are saved from the prefix cache and loaded into it; this engine has none "
            "(enable_prefix_caching is False, or policy is 'static')."
        )


# -- files ------------------------------------------------------------------------------------------


def write(path: Path, prefix: SavedPrefix, engine: Engine) -> None:
    """Write a prefix of ``engine``; the file appears at once and complete, or not at all.

    Raises :class:`ConfigError` where it cannot be written, or a file of another kind would be overwritten.
    """
    arrays = {"token_ids": np.array(prefix.token_ids, dtype=np.int32), "blocks": prefix.blocks}
    header = {"settings": settings(engine), "sha256": _digest(arrays)}
    packed_file.write(Path(path), header, arrays, kind=KIND)


def read(path: Path, engine: Engine) -> SavedPrefix:
    """Read and check a prefix for use in ``engine``.

    Raises :class:`SavedPrefixError` if there is no such file, it is damaged, or it holds for another model
    or other settings; the text says which.
    """
    path = Path(path)
    try:
        file = packed_file.PackedFile(path, KIND)
    except ModelError as error:
        raise SavedPrefixError(str(error)) from None
    except OSError as error:
        raise SavedPrefixError(f"{path} cannot be read: {error.strerror or error}.") from None
    saved = file.header.get("settings")
    if not isinstance(saved, dict):
        raise SavedPrefixError(f"{path}: its header does not say what it holds for.")
    here = settings(engine)
    differences = [
        f"{name} {str(saved.get(name))[:16]!r} (here {str(here.get(name))[:16]!r})"
        for name in sorted({*saved, *here})
        if saved.get(name) != here.get(name)
    ]
    if differences:
        raise SavedPrefixError(
            f"{path} was saved by another model or with other settings: {', '.join(differences)}. "
            "Load it with the same ones, or save it again."
        )
    if set(file.arrays) != {"token_ids", "blocks"} or file.header.get("sha256") != _digest(file.arrays):
        raise SavedPrefixError(f"{path} is damaged: the sha256 of what it holds is another. Save it again.")
    token_ids, blocks = file.arrays["token_ids"], file.arrays["blocks"]
    size, vocab_size = engine.config.block_size, engine.model.config.vocab_size
    expected = (len(token_ids) // size, engine.runner.kv_cache.block_bytes)
    if (
        (token_ids.dtype, token_ids.ndim, blocks.dtype, blocks.shape) != (np.int32, 1, np.uint8, expected)
        or not len(token_ids)
        or len(token_ids) % size
        or token_ids.min() < 0
        or token_ids.max() >= vocab_size
    ):
        raise SavedPrefixError(f"{path} does not hold token ids and whole blocks of this model.")
    return SavedPrefix(token_ids.tolist(), blocks)


def _digest(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8))
    return digest.hexdigest()


# -- what KV depends on -----------------------------------------------------------------------------


def settings(engine: Engine) -> dict[str, str | int]:
    """Everything that the numbers in a KV block depend on; the weights are read once for it."""
    model, formats = engine.model.config, engine.formats
    found = {
        "minipaged": __version__,
        "architecture": model.architecture,
        "weights": engine.runner.weights_digest,
        "device": engine.backend.name,
        "weight_format": formats.weights,
        "kv_cache": formats.kv_cache,
        "block_size": engine.config.block_size,
    }
    if engine.backend.name == "cpu":
        from minipaged.ops.cpu import features, kv

        found["kv_layout"] = kv.LAYOUT
        found["instructions"] = features.current().level
    if engine.backend.name == "cuda":
        found["card"] = engine.runner.decoder.device.name
    if any(layer.rope is not None and layer.rope.scaling in LENGTH_DEPENDENT_ROPE for layer in model.layers):
        found["max_model_len"] = engine.max_model_len
    return found
