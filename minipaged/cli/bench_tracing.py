"""``minipaged bench tracing``: what recording a trace adds to a decode step."""

from __future__ import annotations

import argparse

from minipaged.cli.options import add_engine_options, given, positive_int, positive_ints
from minipaged.cli.terminal import note
from minipaged.config import EngineConfig

SUMMARY = "what recording a trace adds to a decode step"
OMITTED_ENGINE_OPTIONS = ("seed",)  # nothing is sampled at random


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch-size", type=positive_ints, default=[1, 32], metavar="N,N,...", help="sequences (default: 1,32)"
    )
    parser.add_argument("--prompt-len", type=positive_int, default=32, metavar="N", help="tokens of each; 32")
    parser.add_argument("--windows", type=positive_int, default=40, metavar="N", help="of 32 steps, of each kind; 40")
    add_engine_options(parser, omit=OMITTED_ENGINE_OPTIONS)


def measure(args: argparse.Namespace) -> tuple[str, dict]:
    from minipaged.bench import report, tracing
    from minipaged.engine import Engine

    engine = Engine(EngineConfig(**given(args, EngineConfig, omit=OMITTED_ENGINE_OPTIONS)))
    result = tracing.measure(
        engine, prompt_len=args.prompt_len, num_windows=args.windows, batch_sizes=args.batch_size, progress=note
    )
    context = report.context(engine)
    result = {"bench": "tracing", "context": context, **result}
    return report.context_text(context) + "\n" + tracing.text(result), result
