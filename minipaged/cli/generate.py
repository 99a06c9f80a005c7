"""Answer one prompt or several; the text goes to stdout as it comes, everything else to stderr."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from pathlib import Path

from minipaged.cli.options import DEFAULT_MAX_TOKENS, add_engine_options, add_sampling_options, given, given_sampling
from minipaged.cli.terminal import note, write
from minipaged.cli.watch import add_watch_options, check, watching
from minipaged.config import EngineConfig, SamplingParams
from minipaged.errors import InvalidParameterError, MinipagedError
from minipaged.outputs import RequestOutput

SUMMARY = "answer a prompt"
EPILOG = """\
A model with a chat template answers the prompt as a user's message, which is what instruction models
are trained for; with --raw, or for a model without a template, the prompt's text itself is continued.

examples:
  minipaged generate "Why is the sky blue?"
  minipaged generate --temperature 0.8 --seed 7 --max-tokens 60 "Write a haiku about memory."
  minipaged generate --raw "Once upon a time"
  minipaged generate --n 3 --temperature 1 "Invent a name for a cat."
  minipaged generate --beam-width 4 "Translate to French: Good morning."
  minipaged generate --trace trace.json "Why is the sky blue?"   (then: minipaged view trace.json --open)
  minipaged generate --watch --model tiny --n 4 --temperature 1 "ROMEO:"
  minipaged generate --json "First question" "Second question" > answers.jsonl
  minipaged generate --file notes.txt --system "Summarise the user's text."
  git log -5 | minipaged generate -
"""
OMITTED_ENGINE_OPTIONS = ("seed",)  # --seed is the request's seed here


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "prompts", nargs="*", metavar="PROMPT", help="text of a prompt; '-' reads one from stdin; several are batched"
    )
    parser.add_argument(
        "--file",
        action="append",
        default=[],
        metavar="PATH",
        help="read a prompt from a file (its last newline is left out); may be given several times",
    )
    parser.add_argument("--system", metavar="TEXT", help="system message put before the prompt (not with --raw)")
    parser.add_argument("--raw", action="store_true", help="continue the text as it is, without the chat template")
    parser.add_argument("--json", action="store_true", help="print one RequestOutput as JSON a line, at the end")
    parser.add_argument("--stats", action="store_true", help="report tokens and times on stderr at the end")
    add_watch_options(parser)
    add_sampling_options(parser)
    add_engine_options(parser, omit=OMITTED_ENGINE_OPTIONS)


def run(args: argparse.Namespace) -> None:
    options = given_sampling(args)
    if args.raw and args.system is not None:
        raise InvalidParameterError("--system needs the chat template, which --raw leaves out; give one of the two.")
    check(args)
    texts = read_prompts(args.prompts, args.file)

    from minipaged.llm import LLM

    with LLM(**given(args, EngineConfig, omit=OMITTED_ENGINE_OPTIONS)) as llm:
        prompts = [make_prompt(llm, text, raw=args.raw, system=args.system) for text in texts]
        params = [sampling_params(llm, prompt, options) for prompt in prompts]
        if len(prompts) == 1 and not args.json and not args.watch:
            with watching(llm, args):
                outputs = [stream(llm, prompts[0], params[0])]
        else:
            with watching(llm, args):
                outputs = llm.generate(prompts, params, use_tqdm=False if args.watch else None)
            _print(outputs, as_json=args.json)
        if args.stats:
            _report(outputs)
    for number, output in enumerate(outputs, start=1):
        if output.error:
            raise MinipagedError(f"prompt {number} of {len(outputs)} failed: {output.error}")


def read_prompts(arguments: list[str], files: list[str]) -> list[str]:
    """The texts of all prompts: arguments in their order, then files; stdin if there is neither."""
    if not arguments and not files:
        if sys.stdin.isatty():
            raise InvalidParameterError('no prompt; give one: minipaged generate "Why is the sky blue?"')
        arguments = ["-"]
    if arguments.count("-") > 1:
        raise InvalidParameterError("'-' is given more than once, but stdin can be read only once.")
    texts = [_decode(sys.stdin.buffer.read(), "stdin") if text == "-" else text for text in arguments]
    for name in files:
        try:
            texts.append(_decode(Path(name).read_bytes(), name))
        except OSError as error:
            raise InvalidParameterError(f"cannot read the prompt file {name!r}: {error.strerror}.") from None
    for number, text in enumerate(texts, start=1):
        if not text:
            which = "the prompt" if len(texts) == 1 else f"prompt {number} of {len(texts)}"
            raise InvalidParameterError(f"{which} is empty; give at least one character.")
    return texts


def _decode(data: bytes, source: str) -> str:
    try:
        return data.decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InvalidParameterError(
            f"{source} is not valid UTF-8: byte 0x{data[error.start]:02x} at position {error.start}. Convert it first."
        ) from None


def make_prompt(llm, text: str, *, raw: bool, system: str | None) -> dict:
    """``text`` as token ids: through the chat template if the model has one and ``raw`` is not asked."""
    if raw or (llm.chat_template is None and system is None):
        return {"prompt": text, "prompt_token_ids": llm.tokenizer.encode(text)}
    messages = [{"role": "user", "content": text}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return llm.chat_prompt(messages)


def sampling_params(llm, prompt: dict, options: dict) -> SamplingParams:
    """The model's defaults with ``options`` over them.

    Unless ``max_tokens`` is given it is ``DEFAULT_MAX_TOKENS``, or what is left of ``max_model_len`` if that is less.
    """
    room = llm.max_model_len - len(prompt["prompt_token_ids"])
    usual = max(DEFAULT_MAX_TOKENS, options.get("min_tokens", 0))
    defaults = {"max_tokens": min(usual, room) if room > 0 else usual}
    return llm.default_sampling_params().clone(**{**defaults, **options})


def stream(llm, prompt: dict, params: SamplingParams) -> RequestOutput:
    """Write an answer as it comes, and return it; several continuations come when all are known."""
    if params.n > 1:
        (output,) = llm.generate(prompt, params)
        write(_text_of(output))
        return output
    with contextlib.closing(llm.stream(prompt, params)) as outputs:
        for output in outputs:
            write(output.outputs[0].delta)
    if not output.outputs[0].text.endswith("\n"):
        write("\n")
    return output


def _print(outputs: list[RequestOutput], *, as_json: bool) -> None:
    if as_json:
        for output in outputs:
            write(json.dumps(to_json(output), ensure_ascii=False) + "\n")
    else:
        write("\n".join(map(_text_of, outputs)))


def _text_of(output: RequestOutput) -> str:
    """The continuations, best first, each ended by a newline, with a line of three hyphens between them."""
    return "---\n".join(completion.text.removesuffix("\n") + "\n" for completion in output.outputs)


def to_json(output: RequestOutput) -> dict:
    """A result as plain data; ``delta`` belongs to streams and is left out."""
    data = dataclasses.asdict(output)
    for completion in data["outputs"]:
        del completion["delta"]
    return data


def _report(outputs: list[RequestOutput]) -> None:
    prompt = sum(len(o.prompt_token_ids) for o in outputs)
    cached = sum(o.num_cached_tokens for o in outputs)
    completions = [completion for output in outputs for completion in output.outputs]
    generated = sum(len(completion.token_ids) for completion in completions)
    began = min(o.metrics.arrival_time for o in outputs)
    ended = max(o.metrics.finished_time for o in outputs)
    first = min((o.metrics.first_token_time for o in outputs if o.metrics.first_token_time), default=ended)
    note(
        f"{prompt} prompt tokens ({cached} from the cache), {generated} generated in {ended - began:.2f} s "
        f"({generated / max(ended - began, 1e-9):.1f} tokens/s), first token after {first - began:.2f} s; "
        f"finished by: {', '.join(sorted({completion.finish_reason for completion in completions}))}"
    )
