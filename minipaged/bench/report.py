"""Results in words: what was measured, on what, in tables; and the context that every number needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from minipaged import __version__
from minipaged.bench import machine
from minipaged.cli.terminal import fields, human_bytes, human_count, table

if TYPE_CHECKING:  # the memory report needs no engine
    from minipaged.engine import Engine


def context(engine: Engine) -> dict:
    """What a number depends on: model, precision, device, threads, machine, limits."""
    stats = engine.stats()
    limits = engine.scheduler.config
    cpu = machine.cpu()
    return {
        "minipaged": __version__,
        "model": engine.config.model,
        "architecture": engine.model.config.architecture,
        "device": engine.backend.name,
        "dtype": precision(engine),
        "kv_cache_dtype": engine.formats.kv_cache,
        "weight_bytes": stats.weight_bytes,
        "threads": num_threads(engine),
        "cpu": cpu["model"],
        "cpu_features": [name for name, has in cpu["features"].items() if has],
        "cores": machine.cores(),
        "numpy": machine.package_version("numpy"),
        "blas": machine.blas(),
        "block_size": limits.block_size,
        "num_blocks": limits.num_blocks,
        "kv_cache_bytes": stats.kv_cache_bytes,
        "max_model_len": limits.max_model_len,
        "max_num_seqs": limits.max_num_seqs,
        "max_num_batched_tokens": limits.max_num_batched_tokens,
        "enable_prefix_caching": engine.config.enable_prefix_caching,
    }


def precision(engine: Engine) -> str:
    """The format that the weights are kept in."""
    return engine.formats.weights


def num_threads(engine: Engine) -> int:
    """Threads that compute: BLAS's, which follow the option ``num_threads``; else the usable cores."""
    return machine.blas_threads() or machine.cores()["usable"]


def context_text(found: dict) -> str:
    pool_size = human_bytes(found["kv_cache_bytes"])
    return fields(
        [
            ("model", f"{found['model']} ({found['architecture']}), weights {human_bytes(found['weight_bytes'])}"),
            ("precision", f"{found['dtype']}, KV cache {found['kv_cache_dtype']}"),
            ("device", f"{found['device']}, {found['threads']} threads on {found['cpu']}"),
            ("KV pool", f"{found['num_blocks']} blocks of {found['block_size']} tokens, {pool_size}"),
            (
                "limits",
                f"max_model_len {found['max_model_len']}, max_num_seqs {found['max_num_seqs']}, "
                f"max_num_batched_tokens {found['max_num_batched_tokens']}",
            ),
        ]
    )


def throughput_text(result: dict) -> str:
    """One column a policy (medians over the rounds), and the ratio if there are two."""
    policies = result["policies"]
    medians = [policies[name]["median"] for name in policies]
    lines = [
        ("generated tokens/s", lambda m: f"{m['generated_per_second']:.1f}"),
        ("total tokens/s", lambda m: f"{m['tokens_per_second']:.1f}"),
        ("wall time", lambda m: f"{m['wall']:.2f} s"),
        ("prompt tokens", lambda m: human_count(m["prompt_tokens"])),
        ("generated tokens", lambda m: human_count(m["generated_tokens"])),
        ("TTFT, median", lambda m: f"{m['ttft']['median']:.3f} s"),
        ("TTFT, p99", lambda m: f"{m['ttft']['p99']:.3f} s"),
        ("steps", lambda m: f"{m['steps']:.0f}"),
        ("sequences a step, mean", lambda m: f"{m['running']:.1f}"),
        ("pool in use, mean", lambda m: f"{m['block_use']:.1%}"),
        ("pool in use, peak", lambda m: f"{m['block_use_peak']:.1%}"),
        ("preemptions", lambda m: f"{m['preemptions']:.0f}"),
    ]
    rows = [[name, *(show(m) for m in medians)] for name, show in lines]
    text = f"workload: {result['workload']}, all arriving at once; median of {result['rounds']} round(s)\n\n"
    text += table(["", *policies], rows, right=tuple(range(1, len(policies) + 1)))
    if "ratio" in result:
        ratio = result["ratio"]
        text += (
            f"\n\n{ratio['of']} makes {ratio['median']:.2f}x the tokens/s of {ratio['to']} "
            f"(per round: {', '.join(f'{value:.2f}' for value in ratio['rounds'])})"
        )
    return text


def latency_text(result: dict) -> str:
    rows = [
        [
            batch["batch_size"],
            f"{batch['step']['median'] * 1e3:.2f}",
            f"{batch['tokens_per_second']:.1f}",
            f"{batch['floor'] * 1e3:.2f}",
            f"{batch['share_of_floor']:.0%}",
        ]
        for batch in result["decode"]
    ]
    lines = [f"TTFT at {result['prompt_len']} prompt tokens: {_times(result['ttft'], result['repetitions'])}"]
    if result["ttft_of_choices"]:
        ratio = result["ttft_of_choices"]["median"] / result["ttft"]["median"]
        times = _times(result["ttft_of_choices"], result["repetitions"])
        lines.append(f"the same for {result['num_choices']} choices of a prompt: {times}, {ratio:.2f}x")
    return (
        "\n".join(lines) + "\n"
        f"memory read bandwidth: {result['read_bandwidth'] / 1e9:.1f} GB/s\n\n"
        + table(
            ["batch size", "ms/step", "tokens/s", "floor, ms/step", "floor / measured"], rows, right=(0, 1, 2, 3, 4)
        )
        + "\n\nfloor: reading all weights and the batch's KV once at the measured bandwidth; 100% is the best possible."
    )


def _times(seconds: dict, repetitions: int) -> str:
    low, middle, high = (seconds[name] * 1e3 for name in ("min", "median", "max"))
    return f"{middle:.1f} ms (median of {repetitions}; {low:.1f} to {high:.1f})"


def memory_text(result: dict, definition: str) -> str:
    rows = [
        [
            name,
            f"{result[name]['waste']:.1%}",
            f"{result[name]['waste_later']:.1%}",
            f"{result[name]['waste_never']:.1%}",
            f"{result[name]['mean_running']:.1f}",
            result[name]["steps"],
        ]
        for name in ("paged", "contiguous")
    ]
    return (
        f"{result['num_requests']} requests, {result['distribution']} lengths (mean {result['mean_prompt_len']:.0f} + "
        f"{result['mean_output_len']:.0f} tokens), seed {result['seed']}\n"
        f"pool of {result['num_blocks']} blocks of {result['block_size']} tokens, "
        f"max_model_len {result['max_model_len']}\n\n"
        + table(["reservation", "waste", "later", "never", "sequences a step", "steps"], rows, right=(1, 2, 3, 4, 5))
        + "\n\n"
        + definition
    )


def quality_text(result: dict) -> str:
    """One row a mode."""
    rows = [
        [
            mode["mode"],
            mode["device"],
            human_bytes(mode["weight_bytes"]),
            f"{mode['loss']:.4f}",
            f"{mode['perplexity']:.3f}",
            f"{mode['ratio']:.4f}",
            f"{mode['prefix']:.1%}",
            f"{mode['argmax']:.1%}",
        ]
        for mode in result["modes"]
    ]
    headers = ["mode", "device", "weights", "loss", "perplexity", "ratio", "same prefix", "same argmax"]
    return (
        f"{result['tokens']} tokens of text in windows of {result['window']}, {result['tokens_scored']} scored; "
        f"{result['num_prompts']} prompts of {result['prompt_len']} tokens, continued by {result['output_len']}\n\n"
        + table(headers, rows, right=tuple(range(2, len(headers))))
        + "\n\nloss: nats a token; ratio: of perplexity, to the first mode's"
        "\nsame prefix: greedy tokens before the first difference from the first mode's"
        "\nsame argmax: greedy tokens equal to the first mode's, given the same context"
    )


def sharing_text(result: dict) -> str:
    """One row for each distribution, method and width, beside the paper's number."""
    rows = [
        [
            f"{row['distribution']} ({row['mean_prompt_len']:.0f} + {row['mean_output_len']:.0f})",
            row["num_requests"],
            row["method"],
            row["width"],
            f"{row['mean_blocks_unshared']:.1f}",
            f"{row['mean_blocks']:.1f}",
            f"{row['saved']:.1%}",
            "" if row["paper"] is None else f"{row['paper']:.1%}",
        ]
        for row in result["rows"]
    ]
    headers = ["lengths", "requests", "method", "width", "blocks, unshared", "blocks", "saved", "paper"]
    prefix = result["prefix"]
    return (
        f"random prompts, seed {result['seed']}; blocks are means over steps\n\n"
        + table(headers, rows, right=(1, 3, 4, 5, 6, 7))
        + f"\n\n{prefix['num_requests']} requests that begin with the same {prefix['prefix_len']} tokens: "
        f"{prefix['hit_rate']:.1%} of the prompt tokens came from the prefix cache, "
        f"{prefix['saved']:.1%} of the blocks were saved"
    )


def grammar_text(result: dict) -> str:
    """One row for each of the two batches, and the cost."""
    rows = [
        [title, *(f"{result[name][key] * 1e3:.2f}" for key in ("step", "sampling", "telling"))]
        for title, name in (("free", "free"), ("JSON schema", "grammar"))
    ]
    top_p = "" if result["top_p"] == 1 else f", top_p {result['top_p']:g}"
    return (
        f"{result['batch_size']} sequences, prompts of {result['prompt_len']} tokens, temperature "
        f"{result['temperature']:g}{top_p}; means of {result['steps_timed']} decode steps, of each the median of "
        f"{result['rounds']} rounds, the two batches in turn\n\n"
        + table(["", "step, ms", "of it sampling", "telling the grammar"], rows, right=(1, 2, 3))
        + f"\n\nmasking costs {result['cost'] * 1e3:.2f} ms, {result['share_of_step']:.1%} of a step without it "
        f"(whole steps took {result['longer']:+.1%})"
    )


def compare_text(result: dict) -> str:
    """Every engine's medians; then a row for each of our modes, metric and peer, won or lost."""
    metrics = result["metrics"]
    engines = [
        [
            name,
            *(f"{engine['metrics'][m['name']]['median']:.1f}" for m in metrics),
            human_bytes(engine["peak_rss"]) if engine["peak_rss"] else "unknown",
            engine["about"]["version"],
        ]
        for name, engine in result["engines"].items()
    ]
    headers = ["engine", *(f"{m['title']}, {m['unit']}" for m in metrics), "peak memory", "version"]
    units = {m["name"]: m for m in metrics}
    ratios = [
        [
            units[row["metric"]]["title"],
            row["engine"],
            row["peer"],
            f"{row['ratio']:.2f}x" + ("" if row["ratio"] >= 1 else "  lost"),
            f"{min(row['rounds']):.2f} to {max(row['rounds']):.2f}",
            f"{row['ratio_at_floor']:.2f}x",
            f"{row['share_of_floor']:.0%}",
        ]
        for row in result["ratios"]
    ]
    rates = "\n".join(
        f"{format}: {rate['bytes'] / 1e9:.1f} GB/s, {rate['operations'] / 1e9:.0f} billion operations/s "
        f"(attention {rate['attention_operations'] / 1e9:.0f})"
        for format, rate in result["rates"].items()
    )
    text = f"medians of {result['rounds']} rounds, engines in turn, {result['num_threads']} threads\n\n"
    text += table(headers, engines, right=tuple(range(1, len(metrics) + 2)))
    if ratios:
        headers = ["metric", "ours", "peer", "ratio", "in rounds", "at the floor", "floor / ours"]
        text += "\n\n" + table(headers, ratios, right=(4, 5, 6))
        text += "\n\nratio: above 1, ours is faster; at the floor: what it would be if ours took its floor"
    return text + f"\nmeasured in the same rounds, for the floors:\n{rates}"


def roofline_text(result: dict) -> str:
    """The table of ``bench roofline``."""
    lines = [
        f"{result['num_threads']} thread(s), {result['level']} instructions, "
        f"memory read at {result['bandwidth'] / 1e9:.1f} GB/s",
        "products [M, 576] x [576, 1536], weights not in a cache: billions of operations a second (share of the floor)",
    ]
    for name, found in result["formats"].items():
        cells = "  ".join(
            f"M={p['rows']} {p['rate'] / 1e9:.0f} ({p['percent_of_floor']:.0f}%)" for p in found["products"]
        )
        lines.append(f"{name:9} peak {found['peak'] / 1e9:4.0f} | {cells}")
    return "\n".join(lines)
