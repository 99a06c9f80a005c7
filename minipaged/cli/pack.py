"""Keep a model's weights as the cpu backend wants them, so that later starts convert nothing."""

from __future__ import annotations

import argparse
from pathlib import Path

from minipaged.cli.options import CHOICES
from minipaged.cli.terminal import human_bytes, note, write

SUMMARY = "pack a model's weights for quick starts"
EPILOG = """\
The file holds everything: weights, configuration, tokenizer and chat template. Without --output it goes
to $MINIPAGED_HOME/packed (or the cache folder of your user), where every later start of the same model
with the same options finds it, unless the model's own files have changed since. With --output, give the
file's name as the model.

examples:
  minipaged pack smollm2-135m --quantization int8
  minipaged pack model.gguf --dtype bfloat16 --output model.mpk
  minipaged generate --model model.mpk "Why is the sky blue?"
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a name, a directory in Hugging Face layout, or a GGUF file")
    parser.add_argument("--quantization", choices=CHOICES["quantization"], help="quantise the weights")
    parser.add_argument("--dtype", choices=CHOICES["dtype"], default="auto", help="precision without quantization")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to put it")


def run(args: argparse.Namespace) -> None:
    from minipaged import backends
    from minipaged.config import EngineConfig

    config = EngineConfig(model=args.model, device="cpu", dtype=args.dtype, quantization=args.quantization)
    backend = backends.choose("cpu")
    backends.check_options(backend, config)
    weight_format = backends.choose_formats(backend, config).weights

    from minipaged.model.pack import pack_model

    path = pack_model(args.model, weight_format, args.output)
    note(f"{weight_format} weights, {human_bytes(path.stat().st_size)}" + _how_used(args.output is None))
    write(f"{path}\n")


def _how_used(automatically: bool) -> str:
    return "; later starts with the same options use this file:" if automatically else "; give this file as the model:"
