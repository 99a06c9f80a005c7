"""Compiles what a model needs before it is needed, and says so, since it takes a while the first time."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable

from .attention import attention_phase
from .compile_cache import cache_directory
from .draws import passes_function
from .kv import ITEM_BYTES
from .kv_writes import write_phase
from .masks import few_function, likeliest_allowed_function, mask_function
from .moe import experts_phase
from .products import FORMATS, product_kernel
from .step import step_function

logger = logging.getLogger("minipaged")

WEIGHT_FORMATS, KV_FORMATS = FORMATS, tuple(ITEM_BYTES)


def warm_up(
    weight_formats: Iterable[str],
    kv_formats: Iterable[str],
    experts: bool,
    report: Callable[[str], None] | None = None,
) -> None:
    """Compile the functions for these formats (and for mixtures of experts), or load them from the cache.

    ``report`` gets a line before each function that has to be compiled, and an empty one at the end;
    ``None`` shows it on standard error, if that is a terminal.
    """
    functions: dict[str, Callable[[], object]] = {"step": step_function}
    functions |= {"mask-row": mask_function, "few-allowed": few_function}
    functions |= {"likeliest-allowed": likeliest_allowed_function}
    functions |= {"draw-passes": passes_function}
    functions |= {f"product-{format}": lambda format=format: product_kernel(format) for format in weight_formats}
    for dtype in kv_formats:
        functions[f"write-{dtype}"] = lambda dtype=dtype: write_phase(dtype)
        functions[f"attention-{dtype}"] = lambda dtype=dtype: attention_phase(dtype)
    if experts:
        functions["experts"] = experts_phase
    report = _show_on_terminal if report is None else report
    missing = [name for name in functions if not _is_kept(name)]
    started = time.perf_counter()
    for name, compile_function in functions.items():
        if name in missing:
            report(f"compiling for this CPU, once: {name} ({missing.index(name) + 1} of {len(missing)})")
        compile_function()
    if missing:
        report("")
        logger.info("compiled %s in %.1f s", ", ".join(missing), time.perf_counter() - started)


def _is_kept(name: str) -> bool:
    try:
        return any(cache_directory().glob(f"{name}-*.nbi"))
    except OSError:
        return False


def _show_on_terminal(line: str) -> None:
    """Overwrite one line of the terminal; nothing where standard error is none."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
