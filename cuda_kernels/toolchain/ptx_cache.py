"""PTX kept on disk, since Numba takes seconds for a kernel.

The key is everything that the PTX depends on: the byte code of the kernel and of all that it calls, the constants
they close over, the argument types, the card's generation and the compiler's version. Files lie in the folder
that ``CUDA_KERNELS_CACHE`` names, else in the user's cache folder; an empty ``CUDA_KERNELS_CACHE`` turns it off.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import tempfile
import types
from functools import cache
from importlib.metadata import version
from pathlib import Path

from cuda_kernels import intrinsics
from cuda_kernels.kernel import Kernel

VARIABLE = "CUDA_KERNELS_CACHE"


class NoKey(Exception):
    """Something that a kernel refers to has no stable description."""


def folder() -> Path | None:
    """Where PTX is kept; None when it is not."""
    named = os.environ.get(VARIABLE)
    if named is not None:
        return Path(named) if named else None
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(root) / "minipaged" / "ptx"


def read(key: str) -> str | None:
    where = folder()
    with contextlib.suppress(OSError):
        return where and (where / f"{key}.ptx").read_text()
    return None


def write(key: str, ptx: str) -> None:
    """Keeps ``ptx``, whole or not at all; a folder that cannot be written is no error."""
    where = folder()
    if where is None:
        return
    with contextlib.suppress(OSError):
        where.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=where, delete=False) as file:
            file.write(ptx)
        os.replace(file.name, where / f"{key}.ptx")


def key_of(kernel: Kernel, cc: tuple[int, int]) -> str | None:
    """A name for the PTX of ``kernel`` on ``cc``; None if it refers to something that cannot be described."""
    digest = hashlib.sha256()
    compiler = (sys.version_info[:2], _compiler(), _file_digest(intrinsics.__file__))
    head = (kernel.entry, kernel.signature, kernel.block, cc, compiler)
    digest.update(repr(head).encode())
    try:
        _add_function(digest, kernel.body, set())
    except NoKey:
        return None
    return f"{kernel.name}-sm_{cc[0]}{cc[1]}-{digest.hexdigest()[:32]}"


@cache
def _compiler() -> tuple:
    return tuple(version(package) for package in ("numba-cuda", "numba", "nvidia-nvvm"))


@cache
def _intrinsic_names() -> dict[int, str]:
    """By identity: several intrinsics share one definition's code."""
    return {id(value): name for name, value in vars(intrinsics).items() if type(value).__name__ == "_Intrinsic"}


@cache
def _file_digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _add_function(digest, function: types.FunctionType, seen: set) -> None:
    if function in seen:
        return
    seen.add(function)
    _add_code(digest, function.__code__)
    names = set(_names(function.__code__))
    for name in sorted(names & function.__globals__.keys()):
        digest.update(name.encode())
        _add_value(digest, function.__globals__[name], seen)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        digest.update(name.encode())
        _add_value(digest, cell.cell_contents, seen)


def _names(code: types.CodeType):
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _add_code(digest, code: types.CodeType) -> None:
    digest.update(code.co_code)
    digest.update(repr((code.co_names, code.co_varnames, code.co_freevars)).encode())
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            _add_code(digest, constant)
        else:
            digest.update(repr(constant).encode())


def _add_value(digest, value, seen: set) -> None:
    from numba.core.types import Type

    function = getattr(value, "py_func", value)
    if isinstance(function, types.FunctionType):
        _add_function(digest, function, seen)
    elif isinstance(value, types.ModuleType):
        digest.update(value.__name__.encode())
        if value.__name__.startswith("cuda_kernels"):
            digest.update(_file_digest(value.__file__).encode())
    elif id(value) in _intrinsic_names():
        digest.update(_intrinsic_names()[id(value)].encode())
    elif isinstance(value, (bool, int, float, str, bytes, type(None), Type)):
        digest.update(repr(value).encode())
    elif isinstance(value, (tuple, list)):
        for item in value:
            _add_value(digest, item, seen)
    elif isinstance(value, type) or callable(value) and hasattr(value, "__qualname__"):
        digest.update(f"{value.__module__}.{value.__qualname__}".encode())
    else:
        raise NoKey(repr(value))
