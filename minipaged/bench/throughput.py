"""How many tokens a second an engine makes of a trace, and what a scheduling policy changes.

All requests arrive at once, are greedy and ignore end-of-sequence, so every policy computes the same
number of tokens. Policies are compared on one engine: same weights, same KV pool, same trace; only
the scheduler is exchanged, and the rounds are interleaved so that a slow moment of the machine
touches both.
"""

from __future__ import annotations

import time

from minipaged.bench.summary import median, summary
from minipaged.bench.workload import Workload
from minipaged.config import SamplingParams
from minipaged.engine import Engine

WARM_UP_TOKENS = 4


def measure(engine: Engine, workload: Workload, policies: list[str], rounds: int = 1, progress=None) -> dict:
    """Run the trace ``rounds`` times under each policy, in turn.

    ``progress(policy, round, result)`` is called after each run. Returns ``{"workload", "policies":
    {policy: {"runs": [...], "median": {...}}}}``, for two policies also ``"ratio"`` (tokens/s of the
    first over the second); see :func:`run_trace` for the numbers of a run.
    """
    _warm_up(engine, workload)
    runs: dict[str, list[dict]] = {policy: [] for policy in policies}
    for number in range(1, rounds + 1):
        for policy in policies:
            result = run_trace(engine, workload, policy)
            runs[policy].append(result)
            if progress:
                progress(policy, number, result)
    result = {
        "workload": workload.description,
        "num_requests": len(workload.requests),
        "rounds": rounds,
        "policies": {policy: {"runs": r, "median": _median_run(r)} for policy, r in runs.items()},
    }
    if len(policies) == 2:
        result["ratio"] = _ratio(runs, *policies)
    return result


def run_trace(engine: Engine, workload: Workload, policy: str) -> dict:
    """Run the trace once on an empty pool under ``policy``.

    Times are seconds; ``ttft`` is the time from arrival to the first token. ``block_use`` is the mean
    share of the pool's blocks in use, over steps; ``running`` the mean number of sequences in a step.
    """
    engine.use_policy(policy)
    pool = engine.scheduler.pool
    used, running, outputs = [], [], []
    started = time.perf_counter()
    for request in workload.requests:
        params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=request.max_tokens)
        engine.add_request(request.prompt, params)
    while engine.has_unfinished():
        outputs += engine.step()
        used.append(pool.num_blocks - pool.num_free)
        running.append(len(engine.scheduler.running))
    wall = time.perf_counter() - started
    prompt_tokens = sum(len(o.prompt_token_ids) for o in outputs)
    generated = sum(len(o.outputs[0].token_ids) for o in outputs)
    return {
        "policy": policy,
        "wall": wall,
        "prompt_tokens": prompt_tokens,
        "generated_tokens": generated,
        "generated_per_second": generated / wall,
        "tokens_per_second": (prompt_tokens + generated) / wall,
        "ttft": summary([o.metrics.time_to_first_token for o in outputs]),
        "steps": len(used),
        "running": sum(running) / len(running),
        "block_use": sum(used) / len(used) / pool.num_blocks,
        "block_use_peak": max(used) / pool.num_blocks,
        "preemptions": engine.scheduler.num_preemptions,
        "cached_prompt_tokens": sum(o.num_cached_tokens for o in outputs),
    }


def _warm_up(engine: Engine, workload: Workload) -> None:
    """A few tokens of the first request, so that nobody pays for first touches of memory."""
    first = workload.requests[0]
    tokens = min(WARM_UP_TOKENS, first.max_tokens)
    engine.add_request(first.prompt, SamplingParams(temperature=0, ignore_eos=True, max_tokens=tokens))
    while engine.has_unfinished():
        engine.step()


def _median_run(runs: list[dict]) -> dict:
    """The median of each number over the runs (of TTFT: of its median and its p99)."""
    result = {key: median([run[key] for run in runs]) for key in runs[0] if key not in ("policy", "ttft")}
    result["ttft"] = {key: median([run["ttft"][key] for run in runs]) for key in ("median", "p99")}
    return result


def _ratio(runs: dict[str, list[dict]], first: str, second: str) -> dict:
    """Tokens/s of the first policy over the second's, in each round and the median of those."""
    ratios = [
        a["generated_per_second"] / b["generated_per_second"] for a, b in zip(runs[first], runs[second], strict=True)
    ]
    return {"of": first, "to": second, "rounds": ratios, "median": median(ratios)}
