"""``--trace`` and ``--watch``: record what the engine does, and see it while it does."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from minipaged.cli.terminal import note
from minipaged.errors import InvalidParameterError


def add_watch_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what is recorded and drawn."""
    group = parser.add_argument_group("seeing what happens")
    group.add_argument(
        "--trace", type=Path, metavar="FILE", help="record every step in FILE, for 'minipaged view FILE'"
    )
    group.add_argument(
        "--watch",
        action="store_true",
        help="draw block tables and pool in the terminal, on stderr; the answer comes at the end",
    )
    group.add_argument(
        "--watch-delay", type=seconds, default=0.0, metavar="X", help="with --watch, hold each step for X seconds"
    )


def seconds(text: str) -> float:
    """``"0.2"`` to a number of seconds from 0 to 60."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 60:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0 to 60")
    return value


def check(args: argparse.Namespace) -> None:
    """Refuse, before a model is loaded, what could not be written or drawn.

    Raises:
        InvalidParameterError: ``--trace`` names no place for a file; ``--watch`` has no terminal.
    """
    if args.trace is not None and (args.trace.is_dir() or not args.trace.absolute().parent.is_dir()):
        raise InvalidParameterError(f"--trace {str(args.trace)!r} is not a place for a file; name one in a folder.")
    if args.watch_delay and not args.watch:
        raise InvalidParameterError("--watch-delay is given without --watch, which it slows down.")
    if args.watch:
        from minipaged.view.terminal import can_redraw

        if not can_redraw(sys.stderr):
            raise InvalidParameterError(
                "--watch draws on a terminal, and stderr is none that can be redrawn. "
                "Record with --trace FILE instead, and look at it with 'minipaged view FILE'."
            )


@contextlib.contextmanager
def watching(llm, args: argparse.Namespace) -> Iterator[None]:
    """Record and draw as the options say; what was recorded is saved also when the work is interrupted."""
    with contextlib.ExitStack() as stack:
        if args.trace is not None:
            llm.start_trace()
            stack.callback(_save, llm, args.trace)
        if args.watch:
            stack.enter_context(_drawing(llm, args.watch_delay))
        yield


def _save(llm, path: Path) -> None:
    trace = llm.stop_trace()
    trace.save(path)
    note(f"{len(trace)} steps in {path}; see them with: minipaged view {path}")


@contextlib.contextmanager
def _drawing(llm, delay: float) -> Iterator[None]:
    from minipaged.view.terminal import Painter

    painter = llm.add_observer(lambda engine: Painter(engine.scheduler, sys.stderr, delay))
    try:
        yield
    finally:
        llm.remove_observer(painter)
        painter.close()
