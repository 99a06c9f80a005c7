"""Save the KV of a prompt in a file, and use it in another process instead of computing it again."""

from __future__ import annotations

import argparse
from pathlib import Path

from minipaged.cli import generate
from minipaged.cli.options import add_common_options, add_engine_options, add_sampling_options, given, given_sampling
from minipaged.cli.terminal import human_bytes, note, write
from minipaged.config import EngineConfig
from minipaged.errors import InvalidParameterError, MinipagedError

SUMMARY = "save a long prompt's KV, and load it again"
EPILOG = """\
What is saved are the full blocks of the prompt, as the model sees it: with its chat template unless --raw.
With --system and no prompt, it is what all conversations with that system message begin with. A file is
loaded only by the model, precision and block size that saved it.

examples:
  minipaged cache save librarian.kv --system "$(cat librarian.txt)"
  minipaged cache load librarian.kv --system "$(cat librarian.txt)" --prompt "Who wrote Emma?"
  minipaged cache save play.kv --raw --file play.txt
"""


def configure(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(title="what to do", metavar="WHAT", dest="cache", required=True)
    save = _add(kinds, "save", _save, "compute a prompt's KV and save it in FILE")
    add_engine_options(save, omit=generate.OMITTED_ENGINE_OPTIONS)
    load = _add(kinds, "load", _load, "check FILE, load it and, if there is a prompt, answer that")
    add_sampling_options(load)
    add_engine_options(load, omit=generate.OMITTED_ENGINE_OPTIONS)


def _add(kinds, name: str, function, summary: str) -> argparse.ArgumentParser:
    parser = kinds.add_parser(name, help=summary, description=summary, allow_abbrev=False)
    parser.add_argument("path", type=Path, metavar="FILE", help="the saved prefix")
    parser.add_argument("--prompt", metavar="TEXT", help="the prompt; '-' reads it from stdin")
    parser.add_argument("--file", metavar="PATH", help="read the prompt from a file")
    parser.add_argument("--system", metavar="TEXT", help="system message put before the prompt (not with --raw)")
    parser.add_argument("--raw", action="store_true", help="take the text as it is, without the chat template")
    add_common_options(parser)
    parser.set_defaults(do=function)
    return parser


def run(args: argparse.Namespace) -> None:
    options = given_sampling(args)
    if args.raw and args.system is not None:
        raise InvalidParameterError("--system needs the chat template, which --raw leaves out; give one of the two.")
    text = None
    if args.prompt is not None and args.file is not None:
        raise InvalidParameterError("--prompt and --file are given; give one of the two.")
    if args.prompt is not None or args.file is not None:
        (text,) = generate.read_prompts(*([value] if value is not None else [] for value in (args.prompt, args.file)))
    elif args.do is _save and args.system is None:
        raise InvalidParameterError("there is nothing to save; give --prompt, --file or --system.")

    from minipaged.llm import LLM

    with LLM(**given(args, EngineConfig, omit=generate.OMITTED_ENGINE_OPTIONS)) as llm:
        args.do(llm, args, text, options)


def _save(llm, args: argparse.Namespace, text: str | None, options: dict) -> None:
    if text is None:
        prompt = _common_prefix(llm, args.system)
    else:
        prompt = generate.make_prompt(llm, text, raw=args.raw, system=args.system)
    num_tokens = llm.save_prefix(prompt, args.path)
    size = human_bytes(args.path.stat().st_size)
    note(f"{num_tokens} of {len(prompt['prompt_token_ids'])} tokens, {size}")
    write(f"{args.path}\n")


def _load(llm, args: argparse.Namespace, text: str | None, options: dict) -> None:
    num_tokens = llm.load_prefix(args.path)
    if text is None:
        write(f"{args.path}: {num_tokens} tokens, sound, of this model and these settings\n")
        return
    prompt = generate.make_prompt(llm, text, raw=args.raw, system=args.system)
    output = generate.stream(llm, prompt, generate.sampling_params(llm, prompt, options))
    note(f"{output.num_cached_tokens} of {len(output.prompt_token_ids)} prompt tokens came from {args.path}")
    if output.error:
        raise MinipagedError(output.error)


def _common_prefix(llm, system: str) -> dict:
    """What conversations with this system message begin with, whatever the user says."""
    first, second = (
        generate.make_prompt(llm, text, raw=False, system=system)["prompt_token_ids"] for text in ("a", "b")
    )
    shared = 0
    while shared < min(len(first), len(second)) and first[shared] == second[shared]:
        shared += 1
    return {"prompt_token_ids": first[:shared]}
