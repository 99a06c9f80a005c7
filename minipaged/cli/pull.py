"""Fetch a named model once, so that later runs need no network."""

from __future__ import annotations

import argparse
import sys

from minipaged.cli.terminal import note, write

SUMMARY = "fetch a model"
EPILOG = """\
The file is checked by its sha256 and put in place only when it is complete, so an interrupted pull
leaves nothing behind that could be taken for a model. Models go to $MINIPAGED_HOME, or to the cache
folder of your user.

examples:
  minipaged pull smollm2-135m
  minipaged pull gemma3-270m --accept-license
  minipaged pull hf:org/name     (needs the 'hub' extra)
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="NAME", help="a name that 'minipaged models' lists, or hf:org/name")
    parser.add_argument(
        "--accept-license", action="store_true", help="you accept the model's terms (otherwise a terminal asks)"
    )


def run(args: argparse.Namespace) -> None:
    from minipaged.errors import LicenseNotAcceptedError
    from minipaged.model import catalog

    try:
        path = catalog.pull(args.model, accept_license=args.accept_license)
    except LicenseNotAcceptedError:
        if not _accepted(catalog.get_entry(args.model)):
            raise
        path = catalog.pull(args.model, accept_license=True)
    write(f"{path}\n")


def _accepted(entry) -> bool:
    """Ask on a terminal whether the terms are accepted; without one the answer is no."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    note(f"{entry.name} is provided under the {entry.license}:\n{entry.license_url}")
    print("Do you accept these terms? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")
