"""Build libminipaged: the C files of ``src/``, and the modules of ``bindings/``, which cffi puts into a C file.

``pip install`` calls :func:`build` (see ``setup.py``); by hand, say for a sanitizer:

    python capi/build_capi.py --into /tmp/clib --cflags="-fsanitize=address -fno-omit-frame-pointer"
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

CAPI = Path(__file__).resolve().parent
HEADERS = ("minipaged.h", "minipaged.hpp")
MODULES = ("options", "sink", "host", "externs")  # of bindings/, each importing only those before it
FLAGS = ("-std=gnu11", "-O2", "-g", "-fPIC", "-fvisibility=hidden", "-pthread", "-Wall", "-Wextra")
# cffi's own code: unused helpers, and one prototype that it declares without using it.
GENERATED_FLAGS = ("-std=gnu11", "-O2", "-g", "-fPIC", "-fvisibility=hidden", "-pthread", "-w")


class CannotBuild(Exception):
    """Why the library cannot be built here, and what would help."""


def header_text() -> str:
    return (CAPI / "include" / "minipaged.h").read_text(encoding="utf-8")


def api_version() -> tuple[int, int, int]:
    """MAJOR, MINOR and PATCH of the interface, from the header."""
    return tuple(int(re.search(rf"#define MINIPAGED_API_{part} (\d+)", header_text())[1]) for part in _PARTS)


_PARTS = ("MAJOR", "MINOR", "PATCH")


def soname() -> str:
    return f"libminipaged.so.{api_version()[0]}"


def declarations(header: str) -> str:
    """A header without what only the preprocessor reads, for ``ffi.cdef``."""
    text = re.sub(r"^[ \t]*#(?:.*\\\n)*.*$", "", header, flags=re.MULTILINE)
    return re.sub(r'^extern "C" \{$|^\}$', "", text, flags=re.MULTILINE)


def generate(target: Path) -> None:
    """Write the C file that connects to Python, with the modules of ``bindings/`` inside."""
    try:
        import cffi
    except ImportError:
        raise CannotBuild("cffi is missing; install it (pip install cffi) and then minipaged again") from None
    text = declarations(header_text())
    structs = re.findall(
        r"^typedef struct minipaged_(?:model_info|stats) \{.*?^\} \w+;$", text, re.MULTILINE | re.DOTALL
    )
    ffi = cffi.FFI()
    ffi.cdef("\n".join(structs) + (CAPI / "src" / "bridge.h").read_text(encoding="utf-8"))
    ffi.embedding_api((CAPI / "src" / "externs.h").read_text(encoding="utf-8"))
    ffi.set_source(
        "_minipaged_capi",
        '#include "internal.h"\n'
        "static int cffi_start_python(void);\n"
        "int mpx_cffi_start(void) { return cffi_start_python(); }\n",
    )
    folder = CAPI / "bindings"
    sources = {name: (folder / f"{name}.py").read_text(encoding="utf-8") for name in MODULES}
    ffi.embedding_init_code(f"SOURCES = {sources!r}\n" + (folder / "embed.py").read_text(encoding="utf-8"))
    ffi.emit_c_code(str(target))


def package_version() -> str:
    text = (CAPI.parent / "minipaged" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)[1]


def compiler() -> list[str]:
    """``CC``, or the compiler that Python was built with, or ``cc``."""
    candidates = [os.environ.get("CC"), sysconfig.get_config_var("CC"), "cc", "gcc", "clang"]
    for candidate in filter(None, candidates):
        command = shlex.split(candidate)
        if command and shutil.which(command[0]):
            return command
    raise CannotBuild("there is no C compiler; install one (Debian: apt install gcc) and then minipaged again")


def python_flags() -> tuple[list[str], list[str]]:
    """What compiling against this Python takes, and linking with its shared library."""
    include = sysconfig.get_path("include")
    version = sysconfig.get_config_var("LDVERSION") or "{}.{}".format(*sys.version_info)
    if not (Path(include) / "Python.h").is_file():
        raise CannotBuild(
            f"Python's headers are missing ({include}/Python.h); install them (Debian: apt install "
            f"python{version}-dev) and then minipaged again"
        )
    names = [sysconfig.get_config_var("LIBDIR") or "", sysconfig.get_config_var("LIBPL") or ""]
    multiarch = sysconfig.get_config_var("MULTIARCH")
    folders = [Path(name) for name in names if name]
    folders += [folder / multiarch for folder in folders[:1] if multiarch]
    for folder in folders:
        if (folder / f"libpython{version}.so").exists():
            return [f"-I{include}"], [f"-L{folder}", f"-Wl,-rpath,{folder}", f"-lpython{version}"]
    raise CannotBuild(
        f"this Python has no shared library (libpython{version}.so in {' or '.join(map(str, folders))}); "
        "use a Python that was built with --enable-shared (pyenv: PYTHON_CONFIGURE_OPTS=--enable-shared)"
    )


def check_system() -> None:
    if sys.platform != "linux":
        raise CannotBuild(f"the C library is built on Linux only; this is {sys.platform}")
    if sys.implementation.name != "cpython":
        raise CannotBuild(f"the C library needs CPython; this is {sys.implementation.name}")


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = "\n".join((done.stderr or done.stdout).strip().splitlines()[-20:])
        raise CannotBuild(f"the compiler failed: {shlex.join(command)}\n{last}")
    if done.stderr:
        print(done.stderr, file=sys.stderr)


def exports() -> list[str]:
    """The functions that the header declares, which are all that the library exports."""
    text = re.sub(r"/\*.*?\*/", "", header_text(), flags=re.DOTALL)
    return sorted(re.findall(r"^(?!typedef|#)\S.*?\b(minipaged_\w+)\(", text, re.MULTILINE))


def compile_library(library: Path, cflags: list[str]) -> None:
    """Compile and link the shared library."""
    check_system()
    cc = compiler()
    includes, links = python_flags()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        generated = work / "python_side.c"
        generate(generated)
        symbols = work / "exports.map"
        symbols.write_text("MINIPAGED_1 {\n global:\n" + "".join(f"  {f};\n" for f in exports()) + " local: *;\n};\n")
        common = [
            *includes,
            f"-I{CAPI / 'include'}",
            f"-I{CAPI / 'src'}",
            f'-DMINIPAGED_PACKAGE_VERSION="{package_version()}"',
            f'-DMINIPAGED_PYTHON_EXECUTABLE="{sys.executable}"',
        ]
        objects = []
        for source in [*sorted((CAPI / "src").glob("*.c")), generated]:
            target = work / (source.stem + ".o")
            # What cffi generates is the interpreter's world, which a sanitizer does not see through.
            flags = GENERATED_FLAGS if source is generated else [*FLAGS, *cflags]
            run([*cc, *flags, *common, "-c", str(source), "-o", str(target)])
            objects.append(str(target))
        library.parent.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_name(f"{library.name}.{os.getpid()}")
        # nodelete: the interpreter outlives any dlclose. A sanitizer's own symbols are found at run time.
        defined = [] if any("-fsanitize" in flag for flag in cflags) else ["-Wl,-z,defs"]
        run(
            [*cc, "-shared", "-pthread", f"-Wl,-soname,{soname()}", f"-Wl,--version-script={symbols}"]
            + ["-Wl,-z,nodelete", *defined, *objects, *links, "-ldl", "-lm", *cflags, "-o", str(unfinished)]
        )
        unfinished.replace(library)  # a program that runs keeps the file it has


def copy_rest(into: Path) -> None:
    """Headers, and what pkg-config and CMake read; no file names an absolute path."""
    version = ".".join(map(str, api_version()))
    for name in HEADERS:
        (into / "include").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(CAPI / "include" / name, into / "include" / name)
    folders = {"minipaged.pc": "pkgconfig", "minipaged-config.cmake": "cmake/minipaged"}
    folders["minipaged-config-version.cmake"] = folders["minipaged-config.cmake"]
    for name, folder in folders.items():
        target = into / "lib" / folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        text = (CAPI / "cmake" / f"{name}.in").read_text(encoding="utf-8")
        text = (
            text.replace("@VERSION@", version).replace("@MAJOR@", version.split(".")[0]).replace("@SONAME@", soname())
        )
        target.write_text(text, encoding="utf-8")


def build(into: Path, cflags: list[str] = ()) -> Path:
    """Build everything a C programmer needs into the folder ``into``; the library's path.

    Raises :class:`CannotBuild`; then ``into/not_built.txt`` says why, for ``minipaged config``.
    """
    into = into.resolve()
    library = into / "lib" / soname()
    reason = into / "not_built.txt"
    try:
        compile_library(library, list(cflags))
    except CannotBuild as error:
        shutil.rmtree(into, ignore_errors=True)
        into.mkdir(parents=True)
        reason.write_text(f"{error}\n", encoding="utf-8")
        raise
    copy_rest(into)
    reason.unlink(missing_ok=True)
    return library


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", type=Path, default=CAPI.parent / "minipaged" / "clib", help="where to build")
    parser.add_argument("--cflags", default="", help="more flags for compiler and linker")
    arguments = parser.parse_args()
    try:
        print(build(arguments.into, shlex.split(arguments.cflags)))
    except CannotBuild as error:
        sys.exit(f"libminipaged cannot be built: {error}")
