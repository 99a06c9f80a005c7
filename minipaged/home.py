"""Where minipaged keeps what it makes or fetches: models, compiled kernels, packed weights."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from minipaged.errors import ConfigError


def home() -> Path:
    """``MINIPAGED_HOME``, or ``minipaged`` in the cache folder of the user's platform.

    Raises:
        ConfigError: neither ``MINIPAGED_HOME`` is set nor has this user a home directory.
    """
    chosen = os.environ.get("MINIPAGED_HOME")
    if chosen:
        return Path(chosen).expanduser().absolute()
    try:
        user = Path.home()
    except RuntimeError:
        raise ConfigError("this user has no home directory; set MINIPAGED_HOME to a writable directory.") from None
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or user / "AppData" / "Local") / "minipaged"
    if sys.platform == "darwin":
        return user / "Library" / "Caches" / "minipaged"
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (cache if cache.is_absolute() else user / ".cache") / "minipaged"  # relative values are ignored (XDG)
