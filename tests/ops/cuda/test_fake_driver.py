"""The path to a card, walked without one: ``pytest -m gpu`` on a fake driver that interprets what it launches."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import cuda_devices  # noqa: F401  (skips where the packages are missing)

ROOT = Path(__file__).parents[3]
FOLDER = Path(__file__).parent

pytestmark = [
    pytest.mark.skipif(shutil.which("cc") is None, reason="the fake driver needs a C compiler"),
    pytest.mark.skipif(sys.platform != "linux", reason="the fake driver stands in for libcuda.so.1"),
]


def run_with_fake_driver(*arguments) -> int:
    """pytest in a process whose driver is the fake one; returns the number of tests that passed."""
    command = [sys.executable, "-m", "pytest", "-p", "tests.support.fake_card", "-rs", *map(str, arguments)]
    environment = {k: v for k, v in os.environ.items() if k != "MINIPAGED_CUDA"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout, done.stdout[-2000:]
    return int(re.search(r"(\d+) passed", done.stdout).group(1))


def test_the_driver_is_called_as_it_must_be():
    assert run_with_fake_driver(FOLDER / "driver_cases.py") >= 10


def test_the_tests_for_a_card_pass_on_it():
    assert run_with_fake_driver("-m", "gpu", FOLDER / "test_cuda_device.py") >= 6


def test_the_tests_of_kernels_run_on_it():
    kernels = ROOT / "tests" / "cuda_kernels"
    assert run_with_fake_driver("-m", "gpu", kernels / "test_argmax_kernel.py") >= 3


@pytest.mark.slow
def test_sampling_and_all_that_continues_a_prompt_run_on_it():
    files = FOLDER / "test_device_sampling.py", FOLDER / "test_cuda_kv.py", ROOT / "tests/engine/test_cuda_sampling.py"
    assert run_with_fake_driver("-m", "gpu", *files) >= 20
