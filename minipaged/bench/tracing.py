"""What recording a trace adds to a decode step: windows of steps with and without it, in turn, in the same runs.

The cost is the time spent in the recorder, while the step is waiting for it, as a share of the recorded steps. The
ratio of neighbouring windows with and without recording stands beside it: it would show what recording costs
elsewhere (caches), but only if that is more than the machine's own unrest. Starting and stopping is not timed.
"""

from __future__ import annotations

import json
import random
import time

from minipaged.bench.latency import check_fits
from minipaged.bench.summary import median, summary
from minipaged.cli.terminal import table
from minipaged.config import SamplingParams
from minipaged.engine import Engine
from minipaged.errors import ConfigError
from minipaged.view import Recorder

WINDOW = 32
"""Steps of a window: two block boundaries of each sequence with blocks of 16."""


def measure(
    engine: Engine, *, prompt_len: int, num_windows: int, batch_sizes: list[int], progress=lambda line: None
) -> dict:
    """The cost for each batch size, as a share of the step without recording.

    Args:
        prompt_len: tokens of each prompt.
        num_windows: windows of each kind.
        batch_sizes: sequences decoded together.
        progress: called with a line of text as each number is known.

    Raises:
        ConfigError: a batch does not fit the engine's limits or its pool.
    """
    pairs = (engine.max_model_len - prompt_len - max(batch_sizes) - 1) // (2 * WINDOW) - 1  # in one run
    if pairs < 1:
        raise ConfigError(
            f"prompts of {prompt_len} tokens leave too few of max_model_len ({engine.max_model_len}) for windows of "
            f"{WINDOW} steps. Shorten the prompts or raise max_model_len."
        )
    for batch_size in batch_sizes:
        check_fits(engine, prompt_len, 2 * WINDOW * pairs, batch_size)
    batches = []
    for batch_size in batch_sizes:
        plain, traced, spent, num_bytes = [], [], [], 0
        while len(plain) < num_windows:
            part = _run(engine, prompt_len, min(pairs, num_windows - len(plain)), batch_size)
            plain, traced, spent, num_bytes = plain + part[0], traced + part[1], spent + part[2], num_bytes + part[3]
        costs = [own / (step - own) for own, step in zip(spent, traced, strict=True)]
        ratios = [b / a for a, b in zip(plain, traced, strict=True)]
        batches.append(
            {
                "batch_size": batch_size,
                "step": summary(plain),
                "traced_step": summary(traced),
                "recorder": summary(spent),
                "cost": median(costs),
                "difference": median(ratios) - 1,
                "bytes_per_step": num_bytes / (num_windows * WINDOW),
            }
        )
        progress(f"batch {batch_size}: {batches[-1]['cost']:.2%} of {median(plain) * 1e6:.0f} us")
    return {"prompt_len": prompt_len, "windows": num_windows, "steps_per_window": WINDOW, "batches": batches}


class _Timed:
    """A recorder in the engine's list, with the seconds spent in it."""

    def __init__(self, recorder: Recorder):
        self._recorder = recorder
        self.seconds = 0.0

    def scheduled(self, plan, started) -> None:
        before = time.perf_counter()
        self._recorder.scheduled(plan, started)
        self.seconds += time.perf_counter() - before

    def updated(self, began, computed, ended) -> None:
        before = time.perf_counter()
        self._recorder.updated(began, computed, ended)
        self.seconds += time.perf_counter() - before


def _run(engine: Engine, prompt_len: int, pairs: int, batch_size: int) -> tuple[list, list, list, int]:
    """Of each window the mean seconds of a step without and with recording and of these those in the recorder, and
    the characters of all steps recorded."""
    engine.use_policy(engine.config.policy)
    rng, vocab = random.Random(0), range(engine.model.config.vocab_size)
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=engine.max_model_len - prompt_len)
    ids = [engine.add_request(rng.choices(vocab, k=prompt_len), params) for _ in range(batch_size)]
    while any(request.num_tokens == prompt_len for request in engine.scheduler.requests.values()):  # prompts
        engine.step()
    _window(engine)  # warm-up
    plain, traced, spent, size = [], [], [], 0
    for number in range(pairs):
        for records in (False, True) if number % 2 else (True, False):
            if not records:
                plain.append(_window(engine))
                continue
            recorder = Recorder(engine.scheduler)
            timed = _Timed(recorder)
            engine.observers.append(timed)
            traced.append(_window(engine))
            spent.append(timed.seconds / WINDOW)
            engine.observers.remove(timed)
            size += len(json.dumps(recorder.stop().records, separators=(",", ":")))
    for request_id in ids:
        engine.abort(request_id)
    return plain, traced, spent, size


def _window(engine: Engine) -> float:
    started = time.perf_counter()
    for _ in range(WINDOW):
        engine.step()
    return (time.perf_counter() - started) / WINDOW


def text(result: dict) -> str:
    """The result as a table."""
    rows = [
        [
            batch["batch_size"],
            f"{batch['step']['median'] * 1e6:.0f}",
            f"{batch['recorder']['median'] * 1e6:.1f}",
            f"{batch['cost']:.2%}",
            f"{batch['difference']:+.2%}",
            f"{batch['bytes_per_step']:.0f}",
        ]
        for batch in result["batches"]
    ]
    headers = ["batch", "step, us", "recorder, us", "cost", "of windows", "bytes a step"]
    return table(headers, rows, right=(0, 1, 2, 3, 4, 5))
