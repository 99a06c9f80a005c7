"""Compile the cpu backend's kernels now, so that no later start has to."""

from __future__ import annotations

import argparse

from minipaged.cli.terminal import note, write
from minipaged.errors import BackendUnavailableError

SUMMARY = "compile the cpu backend's kernels"
EPILOG = """\
Compiled code goes to $MINIPAGED_HOME/compiled, or to the cache folder of your user: one folder for each
version of minipaged, kind of CPU and instruction level. It is made anew when one of them changes.

examples:
  minipaged warmup
  minipaged warmup --weights int8 --kv-cache-dtype bfloat16
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights",
        action="append",
        choices=("float32", "bfloat16", "int8", "int4"),
        help="a weight format, repeatable (default: all)",
    )
    parser.add_argument(
        "--kv-cache-dtype",
        action="append",
        choices=("float32", "bfloat16", "int8"),
        help="a format of the KV cache, repeatable (default: all)",
    )


def run(args: argparse.Namespace) -> None:
    from minipaged import backends

    backend = backends.examine("cpu")
    if not backend.available:
        raise BackendUnavailableError(f"device 'cpu' cannot be used: {backend.reason}.")
    from minipaged.ops.cpu import compile_cache, warmup

    warmup.warm_up(
        args.weights or warmup.WEIGHT_FORMATS,
        args.kv_cache_dtype or warmup.KV_FORMATS,
        experts=True,
        report=lambda line: note(line) if line else None,
    )
    write(f"{compile_cache.cache_directory()}\n")
