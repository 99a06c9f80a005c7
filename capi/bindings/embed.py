"""What runs first when Python has started: makes modules of the sources compiled into the library.

``SOURCES``, put in front by ``build_capi.py``, holds their names and texts in the order of their imports.
"""

import linecache
import sys
import types


def load(name: str, source: str) -> None:
    """Run a module's source; its lines are shown in tracebacks."""
    module = types.ModuleType(f"minipaged_capi.{name}")
    module.__file__ = f"<libminipaged>/{name}.py"
    linecache.cache[module.__file__] = (len(source), None, source.splitlines(keepends=True), module.__file__)
    sys.modules[module.__name__] = module
    exec(compile(source, module.__file__, "exec"), module.__dict__)


def load_all() -> None:
    from _minipaged_capi import lib

    package = types.ModuleType("minipaged_capi")
    package.__path__ = []
    sys.modules["minipaged_capi"] = package
    try:
        for name, source in SOURCES.items():  # noqa: F821
            load(name, source)
    except BaseException as error:
        status = -12 if isinstance(error, ImportError) else getattr(error, "status", -1)
        text = f"{type(error).__name__}: {error}".encode("utf-8", "replace")
        lib.mpx_start_error(status, text, len(text))


load_all()
