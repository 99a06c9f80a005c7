"""Rounds in which every engine does the same work in turn, and the ratios of their medians."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from contextlib import ExitStack

from minipaged.bench.compare.floors import Rates, measure_rates, run_floor
from minipaged.bench.compare.peers import Peer, PeerSpec
from minipaged.bench.compare.trace import METRICS, Metric, Timing, draw_lengths, draw_requests, limits
from minipaged.bench.summary import median, summary
from minipaged.errors import ConfigError

PAUSE = 0.3  # seconds before a run, in which the threads of the engine before it go to sleep


def measure(
    ours: list[PeerSpec],
    peers: list[PeerSpec],
    *,
    metrics: tuple[Metric, ...] = METRICS,
    rounds: int = 5,
    seed: int = 0,
    num_threads: int,
    timeout: float = 600.0,
    max_seconds: float = math.inf,
    progress: Callable[[str], None] | None = None,
) -> dict:
    """Run every metric ``rounds`` times on every engine, after a round that is not counted.

    In a round, each metric goes through all engines before the next metric begins, so that a slow
    moment of the machine touches all of them; who begins changes from round to round. The machine's
    own rates are measured in each round too. After ``max_seconds`` no further round begins, but one is
    always counted; ``"rounds"`` tells how many were.

    Returns ``{"engines": {name: {"about", "peak_rss", "metrics": {metric: summary}}}, "rates",
    "floors": {our name: {metric: value at the floor}}, "ratios": [...]}``.

    Raises :class:`ConfigError` if two engines share a name,
    :class:`~minipaged.errors.BackendUnavailableError` if one cannot be started, and
    :class:`~minipaged.errors.BenchmarkError` if one fails later or does other work than was asked for.
    """
    names = [spec.name for spec in [*ours, *peers]]
    if len(set(names)) < len(names):
        raise ConfigError(f"engines {', '.join(names)} share a name; tell peers apart with name=...")
    report = progress or (lambda line: None)
    lengths = {metric.name: draw_lengths(metric, seed) for metric in metrics}
    room = limits(list(lengths.values()), num_threads)
    rng = random.Random(seed)
    began = time.monotonic()
    with ExitStack() as stack:
        engines = []
        for spec in [*ours, *peers]:
            report(f"loading {spec.name}")
            engines.append(stack.enter_context(Peer(spec, room, timeout)))
        vocab_size = min(engine.about.get("vocab_size", 1 << 31) for engine in engines)
        formats = sorted({engine.about["weights"] for engine in engines[: len(ours)]})
        timings: dict[tuple[str, str], list[Timing]] = {}
        rates: dict[str, list[Rates]] = {format: [] for format in formats}
        for number in range(rounds + 1):
            counted = number > 0
            if number > 1 and time.monotonic() - began > max_seconds:
                rounds = number - 1
                report(f"{max_seconds:.0f} s have passed: {rounds} round(s) count")
                break
            for format in formats if counted else ():
                rates[format].append(measure_rates(format, num_threads))
            for metric in metrics:
                first = number % len(engines)
                for engine in engines[first:] + engines[:first]:
                    time.sleep(PAUSE)
                    timing = engine.run(draw_requests(lengths[metric.name], vocab_size, rng))
                    if counted:
                        timings.setdefault((engine.spec.name, metric.name), []).append(timing)
            report(f"round {number} of {rounds} done" if counted else "warmed up")
        results = {
            engine.spec.name: {
                "kind": engine.spec.kind,
                "model": engine.spec.model,
                "options": engine.spec.options,
                "about": engine.about,
                "peak_rss": engine.peak_rss(),
                "metrics": {
                    metric.name: summary([metric.value(t) for t in timings[engine.spec.name, metric.name]])
                    for metric in metrics
                },
            }
            for engine in engines
        }
    middle = {format: _median_rates(found) for format, found in rates.items()}
    abouts = {spec.name: results[spec.name]["about"] for spec in ours}
    floors = {name: _floors(metrics, lengths, about, middle[about["weights"]]) for name, about in abouts.items()}
    return {
        "rounds": rounds,
        "seed": seed,
        "num_threads": num_threads,
        "metrics": [
            {"name": m.name, "title": m.title, "unit": m.unit, "higher_is_better": m.higher_is_better} for m in metrics
        ],
        "engines": results,
        "rates": {format: vars(rate) for format, rate in middle.items()},
        "floors": floors,
        "ratios": [
            _ratio(metric, us.name, peer.name, results, floors) for metric in metrics for us in ours for peer in peers
        ],
    }


def _median_rates(found: list[Rates]) -> Rates:
    return Rates(*(median([getattr(rate, name) for rate in found]) for name in Rates.__dataclass_fields__))


def _floors(metrics: tuple[Metric, ...], lengths: dict, facts: dict, rates: Rates) -> dict[str, float]:
    """The value of each metric if its run took no longer than its floor."""
    floors = {}
    for metric in metrics:
        total = run_floor(lengths[metric.name], facts, rates)
        decoding = run_floor(lengths[metric.name], facts, rates, prompts=False)
        generated = sum(output for _, output in lengths[metric.name])
        floors[metric.name] = metric.value(Timing(total, total - decoding, generated))
    return floors


def _ratio(metric: Metric, us: str, peer: str, results: dict, floors: dict) -> dict:
    """Ours to the peer's, of medians and in each round; above 1 we are faster, whatever the unit."""

    def faster(a: float, b: float) -> float:
        return a / b if metric.higher_is_better else b / a

    our, their = results[us]["metrics"][metric.name], results[peer]["metrics"][metric.name]
    return {
        "metric": metric.name,
        "engine": us,
        "peer": peer,
        "value": our["median"],
        "peer_value": their["median"],
        "ratio": faster(our["median"], their["median"]),
        "rounds": [faster(a, b) for a, b in zip(our["values"], their["values"], strict=True)],
        "ratio_at_floor": faster(floors[us][metric.name], their["median"]),
        "share_of_floor": faster(our["median"], floors[us][metric.name]),
    }
