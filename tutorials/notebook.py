"""A step's notebook in one language: made from its source as plain JSON, and executed.

Nothing in it depends on when or where it was built: ids are numbers, and neither times nor versions are kept.
"""

from __future__ import annotations

import json
from pathlib import Path

from tutorials.source_format import FOLDER, Cell, Exercise, Step

TIMEOUT = 120  # seconds that one cell may take

SETUP = '''\
# Finds the course and minipaged; on Colab, installs it from the folder that you cloned or uploaded here.
import importlib.util
import subprocess
import sys
from pathlib import Path

here = Path.cwd()
around = [here, *here.parents, *sorted(here.glob("*/"))]
root = next((folder for folder in around if (folder / "tutorials" / "course").is_dir()), None)
if root is None:
    raise RuntimeError(f"minipaged's folder is not in {here} or above it; clone the repository there, or upload it.")
if importlib.util.find_spec("minipaged") is None:
    subprocess.check_call([sys.executable, "-m", "pip", "install", "--quiet", str(root)])
sys.path.append(str(root))'''

SUMMARY = {"en": "Solution", "tr": "Çözüm"}
FOOTER = {
    "en": "[All steps](../README.md) · [Glossary](../GLOSSARY.md) · [Türkçesi](../tr/{name}.ipynb)",
    "tr": "[Bütün adımlar](../README.tr.md) · [Terimler](../GLOSSARY.tr.md) · [In English](../en/{name}.ipynb)",
}


def notebook_path(step: Step, language: str) -> Path:
    return FOLDER / language / f"{step.name}.ipynb"


def make_notebook(step: Step, language: str) -> dict:
    """The notebook, not executed: title, set-up cell, the step's cells, links."""
    cells: list[dict] = []

    def add(kind: str, text: str, **metadata) -> None:
        cell = {"cell_type": kind, "id": f"cell-{len(cells):02d}", "metadata": metadata, "source": _lines(text)}
        if kind == "code":
            cell |= {"execution_count": None, "outputs": []}
        cells.append(cell)

    for cell in step.cells:
        if isinstance(cell, Exercise):
            add("code", cell.stub.text)
            add("code", cell.check.text)
            add("markdown", _solution(cell, language))
        elif cell.kind == language:
            add("markdown", cell.text)
            if len(cells) == 1:
                add("code", SETUP)
        elif cell.kind == "code":
            add("code", cell.text)
        elif cell.kind == "varies":
            add("code", cell.text, varies=True)
    add("markdown", FOOTER[language].format(name=step.name))
    return {
        "cells": cells,
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def execute(notebook: dict, folder: Path) -> dict:
    """Run all cells in a fresh kernel whose working directory is ``folder``; returns the notebook with its outputs.

    Needs nbformat, nbclient and ipykernel (``pip install -e '.[tutorials]'``). A cell that raises raises here.
    """
    import nbformat
    from nbclient import NotebookClient

    node = nbformat.reads(json.dumps(notebook), as_version=4)
    nbformat.validate(node)
    client = NotebookClient(
        node,
        timeout=TIMEOUT,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
        extra_arguments=["--log-level=40"],  # no warning that the loopback is not encrypted
    )
    client.execute()
    executed = json.loads(nbformat.writes(node, indent=1))
    executed["metadata"] = notebook["metadata"]  # a kernel adds its version
    for cell in executed["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = _joined_streams(cell["outputs"])
    return executed


def write(notebook: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def sources(notebook: dict) -> list[tuple[str, str]]:
    """``(cell type, text)`` of every cell."""
    return [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]


def printed(notebook: dict) -> list[str]:
    """What each code cell printed; of a cell marked as varying, nothing."""
    return [
        "".join("".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream")
        for cell in notebook["cells"]
        if cell["cell_type"] == "code" and not cell["metadata"].get("varies")
    ]


def _solution(exercise: Exercise, language: str) -> str:
    return (
        f"<details>\n<summary>{SUMMARY[language]}: <code>{exercise.name}</code></summary>\n\n"
        f"```python\n{exercise.solution.text}\n```\n\n</details>"
    )


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def _joined_streams(outputs: list[dict]) -> list[dict]:
    """How a kernel cuts what is printed into messages depends on the moment; join them again."""
    joined: list[dict] = []
    for output in outputs:
        if output["output_type"] == "stream":
            text = "".join(output["text"])
            previous = joined[-1] if joined else None
            if previous and previous["output_type"] == "stream" and previous["name"] == output["name"]:
                text = "".join(previous["text"]) + text
                joined.pop()
            output = {**output, "text": _lines(text)}
        joined.append(output)
    return joined


def code_cells(path: Path) -> list[Cell]:
    """The code of a notebook as cells, so that a learner's answers can be run."""
    cells = [text for kind, text in sources(read(path)) if kind == "code"]
    return [Cell("code", text, 0) for text in cells]
