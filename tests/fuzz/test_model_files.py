"""Mutated model files load or are refused with a typed error; never a crash, a hang, or much memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.model_file_fuzzer import KINDS

ROOT = Path(__file__).parents[2]
# One thread and one heap, so that the address space shows what loading takes; a backtrace of Rust takes more.
ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MALLOC_ARENA_MAX": "1",
    "RUST_BACKTRACE": "0",
}

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory as Linux counts it")


def fuzz(kind: str, first: int, count: int, directory: Path) -> dict:
    """How often each outcome was met."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.support.model_file_fuzzer", kind, str(first), str(count), str(directory)],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, f"{kind}: exit status {run.returncode}\n" + run.stderr[-4000:]
    results = json.loads(run.stdout)
    print(kind, results)
    assert sum(results.values()) == count
    return results


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_files(tmp_path, kind):
    results = fuzz(kind, 0, 400, tmp_path)
    assert results["loaded"] > 20  # or the mutants are too broken to reach the later checks
    assert results["TokenizerError" if kind == "tokenizer" else "ModelFormatError"] > 40


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_mutated_files(tmp_path, kind):
    fuzz(kind, 10_000, 2_000, tmp_path)
