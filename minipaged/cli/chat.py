"""Talk with a model. The conversation is kept, and what it has computed is reused from the cache."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator

from minipaged.cli.generate import OMITTED_ENGINE_OPTIONS, sampling_params
from minipaged.cli.options import add_engine_options, add_sampling_options, given, given_sampling
from minipaged.cli.terminal import human_bytes, note, write
from minipaged.config import EngineConfig
from minipaged.errors import InvalidParameterError, MinipagedError, TokenizerError

SUMMARY = "talk with a model"
EPILOG = """\
At the prompt: /help lists the commands. Ctrl-C stops an answer, Ctrl-D leaves.
Lines piped into stdin are messages, one each; the answers go to stdout.

examples:
  minipaged chat
  minipaged chat --system "You are a terse librarian." --temperature 0.7
  printf 'My name is Ada.\\nWhat is my name?\\n' | minipaged chat
"""
HELP = """\
/system TEXT  set the system message and start again (without TEXT: remove it)
/reset        forget the conversation, keep the system message
/stats        what the engine has done so far
/help         this list
/exit         leave (so does Ctrl-D)"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--system", metavar="TEXT", help="system message at the beginning of the conversation")
    add_sampling_options(parser, omit=("n", "best_of"))
    add_engine_options(parser, omit=OMITTED_ENGINE_OPTIONS)


def run(args: argparse.Namespace) -> None:
    options = given_sampling(args)

    from minipaged.llm import LLM

    with LLM(**given(args, EngineConfig, omit=OMITTED_ENGINE_OPTIONS)) as llm:
        if llm.chat_template is None:
            raise TokenizerError(f"{llm.config.model} has no chat template; use 'minipaged generate' with it.")
        conversation = Conversation(llm, options, args.system)
        interactive = sys.stdin.isatty() and sys.stdout.isatty()
        if interactive:
            note(f"{llm.config.model} on {llm.stats().device}. /help lists the commands, Ctrl-D leaves.")
        for line in _typed_lines() if interactive else _piped_lines():
            if not line.strip():
                continue
            try:
                if conversation.handle(line.strip()):
                    return
            except MinipagedError as error:
                if not interactive:
                    raise
                note(f"error: {error}")


class Conversation:
    """The messages so far, and what a line of input does to them."""

    def __init__(self, llm, options: dict, system: str | None):
        self.llm = llm
        self.options = options
        self.system = system
        self.messages: list[dict] = []
        self.reset()

    def reset(self) -> None:
        """Forget all but the system message."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def handle(self, line: str) -> bool:
        """Carry out a command or answer a message; ``True``: leave."""
        if not line.startswith("/"):
            self.answer(line)
            return False
        command, _, rest = line.partition(" ")
        if command in ("/exit", "/quit"):
            return True
        if command == "/reset":
            self.reset()
            note("The conversation is forgotten.")
        elif command == "/system":
            self.system = rest.strip() or None
            self.reset()
            note("The system message is set." if self.system else "There is no system message now.")
        elif command == "/stats":
            note(_describe(self.llm.stats()))
        else:
            note(HELP if command == "/help" else f"unknown command {command}\n{HELP}")
        return False

    def answer(self, text: str) -> None:
        """Stream the answer to one message; Ctrl-C keeps what came until then.

        A message that the engine refuses (say, because the conversation became too long) leaves the
        conversation as it was.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = self.llm.chat_prompt(messages)
        params = sampling_params(self.llm, prompt, self.options)
        output, stopped = None, False
        with contextlib.closing(self.llm.stream(prompt, params)) as outputs:
            try:
                for output in outputs:
                    write(output.outputs[0].delta)
            except KeyboardInterrupt:
                stopped = True
        if output is None:
            return
        answer = output.outputs[0]
        if stopped or not answer.text.endswith("\n"):
            write("\n")
        if output.error:
            raise MinipagedError(output.error)
        self.messages = [*messages, {"role": "assistant", "content": answer.text}]
        num_prompt = len(output.prompt_token_ids)
        ending = ", stopped" if stopped else ""
        if answer.finish_reason == "length":
            ending = f", cut at max_tokens={params.max_tokens}"
        note(
            f"[{output.num_cached_tokens} of {num_prompt} prompt tokens from the cache, "
            f"{len(answer.token_ids)} generated{ending}]"
        )


def _typed_lines() -> Iterator[str]:
    """Lines from a terminal, with editing and history where Python has readline."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (importing it is what gives input() its editing)
    while True:
        try:
            yield input("> ")
        except EOFError:
            write("\n")
            return
        except KeyboardInterrupt:
            note("\n(Ctrl-D or /exit leaves)")
        except UnicodeDecodeError:
            note("error: that line is not valid UTF-8.")


def _piped_lines() -> Iterator[str]:
    for number, data in enumerate(sys.stdin.buffer, start=1):
        try:
            yield data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InvalidParameterError(
                f"line {number} of stdin is not valid UTF-8: byte 0x{data[error.start]:02x} "
                f"at position {error.start}. Convert it first."
            ) from None


def _describe(stats) -> str:
    return (
        f"{stats.num_requests_finished} answers, {stats.num_generated_tokens} tokens generated, "
        f"{stats.num_steps} steps in {stats.step_seconds:.1f} s\n"
        f"prompt tokens: {stats.num_prompt_tokens_computed} computed, {stats.num_prompt_tokens_cached} "
        f"from the cache ({stats.prefix_cache_hit_rate:.0%})\n"
        f"KV blocks of {stats.block_size} tokens: {stats.num_blocks_cached} cached of {stats.num_blocks_total} "
        f"({human_bytes(stats.kv_cache_bytes)}); weights {human_bytes(stats.weight_bytes)} on {stats.device}"
    )
