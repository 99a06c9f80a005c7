"""``minipaged bench speculation``: tokens/s with and without guessing ahead, on the same requests."""

from __future__ import annotations

import argparse

from minipaged.cli.options import add_engine_options, given, positive_int
from minipaged.cli.terminal import note
from minipaged.config import NGRAM, EngineConfig
from minipaged.errors import InvalidParameterError

SUMMARY = "tokens/s with and without speculation"
OMITTED_ENGINE_OPTIONS = ("seed", "adaptive_speculation")  # --seed is the prompts'; all modes are measured


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--text", metavar="FILE", help="cut prompts from this text (default: random tokens that repeat themselves)"
    )
    parser.add_argument("--num-prompts", type=positive_int, default=1, metavar="N", help="run together (default: 1)")
    parser.add_argument("--prompt-len", type=positive_int, default=96, metavar="N", help="tokens (default: 96)")
    parser.add_argument("--output-len", type=positive_int, default=384, metavar="N", help="tokens (default: 384)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X", help="(default: 0, greedy)")
    parser.add_argument("--rounds", type=positive_int, default=5, metavar="N", help="after one that is not counted; 5")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the prompts (default: 0)")
    add_engine_options(parser, omit=OMITTED_ENGINE_OPTIONS)


def measure(args: argparse.Namespace) -> tuple[str, dict]:
    from minipaged.bench import quality, report, speculation
    from minipaged.engine import Engine

    options = {"speculative_model": NGRAM} | given(args, EngineConfig, omit=OMITTED_ENGINE_OPTIONS)
    engine = Engine(EngineConfig(**options))
    if args.prompt_len + args.output_len > engine.max_model_len:
        raise InvalidParameterError(
            f"--prompt-len ({args.prompt_len}) plus --output-len ({args.output_len}) is more than "
            f"max_model_len ({engine.max_model_len}); shorten one of them."
        )
    counts = {"count": args.num_prompts, "length": args.prompt_len, "seed": args.seed}
    if args.text:
        token_ids = engine.model.tokenizer.encode(quality.read_text(args.text), add_special_tokens=False)
        prompts = speculation.text_prompts(token_ids, **counts)
    else:
        prompts = speculation.repetitive_prompts(engine.model.config.vocab_size, **counts)
    result = speculation.measure(
        engine,
        prompts,
        output_len=args.output_len,
        temperature=args.temperature,
        rounds=args.rounds,
        progress=lambda mode, number, run: note(f"round {number}, {mode}: {run['per_second']:.1f} tokens/s"),
    )
    context = report.context(engine)
    result = {"bench": "speculation", "context": context, "text": args.text, **result}
    return report.context_text(context) + "\n" + speculation.text(result), result
