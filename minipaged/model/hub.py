"""Models of the Hugging Face hub, ``hf:org/name`` or ``hf:org/name@revision``.

Needs the package ``huggingface_hub`` (the extra ``[hub]``), whose cache, login and mirrors are used:
what transformers has downloaded already is found.
"""

from __future__ import annotations

import re
from pathlib import Path

from minipaged.errors import DownloadError, ModelNotFoundError

HUB_NAME = re.compile(r"hf:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")

# What a model is loaded from; repositories often hold the same weights in other formats as well.
NEEDED_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
]


def snapshot(name: str, pull: bool = True) -> Path:
    """The local directory with the files of a repository; only the cache is asked with ``pull=False``.

    Raises :class:`DownloadError` if they cannot be had, or ``huggingface_hub`` is not installed.
    """
    match = HUB_NAME.fullmatch(name)
    if match is None:
        raise ModelNotFoundError(f"{name!r} is not of the form hf:org/name or hf:org/name@revision.")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise DownloadError(
            f"{name!r} needs the package huggingface_hub: pip install 'minipaged[hub]'. "
            "Without it, use a name from `minipaged models`, e.g. --model tiny."
        ) from None
    repository, revision = match.groups()
    try:
        path = snapshot_download(
            repository, revision=revision, allow_patterns=NEEDED_FILES, local_files_only=not pull
        )
    except Exception as error:  # network, authorisation, disk: the library has a dozen kinds
        lines = str(error).strip().splitlines() or ["no details"]
        raise DownloadError(
            f"{name!r} could not be pulled from the hub: {type(error).__name__}: {lines[0].rstrip('.')}. "
            "Check the name and the network; gated models need `hf auth login`. "
            "The model inside the package needs neither: --model tiny."
        ) from None
    if not (Path(path) / "config.json").is_file():
        raise ModelNotFoundError(f"{name!r} has no config.json; it is no model in the layout of transformers.")
    return Path(path)
