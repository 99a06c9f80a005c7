"""``python -m tutorials``: build the notebooks, check answers, render the glossary. Run it in the repository's root."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tutorials import glossary, notebook
from tutorials.run import run_learner
from tutorials.source_format import LANGUAGES, SourceError, find_source, read_step, source_paths


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tutorials", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="make and execute the notebooks of all steps, or of those named")
    build.add_argument("steps", nargs="*", metavar="NN")
    check = commands.add_parser("check", help="say which exercises of a step are solved")
    check.add_argument("step", metavar="NN")
    check.add_argument("file", nargs="?", type=Path, help="your notebook or .py file; else the English notebook")
    commands.add_parser("glossary", help="render GLOSSARY.md and GLOSSARY.tr.md from glossary.txt")
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "build":
            return _build(arguments.steps)
        if arguments.command == "check":
            return _check(arguments.step, arguments.file)
        glossary.write_all()
        return 0
    except (SourceError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _build(numbers: list[str]) -> int:
    for path in [find_source(number) for number in numbers] or source_paths():
        step = read_step(path)
        for language in LANGUAGES:
            target = notebook.notebook_path(step, language)
            notebook.write(notebook.execute(notebook.make_notebook(step, language), target.parent), target)
            print(target.relative_to(Path.cwd()) if target.is_relative_to(Path.cwd()) else target)
    return 0


def _check(number: str, path: Path | None) -> int:
    step = read_step(find_source(number))
    path = path or notebook.notebook_path(step, "en")
    try:
        results = list(run_learner(step, path))
    except (SyntaxError, AssertionError, NameError, TypeError, ValueError) as error:
        print(f"error: {path}: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    print("\n".join(map(str, results)) or "there is nothing to check in this step.")
    return 0 if all(result.outcome == "solved" for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
