"""From a kernel to PTX, to machine code and to SASS, with no driver and no GPU."""

from __future__ import annotations

import contextlib
import functools
import re
import subprocess
import types
import warnings
from dataclasses import dataclass

from cuda_kernels.kernel import Kernel
from cuda_kernels.toolchain import ptx_cache

Capability = tuple[int, int]


class CompileError(Exception):
    """A kernel could not be compiled, linked or disassembled; the text says where and why."""


@contextlib.contextmanager
def _pretend_device(cc: Capability):
    """Lets numba-cuda compile device functions, which ask for the current device even when ``cc`` is given."""
    import numba.cuda.api
    import numba.cuda.compiler
    import numba.cuda.dispatcher

    device = types.SimpleNamespace(compute_capability=cc, id=0, name=b"offline")
    modules = (numba.cuda.api, numba.cuda.compiler, numba.cuda.dispatcher)
    originals = [module.get_current_device for module in modules]
    for module in modules:
        module.get_current_device = lambda: device
    try:
        yield
    finally:
        for module, original in zip(modules, originals, strict=True):
            module.get_current_device = original


_compiled: dict[tuple[int, Capability], tuple[Kernel, str]] = {}


def compile_ptx(kernel: Kernel, cc: Capability) -> str:
    """PTX of ``kernel`` for compute capability ``cc``, its entry named ``kernel.entry``.

    Compiled once and kept on disk (``ptx_cache.py``). Raises :class:`CompileError` when the card's generation is too
    old for the kernel or Numba refuses it.
    """
    cc = tuple(cc)
    if cc < kernel.min_cc:
        needed, given = (f"sm_{major}{minor}" for major, minor in (kernel.min_cc, cc))
        raise CompileError(f"{kernel.entry} needs {needed} or newer, not {given}")
    key = (id(kernel), cc)
    if key not in _compiled:
        file_key = ptx_cache.key_of(kernel, cc)
        ptx = ptx_cache.read(file_key) if file_key else None
        if ptx is None:
            ptx = _compile(kernel, cc)
            if file_key:
                ptx_cache.write(file_key, ptx)
        _compiled[key] = (kernel, ptx)  # the kernel is kept alive, so its id stays its own
    return _compiled[key][1]


def _compile(kernel: Kernel, cc: Capability) -> str:
    from numba import cuda

    with _pretend_device(cc), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ptx, _ = cuda.compile_ptx(
                kernel.body, kernel.signature, cc=cc, fastmath=False, launch_bounds=kernel.block
            )
        except Exception as error:
            raise CompileError(f"{kernel.entry} for sm_{cc[0]}{cc[1]}: {error}") from error
    mangled = re.search(r"\.entry\s+([\w$]+)", ptx).group(1)
    ptx = ptx.replace(mangled, kernel.entry)
    # Numba's environment symbols serve its own error handling on the host; the kernels do not use them.
    ptx = re.sub(r"^\.common \.global .*NumbaEnv.*\n", "", ptx, flags=re.M)
    return re.sub(r"^\s*// \.globl.*\n", "", ptx, flags=re.M)


@dataclass(frozen=True)
class Assembled:
    """Machine code of one kernel and what the assembler said about it (bytes and registers per thread)."""

    cubin: bytes
    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    shared_bytes: int


def assemble(ptx: str, cc: Capability) -> Assembled:
    """Machine code for compute capability ``cc`` from ``ptx``, by nvJitLink (which needs no driver)."""
    from cuda.bindings import nvjitlink

    architecture = f"sm_{cc[0]}{cc[1]}"
    source = ptx.encode()
    handle = nvjitlink.create(2, [f"-arch={architecture}", "-verbose"])
    try:
        try:
            nvjitlink.add_data(handle, nvjitlink.InputType.PTX, source, len(source), "kernel")
            nvjitlink.complete(handle)
        except nvjitlink.nvJitLinkError as error:
            log = bytearray(nvjitlink.get_error_log_size(handle))
            nvjitlink.get_error_log(handle, log)
            text = log.decode(errors="replace").strip("\0 \n")
            raise CompileError(f"nvJitLink for {architecture}: {error}\n{text}") from error
        cubin = bytearray(nvjitlink.get_linked_cubin_size(handle))
        nvjitlink.get_linked_cubin(handle, cubin)
        log = bytearray(nvjitlink.get_info_log_size(handle))
        nvjitlink.get_info_log(handle, log)
    finally:
        nvjitlink.destroy(handle)
    return _read_log(bytes(cubin), log.decode(errors="replace"))


def _read_log(cubin: bytes, log: str) -> Assembled:
    def number(pattern: str) -> int:
        found = re.search(pattern, log)
        return int(found.group(1)) if found else 0

    if "Used" not in log:
        raise CompileError(f"the assembler's report is not as expected: {log!r}")
    return Assembled(
        cubin,
        registers=number(r"Used (\d+) registers"),
        stack_bytes=number(r"(\d+) bytes stack frame"),
        spill_store_bytes=number(r"(\d+) bytes spill stores"),
        spill_load_bytes=number(r"(\d+) bytes spill loads"),
        shared_bytes=number(r"(\d+) bytes smem"),
    )


@functools.cache
def _disassembler() -> str:
    """Path of nvdisasm: from the wheel ``nvidia-cuda-nvdisasm``, else from PATH."""
    import shutil
    from importlib.metadata import PackageNotFoundError, files

    with contextlib.suppress(PackageNotFoundError):
        for path in files("nvidia-cuda-nvdisasm") or []:
            if path.name in ("nvdisasm", "nvdisasm.exe"):
                return str(path.locate())
    found = shutil.which("nvdisasm")
    if found is None:
        raise CompileError("nvdisasm is not installed; `pip install nvidia-cuda-nvdisasm` has it")
    return found


def sass(cubin: bytes) -> str:
    """The machine code as text, one instruction a line."""
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([_disassembler(), "-c", file.name], capture_output=True, text=True)
    if done.returncode:
        raise CompileError(f"nvdisasm: {done.stderr.strip()}")
    return done.stdout
