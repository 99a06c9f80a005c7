"""Where compiled functions are kept, so that a second start compiles nothing.

Numba's own cache notices a change of the file that defines a function, not of the emitters the
function calls, and its key pickles closures that differ from process to process. Here the directory
holds a hash of all sources of this package, and the key is a name that the caller gives::

    $MINIPAGED_HOME/compiled/<hash of sources, versions, CPU, level>/product-int8.....nbc

A directory that cannot be written (or a full disk) costs the compile time of each start, never an
error: one line in the log says so. So does a package whose files change while a process uses it: what the
process compiles is of the files that it imported, and must not be found under the hash of others.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path

import llvmlite
import llvmlite.binding as llvm
import numba
from numba.core import caching
from numba.core.dispatcher import Dispatcher

from minipaged.home import home

from . import features

logger = logging.getLogger("minipaged")


def _sources() -> str:
    """sha256 over the sources of this package, as they are now."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(f"{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()


_imported_sources = _sources()


@cache
def sources_hash() -> str:
    """sha256 over the sources that were imported, the versions of Numba and LLVM, the CPU and the level."""
    digest = hashlib.sha256(_imported_sources.encode())
    cpu = numba.config.CPU_NAME or llvm.get_host_cpu_name()
    for part in (numba.__version__, llvmlite.__version__, cpu, features.current().level):
        digest.update(f"\0{part}".encode())
    return digest.hexdigest()


def cache_directory() -> Path:
    """The directory of this version of the kernels, on this CPU, at this level."""
    return home() / "compiled" / sources_hash()[:16]


class _Locator(caching._CacheLocator):
    """Tells Numba where to keep a function, and what makes a kept one stale."""

    _py_file = __file__  # only for Numba's warnings

    def get_cache_path(self) -> str:
        return str(cache_directory())

    def get_source_stamp(self) -> str:
        return sources_hash()

    def get_disambiguator(self) -> str:
        return ""

    @classmethod
    def from_function(cls, py_func: Callable, py_file: str) -> _Locator:
        locator = cls()
        locator.ensure_cache_path()
        return locator


class _NamedCacheImpl(caching.CompileResultCacheImpl):
    """Numba's serialisation, at our place, under our name."""

    def __init__(self, py_func: Callable, name: str):
        self._lineno = py_func.__code__.co_firstlineno
        self._locator = _Locator.from_function(py_func, __file__)
        self._filename_base = self.get_filename_base(name, "")


class _NamedCache(caching.FunctionCache):
    """A cache whose key is a name: closures are fully described by it and by the sources' hash."""

    def __init__(self, py_func: Callable, name: str):
        self._impl_class = lambda function: _NamedCacheImpl(function, name)
        super().__init__(py_func)

    def _index_key(self, signature, codegen):
        return signature, codegen.magic_tuple()

    def load_overload(self, signature, target_context):
        try:
            return super().load_overload(signature, target_context)
        except Exception as error:  # whatever unpickling a truncated file may raise
            logger.warning("A compiled kernel in %s is damaged (%r); it is made anew.", self.cache_path, error)
            self._forget()
            return None

    def _forget(self):
        try:
            self.flush()
        except OSError as error:
            _report_no_space(error)

    def save_overload(self, signature, data):
        try:
            super().save_overload(signature, data)
        except OSError as error:
            _report_no_space(error)


@cache
def _report(problem: str) -> None:
    logger.warning("The cache of compiled kernels %s %s.", cache_directory(), problem)


def _report_no_space(error: OSError) -> None:
    _report(
        f"cannot be written ({error}); they are compiled anew at each start. "
        "Set MINIPAGED_HOME to a writable directory with space to avoid this"
    )


def keep(function: Dispatcher | numba.core.ccallback.CFunc, name: str) -> None:
    """Make Numba load ``function`` from the cache, or save it there once compiled.

    ``function`` is what ``numba.njit`` returned (before its first compilation), or an uncompiled
    ``CFunc``. ``name`` must say everything that its closure makes different from other functions.
    """
    if _sources() != _imported_sources:
        _report("is not used: the package was changed after this process had imported it; start it again")
        return
    try:
        function._cache = _NamedCache(function.py_func if isinstance(function, Dispatcher) else function._pyfunc, name)
    except OSError as error:
        _report_no_space(error)


def c_function(signature: str, name: str) -> Callable[[Callable], int]:
    """Decorator: compile to a C function now (or load it from the cache) and return its ``CFunc``.

    ``signature`` is Numba's, for instance ``"void(int64, int64)"``. The result has ``.address``, and
    ``.ctypes`` to call it from Python without the GIL.
    """
    from numba.core.ccallback import CFunc
    from numba.core.sigutils import normalize_signature

    def decorate(py_func: Callable) -> CFunc:
        # Numba names symbols after the function. Two closures of one name, compiled in different
        # processes, can get the same symbol; with both loaded here, one would be called for the other.
        py_func.__name__ = py_func.__qualname__ = name.replace("-", "_")
        function = CFunc(py_func, normalize_signature(signature), locals={}, options={"error_model": "numpy"})
        keep(function, name)
        function.compile()
        return function

    return decorate
