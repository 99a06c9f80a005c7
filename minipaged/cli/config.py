"""Print what a compiler needs to use libminipaged, the C library of minipaged."""

from __future__ import annotations

import argparse
from pathlib import Path

import minipaged
from minipaged.cli.terminal import write
from minipaged.errors import BackendUnavailableError

SUMMARY = "flags and paths for C programs that link libminipaged"
EPILOG = """\
Several options print one line together, in the order of this list.

examples:
  cc hello.c $(minipaged config --cflags --libs) -o hello
  PKG_CONFIG_PATH=$(minipaged config --pc) pkg-config --cflags --libs minipaged
  cmake -Dminipaged_DIR=$(minipaged config --cmake) ..
  less $(minipaged config --header)     (the manual)
"""
OPTIONS = {
    "cflags": "flags for the compiler",
    "libs": "flags for the linker, the run path included",
    "header": "path of minipaged.h, the manual of the C library",
    "library": "path of the shared library, for dlopen and other languages",
    "pc": "folder of minipaged.pc, for PKG_CONFIG_PATH",
    "cmake": "folder of minipaged-config.cmake, for minipaged_DIR",
}


def configure(parser: argparse.ArgumentParser) -> None:
    for name, text in OPTIONS.items():
        parser.add_argument(f"--{name}", dest="wanted", action="append_const", const=name, help=text)


def run(args: argparse.Namespace) -> None:
    values = paths()
    wanted = args.wanted or []
    if wanted:
        write(" ".join(values[name] for name in OPTIONS if name in wanted) + "\n")
    else:
        write("".join(f"{name:8} {value}\n" for name, value in values.items()))


def folder() -> Path:
    """Where the build of the package puts the C library."""
    return Path(minipaged.__file__).resolve().parent / "clib"


def paths() -> dict[str, str]:
    """The value of each option.

    Raises :class:`BackendUnavailableError` where the library was not built, with the reason.
    """
    root = folder()
    library = next(iter(sorted((root / "lib").glob("libminipaged.so.*[0-9]"))), None)
    if library is None:
        raise BackendUnavailableError(f"libminipaged is not here: {_reason(root)}.")
    return {
        "cflags": f"-I{root / 'include'}",
        "libs": f"-L{library.parent} -Wl,-rpath,{library.parent} -l:{library.name}",
        "header": str(root / "include" / "minipaged.h"),
        "library": str(library),
        "pc": str(library.parent / "pkgconfig"),
        "cmake": str(library.parent / "cmake" / "minipaged"),
    }


def _reason(root: Path) -> str:
    try:
        return (root / "not_built.txt").read_text(encoding="utf-8").strip()
    except OSError:
        return (
            "this minipaged was not installed by pip, which builds it; "
            "run 'pip install .' in its source, or 'python capi/build_capi.py' there"
        )
