"""Show what minipaged finds on this machine, and why a backend is not available."""

from __future__ import annotations

import argparse
import json
import os
import platform

from minipaged import __version__
from minipaged.cli.terminal import fields, human_bytes, table, write
from minipaged.errors import MinipagedError

SUMMARY = "show backends, CPU features, CUDA and versions"
EPILOG = """\
examples:
  minipaged doctor
  minipaged doctor --json
"""
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(args: argparse.Namespace) -> None:
    found = examine()
    write((json.dumps(found, indent=1) if args.json else _text(found)) + "\n")


def examine() -> dict:
    """Everything that is known about this machine, as plain data."""
    from minipaged import backends
    from minipaged.bench import machine

    return {
        "minipaged": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": machine.packages(),
        "blas": machine.blas(),
        "thread_variables": {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ},
        "cpu": machine.cpu(),
        "cores": machine.cores(),
        "memory": machine.memory(),
        "cuda": machine.cuda(),
        "backends": [{"name": b.name, "available": b.available, "reason": b.reason} for b in backends.probe()],
        **_models(),
    }


def _models() -> dict:
    """The cache folder, and the path of each named model that is on this machine."""
    from minipaged.model import catalog

    try:
        models = {entry.name: str(entry.path) if entry.cached else None for entry in catalog.list_models()}
        return {"cache": str(catalog.home()), "models": models}
    except (MinipagedError, OSError) as error:  # no home directory, no permission: a finding, not a failure
        return {"cache": f"not usable: {error}", "models": {}}


def _text(found: dict) -> str:
    cores, memory, blas = found["cores"], found["memory"], found["blas"]
    quota = "" if cores["quota"] is None else f", quota of {cores['quota']:g} cores"
    features = found["cpu"]["features"]
    facts = [
        ("minipaged", found["minipaged"]),
        ("Python", f"{found['python']} on {found['platform']}"),
        ("packages", ", ".join(f"{n} {v}" if v else f"{n} not installed" for n, v in found["packages"].items())),
        ("BLAS", f"{blas['name']} {blas['version'] or ''}, {_or_unknown(blas['threads'])} threads"),
        ("CPU", f"{found['cpu']['model']} ({found['cpu']['architecture']})"),
        ("CPU features", " ".join(f"{'+' if has else '-'}{name}" for name, has in features.items() if has is not None)),
        ("cores", f"{cores['machine']}, of which this process may use {cores['usable']}{quota}"),
        ("memory", f"{_size(memory['total'])}, of which {_size(memory['available'])} are available"),
        ("CUDA", _cuda_text(found["cuda"])),
        ("cache", found["cache"]),
        ("models", ", ".join(name for name, path in found["models"].items() if path) or "none"),
    ]
    if found["thread_variables"]:
        facts.insert(4, ("thread settings", " ".join(f"{k}={v}" for k, v in found["thread_variables"].items())))
    rows = [[b["name"], "available" if b["available"] else "not available", b["reason"]] for b in found["backends"]]
    return fields(facts) + "\n\n" + table(["backend", "state", "what it is, or why not"], rows)


def _cuda_text(cuda: dict) -> str:
    devices = [f"{d['name']} (compute capability {d['compute_capability']})" for d in cuda["devices"]]
    parts = [cuda["problem"] or ", ".join(devices)]
    if cuda["driver"]:
        parts.append(f"driver for CUDA {cuda['driver']}")
    parts.append(f"numba-cuda {cuda['package'] or 'not installed'}")
    return "; ".join(parts)


def _size(count: int | None) -> str:
    return "unknown" if count is None else human_bytes(count)


def _or_unknown(value) -> str:
    return "an unknown number of" if value is None else str(value)
