"""Running the command line inside the test process."""

import io
import sys

import pytest

from minipaged.cli.main import main


@pytest.fixture
def cli(capsys, monkeypatch):
    """``cli(*arguments, stdin=b"")`` runs a command line: its exit code, stdout and stderr."""

    def run(*arguments, stdin: bytes = b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as exit_:
            code = exit_.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
