"""List the models that have a name, and which of them are on this machine."""

from __future__ import annotations

import argparse
import json

from minipaged.cli.terminal import human_bytes, human_count, table, write

SUMMARY = "list the named models"
EPILOG = """\
Any directory in Hugging Face layout and any GGUF file work too: give its path as the model.

examples:
  minipaged models
  minipaged pull smollm2-135m
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the list as JSON")


def run(args: argparse.Namespace) -> None:
    found = listing()
    if args.json:
        write(json.dumps(found, indent=1) + "\n")
        return
    rows = [
        [
            model["name"],
            human_count(model["num_parameters"]),
            human_bytes(model["size"]),
            model["license"] + (" (to be accepted)" if model["must_accept"] else ""),
            model["path"] if model["cached"] else f"minipaged pull {model['name']}",
            model["description"],
        ]
        for model in found
    ]
    write(table(["name", "parameters", "size", "licence", "where it is", "what it is"], rows, right=(1, 2)) + "\n")


def listing() -> list[dict]:
    """The catalog as plain data; ``size`` in bytes, ``path`` where the model is or will be."""
    from minipaged.model import catalog

    names = ("name", "description", "num_parameters", "size", "license", "license_url", "must_accept", "cached")
    return [
        {name: getattr(entry, name) for name in names} | {"path": str(entry.path)} for entry in catalog.list_models()
    ]
