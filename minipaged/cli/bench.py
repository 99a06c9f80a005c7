"""Measure speed, KV memory waste, what a precision costs, and other engines on the same work."""

from __future__ import annotations

import argparse
import dataclasses
import json

from minipaged.bench.modes import MODE_OPTIONS
from minipaged.cli import bench_runs as runs
from minipaged.cli import bench_speculation, bench_tracing
from minipaged.cli.bench_runs import FORMATS, METRICS, OMITTED_ENGINE_OPTIONS, SCHEDULER_OPTIONS
from minipaged.cli.options import add_common_options, add_engine_options, positive_int, positive_ints
from minipaged.cli.terminal import write
from minipaged.config import POLICIES, EngineConfig

SUMMARY = "measure throughput, latency, KV memory waste or quality"
DISTRIBUTIONS = ("conversation", "instruction", "uniform", "fixed")
EPILOG = """\
examples:
  minipaged bench throughput --num-requests 32 --compare static
  minipaged bench throughput --distribution fixed --input-len 128 --output-len 64 --json result.json
  minipaged bench latency --prompt-len 128 --batch-size 1,32
  minipaged bench memory
  minipaged bench roofline --format int8 --num-threads 2
  minipaged bench kernels --device cuda --batch-size 1,32 --json card.json
  minipaged bench roofline --step --num-threads 2 --batch-size 1,32
  minipaged bench speculation --model tiny --speculative-model tiny-draft --text held-out.txt
  minipaged bench quality --text held-out.txt --mode reference --mode cpu:int8 --mode cpu:int4:kv=int8
  minipaged bench compare --peer transformers=/venv/bin/python:/models/hf --mode cpu:int8 --json result.json
"""


def configure(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(title="what to measure", metavar="WHAT", dest="bench", required=True)
    _configure_throughput(
        _add(kinds, "throughput", runs.throughput, "tokens/s of a workload, and what a policy changes")
    )
    _configure_latency(_add(kinds, "latency", runs.latency, "time to first token, and decode speed by batch size"))
    _configure_scaling(_add(kinds, "scaling", runs.scaling, "decode speed by number of users and by context"))
    _configure_memory(_add(kinds, "memory", runs.memory, "reserved KV slots that hold no token, paged and contiguous"))
    _configure_roofline(
        _add(kinds, "roofline", runs.roofline, "products of the cpu backend against this machine's peaks")
    )
    _configure_kernels(
        _add(kinds, "kernels", runs.kernels, "each kernel of a step on a CUDA device, against its copies")
    )
    _configure_compare(_add(kinds, "compare", runs.compare, "other engines on the same work, in turn with ours"))
    _configure_sharing(_add(kinds, "sharing", runs.sharing, "KV blocks saved by samples, beams and prompts that share"))
    _configure_grammar(_add(kinds, "grammar", runs.grammar, "what masking by a JSON schema adds to a decode step"))
    bench_speculation.configure(_add(kinds, "speculation", bench_speculation.measure, bench_speculation.SUMMARY))
    bench_tracing.configure(_add(kinds, "tracing", bench_tracing.measure, bench_tracing.SUMMARY))
    _configure_quality(_add(kinds, "quality", runs.quality, "perplexity and greedy agreement of each precision"))


def _add(kinds, name: str, function, summary: str) -> argparse.ArgumentParser:
    parser = kinds.add_parser(name, help=summary, description=summary, allow_abbrev=False)
    parser.add_argument("--json", metavar="FILE", help="write the numbers as JSON ('-': to stdout, no table)")
    add_common_options(parser)
    parser.set_defaults(measure=function)
    return parser


def _configure_throughput(parser: argparse.ArgumentParser) -> None:
    _add_workload_options(parser, num_requests=32)
    parser.add_argument("--workload", metavar="FILE", help="a JSON list of {prompt_token_ids or prompt, max_tokens}")
    parser.add_argument("--save-workload", metavar="FILE", help="write the workload in that form")
    parser.add_argument(
        "--compare", choices=POLICIES, help="also run this policy on the same trace and pool, and print the ratio"
    )
    parser.add_argument("--rounds", type=positive_int, metavar="N", help="runs of each (default: 1; with --compare 3)")
    add_engine_options(parser, omit=OMITTED_ENGINE_OPTIONS)


def _configure_latency(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompt-len", type=positive_int, default=128, metavar="N", help="prompt tokens (default: 128)"
    )
    parser.add_argument(
        "--batch-size",
        type=positive_ints,
        default=[1, 32],
        metavar="N,N,...",
        help="sequences decoded together (default: 1,32)",
    )
    parser.add_argument(
        "--steps", type=positive_int, default=32, metavar="N", help="decode steps timed in a repetition (default: 32)"
    )
    parser.add_argument(
        "--repetitions", type=positive_int, default=5, metavar="N", help="after one warm-up (default: 5)"
    )
    parser.add_argument(
        "--n",
        type=positive_int,
        default=1,
        metavar="N",
        help="also time the first tokens of N choices of one prompt, in turn with those of one (default: 1)",
    )
    add_engine_options(parser, omit=OMITTED_ENGINE_OPTIONS)


def _configure_scaling(parser: argparse.ArgumentParser) -> None:
    lists = {
        "--users": ([1, 2, 4, 8, 16, 32, 64, 128], "sequences decoded together, at --at-context"),
        "--contexts": ([128, 512, 2048, 8000], "tokens that each has, at each of --at-users"),
        "--at-users": ([1, 8], "for --contexts"),
    }
    for flag, (default, text) in lists.items():
        shown = ",".join(map(str, default))
        parser.add_argument(
            flag, type=positive_ints, default=default, metavar="N,N,...", help=f"{text} (default: {shown})"
        )
    parser.add_argument("--at-context", type=positive_int, default=512, metavar="N", help="for --users; 512")
    parser.add_argument("--steps", type=positive_int, default=8, metavar="N", help="timed at each point, in a round; 8")
    parser.add_argument("--rounds", type=positive_int, default=3, metavar="N", help="(default: 3)")
    parser.add_argument("--with", dest="earlier", metavar="FILE", help="add the points of an earlier run's --json file")
    parser.add_argument("--plot", metavar="FILE", help="draw the curves to this .svg or .png file")
    add_engine_options(parser, omit=OMITTED_ENGINE_OPTIONS)


def _configure_memory(parser: argparse.ArgumentParser) -> None:
    _add_workload_options(parser, num_requests=256)
    group = parser.add_argument_group("scheduler options", "No model runs: only the scheduler is exercised.")
    defaults = {"num_blocks": 2048, "max_model_len": 2048}
    for field in dataclasses.fields(EngineConfig):
        if field.name in SCHEDULER_OPTIONS:
            default = defaults.get(field.name, field.default)
            flag = "--" + field.name.replace("_", "-")
            group.add_argument(
                flag, dest=field.name, type=positive_int, default=default, metavar="N", help=f"(default: {default})"
            )


def _configure_quality(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", metavar="FILE", required=True, help="held-out text, UTF-8")
    parser.add_argument(
        "--mode",
        action="append",
        required=True,
        metavar="MODE",
        help="DEVICE[:DTYPE][:QUANTIZATION][:kv=DTYPE], repeatable; the first is what the others are compared with",
    )
    parser.add_argument("--window", type=positive_int, default=256, metavar="N", help="tokens scored together; 256")
    parser.add_argument("--max-tokens", type=positive_int, metavar="N", help="of the text (default: all)")
    parser.add_argument("--num-prompts", type=positive_int, default=20, metavar="N", help="continued greedily; 20")
    parser.add_argument("--prompt-len", type=positive_int, default=64, metavar="N", help="tokens of each prompt; 64")
    parser.add_argument("--output-len", type=positive_int, default=64, metavar="N", help="tokens that follow each; 64")
    add_engine_options(parser, omit=(*OMITTED_ENGINE_OPTIONS, *MODE_OPTIONS, "enable_prefix_caching"))


def _configure_sharing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-requests", type=positive_int, default=32, metavar="N", help="searched with beams; 32")
    parser.add_argument("--num-sampled", type=positive_int, default=256, metavar="N", help="with several samples; 256")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of lengths and tokens (default: 0)")
    add_engine_options(parser, omit=(*OMITTED_ENGINE_OPTIONS, "enable_prefix_caching"))


def _configure_grammar(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch-size", type=positive_int, default=16, metavar="N", help="sequences (default: 16)")
    parser.add_argument("--prompt-len", type=positive_int, default=128, metavar="N", help="tokens of each; 128")
    parser.add_argument("--steps", type=positive_int, default=64, metavar="N", help="timed in a round (default: 64)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X", help="(default: 0)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="X", help="below 1 every mask is made (default: 1)")
    add_engine_options(parser, omit=OMITTED_ENGINE_OPTIONS)


def _configure_roofline(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", action="append", choices=FORMATS, help="of weights; repeatable (default: all)")
    parser.add_argument("--num-threads", type=positive_int, default=1, metavar="N", help="(default: 1)")
    parser.add_argument("--rows", type=positive_ints, default=[1, 8, 32, 64, 256], metavar="N,N,...", help="of x")
    parser.add_argument("--step", action="store_true", help="take a model's decode step apart instead (options below)")
    parser.add_argument(
        "--batch-size", type=positive_ints, default=[1, 32], metavar="N,N,...", help="of the step (default: 1,32)"
    )
    parser.add_argument("--context", type=positive_int, default=256, metavar="N", help="tokens a sequence has; 256")
    add_engine_options(parser, omit=(*OMITTED_ENGINE_OPTIONS, "num_threads"))


def _configure_kernels(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch-size", type=positive_ints, default=[1, 32], metavar="N,N,...", help="sequences that decode (1,32)"
    )
    parser.add_argument("--context", type=positive_int, default=512, metavar="N", help="tokens of each; 512")
    parser.add_argument("--prompt-len", type=positive_int, default=512, metavar="N", help="of the prefill; 512")
    parser.add_argument("--repetitions", type=positive_int, default=20, metavar="N", help="in one recording; 20")
    add_engine_options(parser, omit=OMITTED_ENGINE_OPTIONS)


def _configure_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="KIND=PROGRAM[:MODEL][,OPTION=VALUE...]",
        help="llamacpp, onnxruntime, openvino, transformers or vllm, the Python that has it, its model; repeatable",
    )
    parser.add_argument("--model", default=EngineConfig.model, metavar="NAME", help="also of a peer that names none")
    parser.add_argument(
        "--mode", action="append", metavar="MODE", help="ours: DEVICE[:DTYPE][:QUANTIZATION][:kv=DTYPE]; cpu:int8"
    )
    parser.add_argument("--metric", action="append", choices=METRICS, help="only this one; repeatable (default: all)")
    parser.add_argument("--rounds", type=positive_int, default=5, metavar="N", help="after one not counted; 5")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of lengths and tokens (default: 0)")
    parser.add_argument("--num-threads", type=positive_int, metavar="N", help="of every engine (default: all cores)")
    parser.add_argument("--timeout", type=positive_int, default=600, metavar="S", help="of one answer, seconds; 600")
    parser.add_argument("--max-seconds", type=positive_int, metavar="S", help="begin no further round after so long")


def _add_workload_options(parser: argparse.ArgumentParser, num_requests: int) -> None:
    group = parser.add_argument_group("workload")
    group.add_argument(
        "--distribution",
        choices=DISTRIBUTIONS,
        default="conversation",
        help="lengths: like ShareGPT's, like Alpaca's, 1 to twice the mean, or all the same (default: conversation)",
    )
    group.add_argument(
        "--num-requests", type=positive_int, default=num_requests, metavar="N", help=f"(default: {num_requests})"
    )
    group.add_argument("--input-len", type=positive_int, default=128, metavar="N", help="(mean) prompt tokens; 128")
    group.add_argument("--output-len", type=positive_int, default=128, metavar="N", help="(mean) output tokens; 128")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of lengths and tokens (default: 0)")


def run(args: argparse.Namespace) -> None:
    text, result = args.measure(args)
    if args.json == "-":
        write(json.dumps(result, indent=1) + "\n")
        return
    write(text + "\n")
    if args.json:
        from minipaged.bench.workload import write_json

        write_json(result, args.json)
