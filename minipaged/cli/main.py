"""The ``minipaged`` command: finds the subcommand, runs it, and turns failures into exit codes.

Exit codes: 0 done; 1 a bug in minipaged; 2 something the caller can put right (the message says how);
130 interrupted by Ctrl-C; 141 the reader of our output went away.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback

from minipaged import __version__
from minipaged.cli import bench, cache, chat, config, doctor, generate, inspect, models, pack, pull, view, warmup
from minipaged.cli.options import add_common_options
from minipaged.errors import InvalidParameterError, MinipagedError

COMMANDS = {
    "generate": generate,
    "chat": chat,
    "models": models,
    "pull": pull,
    "pack": pack,
    "cache": cache,
    "inspect": inspect,
    "view": view,
    "bench": bench,
    "doctor": doctor,
    "warmup": warmup,
    "config": config,
}
EXIT_BUG, EXIT_ERROR, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 1, 2, 130, 141

EPILOG = """\
examples:
  minipaged generate "What is a KV cache?"
  minipaged chat --system "You answer in one sentence."
  minipaged generate --model tiny "To be or not to be"   (needs no network)
  minipaged doctor

'minipaged COMMAND --help' lists the options of a command.
"""


def build_parser() -> argparse.ArgumentParser:
    """The whole command line. Only the standard library is imported for it, so help is instant."""
    parser = argparse.ArgumentParser(
        prog="minipaged",
        description="Runs large language models with a paged KV cache, without torch.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"minipaged {__version__}")
    add_common_options(parser)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=module.SUMMARY,
            description=module.__doc__,
            epilog=module.EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.configure(command)
        add_common_options(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command line (default: ``sys.argv[1:]``) and return its exit code.

    Raises ``SystemExit`` for ``--help``, ``--version`` and command lines that argparse refuses.
    """
    arguments = sys.argv[1:] if argv is None else argv
    _replace_closed_streams()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character is no reason to stop
    try:
        _check_utf8(arguments)
        args = build_parser().parse_args(arguments)
        if getattr(args, "verbose", False):
            _log_to_stderr()
        args.run(args)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:
        _silence_stdout()
        return EXIT_BROKEN_PIPE
    except KeyboardInterrupt:
        return _fail("interrupted", EXIT_INTERRUPTED)
    except Exception as error:
        if "--debug" in arguments:
            traceback.print_exc()
        return _fail(*_explain(error))


def _explain(error: Exception) -> tuple[str, int]:
    """What to say about a failure, and the exit code."""
    if isinstance(error, MinipagedError):
        return f"error: {error}", EXIT_ERROR
    if isinstance(error, MemoryError):
        return "error: out of memory; use a smaller model, or lower --num-blocks or --kv-cache-memory.", EXIT_ERROR
    if isinstance(error, OSError):  # a full disk, a missing permission: the machine's state, not a bug
        return f"error: {error}", EXIT_ERROR
    return (
        f"internal error: {type(error).__name__}: {error}\n"
        "This is a bug in minipaged. Please report it with the output of the same command with --debug.",
        EXIT_BUG,
    )


def _check_utf8(arguments: list[str]) -> None:
    """Refuse arguments that Python could only carry as lone surrogates (bytes that are not UTF-8)."""
    for position, argument in enumerate(arguments, start=1):
        try:
            argument.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InvalidParameterError(
                f"argument {position} is not valid UTF-8 (first bad byte after {error.start} characters): "
                f"{os.fsencode(argument)!r}. Pass text in UTF-8; file names included."
            ) from None


def _fail(message: str, code: int) -> int:
    try:
        sys.stdout.flush()
    except OSError:
        _silence_stdout()
    print(f"minipaged: {message}", file=sys.stderr)
    return code


def _replace_closed_streams() -> None:
    """Let a standard stream that was closed before the start (``>&-``), which is ``None``, be the null device."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))


def _silence_stdout() -> None:
    """Point stdout at nothing, so that the interpreter's last flush does not complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _log_to_stderr() -> None:
    import logging

    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="minipaged: %(message)s")
