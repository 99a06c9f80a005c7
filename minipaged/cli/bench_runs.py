"""What each ``minipaged bench`` measures: from parsed arguments to a table and the same as data.

Every function returns ``(text, result)``; the options are those of :mod:`minipaged.cli.bench`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from minipaged.bench.modes import MODE_OPTIONS
from minipaged.cli.options import given
from minipaged.cli.terminal import note
from minipaged.config import EngineConfig

OMITTED_ENGINE_OPTIONS = ("seed",)  # --seed is the workload's here; nothing is sampled at random
SCHEDULER_OPTIONS = ("block_size", "num_blocks", "max_model_len", "max_num_seqs", "max_num_batched_tokens")
FORMATS = ("float32", "bfloat16", "int8", "int4")
METRICS = ("ttft", "decode", "prefill", "users")


def _engine(args: argparse.Namespace, **defaults):
    """An engine by the arguments, ``defaults`` where they say nothing, and what its numbers depend on."""
    from minipaged.bench import report
    from minipaged.engine import Engine

    engine = Engine(EngineConfig(**defaults | given(args, EngineConfig, omit=OMITTED_ENGINE_OPTIONS)))
    return engine, report.context(engine)


def _report(name: str, context: dict, result: dict, table: str) -> tuple[str, dict]:
    from minipaged.bench import report

    return f"{report.context_text(context)}\n{table}", {"bench": name, "context": context, **result}


def throughput(args: argparse.Namespace) -> tuple[str, dict]:
    from minipaged.bench import report, throughput, workload

    trace = workload.load_workload(args.workload) if args.workload else None
    engine, context = _engine(args)
    if trace is None:
        trace = workload.make_workload(
            args.distribution,
            args.num_requests,
            args.seed,
            vocab_size=engine.model.config.vocab_size,
            max_model_len=engine.max_model_len,
            input_len=args.input_len,
            output_len=args.output_len,
        )
    if args.save_workload:
        workload.save_workload(trace, args.save_workload)
    policies = list(dict.fromkeys([engine.config.policy, *([args.compare] if args.compare else [])]))
    rounds = args.rounds or (3 if len(policies) > 1 else 1)
    result = throughput.measure(engine, trace, policies, rounds, progress=_note_run)
    return _report("throughput", context, result, report.throughput_text(result))


def _note_run(policy: str, number: int, result: dict) -> None:
    note(f"round {number}, {policy}: {result['generated_per_second']:.1f} generated tokens/s in {result['wall']:.1f} s")


def latency(args: argparse.Namespace) -> tuple[str, dict]:
    from minipaged.bench import latency, report

    engine, context = _engine(args)
    result = latency.measure(
        engine,
        prompt_len=args.prompt_len,
        num_steps=args.steps,
        batch_sizes=args.batch_size,
        repetitions=args.repetitions,
        num_threads=report.num_threads(engine),
        num_choices=args.n,
        progress=note,
    )
    return _report("latency", context, result, report.latency_text(result))


def scaling(args: argparse.Namespace) -> tuple[str, dict]:
    from minipaged.bench import scaling

    engine, context = _engine(args, max_num_seqs=max(*args.users, *args.at_users))
    result = scaling.measure(
        engine,
        users=args.users,
        at_context=args.at_context,
        contexts=args.contexts,
        at_users=args.at_users,
        num_steps=args.steps,
        rounds=args.rounds,
        progress=note,
    )
    if args.earlier:
        from minipaged.model.json_file import read_object

        result = scaling.merge(result, context, read_object(Path(args.earlier)))
    if args.plot:
        title = f"{context['model']}, {context['dtype']}, {context['device']}, {context['threads']} threads"
        scaling.plot(result, args.plot, title)
    return _report("scaling", context, result, scaling.text(result))


def grammar(args: argparse.Namespace) -> tuple[str, dict]:
    from minipaged.bench import grammar, report

    engine, context = _engine(args)
    result = grammar.measure(
        engine,
        batch_size=args.batch_size,
        prompt_len=args.prompt_len,
        num_steps=args.steps,
        temperature=args.temperature,
        top_p=args.top_p,
    )
    return _report("grammar", context, result, report.grammar_text(result))


def sharing(args: argparse.Namespace) -> tuple[str, dict]:
    from minipaged.bench import report, sharing

    engine, context = _engine(args)
    counts = {"num_requests": args.num_requests, "num_sampled": args.num_sampled}
    result = sharing.measure(engine, **counts, seed=args.seed, progress=note)
    return _report("sharing", context, result, report.sharing_text(result))


def memory(args: argparse.Namespace) -> tuple[str, dict]:
    from minipaged.bench import memory, report

    limits = {name: getattr(args, name) for name in SCHEDULER_OPTIONS}
    EngineConfig(**limits)  # refuses bad values with the same words as the engine
    result = memory.measure(
        distribution=args.distribution,
        num_requests=args.num_requests,
        seed=args.seed,
        input_len=args.input_len,
        output_len=args.output_len,
        **limits,
    )
    return report.memory_text(result, memory.DEFINITION), {"bench": "memory", "definition": memory.DEFINITION, **result}


def compare(args: argparse.Namespace) -> tuple[str, dict]:
    from minipaged.bench import machine, report
    from minipaged.bench.compare import measure, peers, trace
    from minipaged.bench.modes import check_modes
    from minipaged.ops.cpu.team import default_num_threads

    modes = args.mode or ["cpu:int8"]
    check_modes(modes)
    specs = [peers.parse_peer(text, args.model) for text in args.peer]
    result = measure.measure(
        [peers.own_spec(args.model, mode) for mode in modes],
        specs,
        metrics=tuple(metric for metric in trace.METRICS if metric.name in (args.metric or METRICS)),
        rounds=args.rounds,
        seed=args.seed,
        num_threads=args.num_threads or default_num_threads(),
        timeout=args.timeout,
        max_seconds=args.max_seconds or float("inf"),
        progress=note,
    )
    result = {"bench": "compare", "model": args.model, "cpu": machine.cpu()["model"], **result}
    return f"model  {args.model}\ncpu    {result['cpu']}\n" + report.compare_text(result), result


def kernels(args: argparse.Namespace) -> tuple[str, dict]:
    from minipaged.bench import kernels

    engine, context = _engine(args, device="cuda")
    result = kernels.measure(engine, args.batch_size, args.context, args.prompt_len, args.repetitions, progress=note)
    return _report("kernels", context, result, kernels.text(result))


def roofline(args: argparse.Namespace) -> tuple[str, dict]:
    from minipaged.bench.report import roofline_text
    from minipaged.bench.roofline import measure

    if args.step:
        return step_roofline(args)
    result = measure(args.format or list(FORMATS), args.rows, args.num_threads)
    return roofline_text(result), result


def step_roofline(args: argparse.Namespace) -> tuple[str, dict]:
    from minipaged.bench import step_roofline

    engine, context = _engine(args)
    result = step_roofline.measure(engine, args.batch_size, args.context, progress=note)
    return _report("roofline --step", context, result, step_roofline.text(result))


def quality(args: argparse.Namespace) -> tuple[str, dict]:
    from minipaged.bench import quality, report

    result = quality.measure(
        args.mode,
        quality.read_text(args.text),
        window=args.window,
        max_tokens=args.max_tokens,
        num_prompts=args.num_prompts,
        prompt_len=args.prompt_len,
        output_len=args.output_len,
        progress=note,
        **given(args, EngineConfig, omit=MODE_OPTIONS),
    )
    model = getattr(args, "model", EngineConfig.model)
    return f"model  {model}\n" + report.quality_text(result), {"bench": "quality", "model": model, **result}
