"""Compiled functions are found again, and a cache that cannot be used costs time, not an error."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import minipaged

PROGRAM = """
import logging, sys, time
logging.basicConfig(format="%(message)s")
from minipaged.ops.cpu.compile_cache import c_function

def make(name, factor):
    @c_function("int64(int64)", name)
    def scaled(value):
        return value * factor
    return scaled

a, b = make("scaled-2", 2), make("scaled-3", 3)
print(a.ctypes(7), b.ctypes(7), a.cache_hits + b.cache_hits)
"""


def run(home, program=PROGRAM, cwd=None, **environment):
    environment = {**os.environ, "MINIPAGED_HOME": str(home), **environment}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result


def test_a_second_start_compiles_nothing_and_closures_stay_apart(tmp_path):
    assert run(tmp_path).stdout == "14 21 0\n"
    assert run(tmp_path).stdout == "14 21 2\n"


def test_what_was_imported_is_not_kept_for_sources_that_came_later(tmp_path):
    """An upgrade under a running process: its kernels are those of the files that it began with."""
    package = tmp_path / "package"
    no_bytecode = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(minipaged.__file__).parent, package / "minipaged", ignore=no_bytecode)
    upgrade = """
import minipaged.ops.cpu.compile_cache, pathlib
path = pathlib.Path(minipaged.ops.cpu.__file__)
assert path.is_relative_to(pathlib.Path.cwd()), "not the copy"
path.write_text(path.read_text() + "# another version")
"""
    home, place = tmp_path / "home", {"PYTHONPATH": str(package)}
    result = run(home, upgrade + PROGRAM, package, **place)
    assert result.stdout == "14 21 0\n" and result.stderr.count("start it again") == 1, result.stderr
    assert not (home / "compiled").exists()
    assert run(home, PROGRAM, package, **place).stdout == "14 21 0\n", "nothing was kept"
    assert run(home, PROGRAM, package, **place).stdout == "14 21 2\n"


def test_another_level_has_a_place_of_its_own(tmp_path):
    from minipaged.ops.cpu import features

    if features.current().level == "generic":
        pytest.skip("there is only one level here")
    run(tmp_path)
    assert run(tmp_path, MINIPAGED_CPU_LEVEL="generic").stdout == "14 21 0\n"
    assert len(list((tmp_path / "compiled").iterdir())) == 2


def test_a_place_that_cannot_be_written_is_reported_once(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    result = run(blocked)
    assert result.stdout == "14 21 0\n"
    assert len(re.findall("cannot be written", result.stderr)) == 1, result.stderr
    assert "Set MINIPAGED_HOME" in result.stderr


def test_a_full_disk_is_reported_once(tmp_path):
    full = """
import errno, os
from numba.core import caching
def save(self, key, data):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
caching.IndexDataCacheFile.save = save
"""
    result = run(tmp_path, full + PROGRAM)
    assert result.stdout == "14 21 0\n"
    assert len(re.findall("No space left", result.stderr)) == 1, result.stderr


def test_a_damaged_file_is_compiled_anew(tmp_path):
    run(tmp_path)
    for path in tmp_path.rglob("*.nb?"):
        path.write_bytes(path.read_bytes()[:10])
    assert run(tmp_path).stdout == "14 21 0\n"
