"""A pytest plugin (``-p tests.support.fake_card``): the card of this process is the fake driver's.

With it, ``pytest -m gpu`` runs where there is no card, on the host code that a card would see.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.support import fake_driver

FOLDER = tempfile.TemporaryDirectory(prefix="fake-cuda-")
fake_driver.install(Path(FOLDER.name), interpret=True)
