"""How cost grows: decode speed by the number of users at one context, and by context at some numbers of users.

Tokens/s should rise with users until arithmetic is the limit, and fall with the context as its KV is
read. A point that would not fit the KV pool is left out, and said so.
"""

from __future__ import annotations

import random

from minipaged.bench.latency import check_fits, decode_steps
from minipaged.bench.summary import median
from minipaged.cli.terminal import table
from minipaged.engine import Engine
from minipaged.errors import ConfigError, MinipagedError


def measure(
    engine: Engine, *, users: list[int], at_context: int, contexts: list[int], at_users: list[int],
    num_steps: int = 8, rounds: int = 3, progress=None,
) -> dict:  # fmt: skip
    """Median tokens/s of decode steps: ``users`` at ``at_context``, and ``contexts`` at each of ``at_users``.

    The points are measured ``rounds`` times, in turn, so that a slow minute of the machine does not look
    like a slow point.
    """
    points = [(count, at_context) for count in users]
    points += [(count, context) for count in at_users for context in contexts]
    points = list(dict.fromkeys(points))
    steps: dict[tuple[int, int], list[float]] = {}
    left_out = {}
    for number in range(rounds):
        for point in points:
            count, context = point
            if point in left_out:
                continue
            try:
                check_fits(engine, context, num_steps, count)
            except MinipagedError as error:
                left_out[point] = str(error)
                continue
            rng = random.Random(number)
            steps.setdefault(point, []).append(median(decode_steps(engine, context, num_steps, count, rng)))
        if progress:
            progress(f"round {number + 1} of {rounds} done")
    found = [
        {
            "users": count,
            "context": context,
            "step": median(times),
            "tokens_per_second": count / median(times),
            "rounds": [count / seconds for seconds in times],
        }
        for (count, context), times in steps.items()
    ]
    missing = [{"users": count, "context": context, "why": why} for (count, context), why in left_out.items()]
    return {
        "at_context": at_context, "at_users": at_users, "num_steps": num_steps, "rounds": rounds,
        "points": found, "left_out": missing,
    }  # fmt: skip


def merge(result: dict, context: dict, earlier: dict) -> dict:
    """``result`` with the points that it lacks and ``earlier`` has, which is what ``--json`` wrote of another run.

    ``context`` is what the report says about the engine (:func:`minipaged.bench.report.context`).

    Raises:
        ConfigError: ``earlier`` is no result of this measurement, or was made of something else.
    """
    if earlier.get("bench") != "scaling":
        raise ConfigError("--with needs a file that `bench scaling --json` wrote.")
    for key in ("model", "device", "dtype", "kv_cache_dtype", "threads", "cpu"):
        if earlier["context"][key] != context[key]:
            raise ConfigError(f"--with has {key} {earlier['context'][key]!r}, this run {context[key]!r}.")
    if earlier["at_context"] != result["at_context"]:
        raise ConfigError(f"--with has users at {earlier['at_context']} tokens, this run at {result['at_context']}.")
    known = {(point["users"], point["context"]) for point in result["points"]}
    points = [point for point in earlier["points"] if (point["users"], point["context"]) not in known]
    return result | {
        "at_users": sorted({*result["at_users"], *earlier["at_users"]}),
        "rounds": min(result["rounds"], earlier["rounds"]),
        "num_steps": min(result["num_steps"], earlier["num_steps"]),
        "points": result["points"] + points,
        "left_out": result["left_out"] + earlier["left_out"],
    }


def series(result: dict) -> dict[str, list[tuple[int, float]]]:
    """The curves: title -> (users or context, tokens/s), in ascending order."""
    users = [(p["users"], p["tokens_per_second"]) for p in result["points"] if p["context"] == result["at_context"]]
    curves = {f"users, {result['at_context']} tokens of context": sorted(users)}
    for count in result["at_users"]:
        points = [(p["context"], p["tokens_per_second"]) for p in result["points"] if p["users"] == count]
        curves[f"context, {count} user{'s' if count > 1 else ''}"] = sorted(points)
    return curves


def text(result: dict) -> str:
    """A table for each curve."""
    parts = []
    for title, points in series(result).items():
        rows = [[x, f"{speed:.1f}"] for x, speed in points]
        parts.append(table([title, "tokens/s"], rows, right=(0, 1)))
    for point in result["left_out"]:
        parts.append(f"left out: {point['users']} users at {point['context']} tokens: {point['why']}")
    title = f"medians of {result['rounds']} round(s), each the median of {result['num_steps']} steps"
    return title + "\n\n" + "\n\n".join(parts)


def plot(result: dict, path: str, title: str) -> None:
    """Draw the curves to ``path`` (its ending decides: .svg, .png). Needs matplotlib (extra ``view``).

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("--plot needs matplotlib; install it with `pip install minipaged[view]`.") from None
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    curves = list(series(result).items())
    for axes, some, label in ((left, curves[:1], "users"), (right, curves[1:], "tokens of context")):
        for name, points in some:
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
        axes.set(xscale="log", xlabel=label, ylabel="tokens/s", ylim=(0, None))
        ticks = sorted({x for _, points in some for x, _ in points})
        axes.set_xticks(ticks, map(str, ticks))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    figure.savefig(path)
