"""Look at a trace that 'minipaged generate --trace' or LLM.stop_trace() recorded."""

from __future__ import annotations

import argparse
from pathlib import Path

from minipaged.cli.terminal import note, write
from minipaged.errors import InvalidParameterError

SUMMARY = "look at a recorded trace, step by step"
EPILOG = """\
Without an option a page is written beside the trace: one file with a slider over the steps, which needs
no network and no server.

examples:
  minipaged generate --model tiny --n 3 --temperature 1 --trace trace.json "ROMEO:"
  minipaged view trace.json --open
  minipaged view trace.json --svg timeline.svg
  minipaged view trace.json --svg step.svg --step 12    (block tables and pool of a step)
  minipaged view trace.json --chrome perfetto.json      (for https://ui.perfetto.dev)
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trace", type=Path, metavar="TRACE", help="the trace's file")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--html", type=Path, metavar="FILE", help="write the page there")
    kinds.add_argument("--svg", type=Path, metavar="FILE", help="draw the timeline, or with --step one step's blocks")
    kinds.add_argument("--chrome", type=Path, metavar="FILE", help="write a file for Perfetto and chrome://tracing")
    parser.add_argument("--step", type=int, metavar="N", help="with --svg, the step whose blocks are drawn, from 0")
    parser.add_argument("--open", action="store_true", help="open what was written in a browser")


def run(args: argparse.Namespace) -> None:
    from minipaged.view import Trace, draw_blocks, draw_timeline

    if args.step is not None and args.svg is None:
        raise InvalidParameterError("--step chooses what --svg draws; give --svg FILE too.")
    if args.open and args.chrome is not None:
        raise InvalidParameterError("--open shows pages and drawings; open the file of --chrome in Perfetto.")
    trace = Trace.load(args.trace)
    path = args.html or args.svg or args.chrome or args.trace.with_suffix(".html")
    if path.absolute() == args.trace.absolute():
        raise InvalidParameterError(f"{str(path)!r} is the trace itself; choose another file.")
    if args.chrome is not None:
        trace.to_chrome(path)
    elif args.svg is None:
        trace.to_html(path)
    elif args.step is None:
        draw_timeline(trace).save(path)
    else:
        if not 0 <= args.step < len(trace):
            raise InvalidParameterError(f"--step is {args.step}; the trace has steps 0 to {len(trace) - 1}.")
        draw_blocks(trace.at(args.step)).save(path)
    note(f"{len(trace)} steps, {len(trace.sequences)} sequences")
    write(f"{path}\n")
    if args.open:
        _open(path)


def _open(path: Path) -> None:
    import webbrowser

    if not webbrowser.open(path.absolute().as_uri()):
        raise InvalidParameterError(f"no browser could be started here; open {path} yourself.")
