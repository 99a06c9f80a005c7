"""What masking by a grammar costs: decode steps of one batch, free and under a JSON schema, in turn.

The cost of a step is the time that sampling takes more than for the free batch (finding what may
follow, masking, looking for the likeliest among the rest), and the time to tell the grammars of the
new tokens. It is set in relation to the whole step of the free batch. Rounds of both batches alternate,
so that a machine that slows down slows down both.

Steps differ: the fewer characters a string may still have, the longer its mask takes, and that of a number takes
next to nothing. All sequences begin together, and every round is the same text again. So each step's time
is the median of its rounds, and the steps, of which there should be enough for whole objects, count alike.
"""

from __future__ import annotations

import random
import time
from statistics import mean

from minipaged.bench.summary import median
from minipaged.config import SamplingParams
from minipaged.engine import Engine
from minipaged.errors import ConfigError

# Objects without end, so that no sequence of the batch ends while it is timed.
SCHEMA = {
    "type": "array",
    "minItems": 100_000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 20},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "email": {"type": "string", "pattern": r"^[a-z]{1,10}@[a-z]{1,10}\.(com|org)$"},
            "role": {"enum": ["admin", "user", "guest"]},
            "scores": {"type": "array", "items": {"type": "number"}, "maxItems": 4},
        },
        "required": ["name", "age", "email", "role", "scores"],
        "additionalProperties": False,
    },
}
WARM_UP_STEPS = 8
ROUNDS = 4


class _Stopwatch:
    """Adds up the seconds spent in the functions that it wraps."""

    def __init__(self):
        self.seconds = 0.0

    def wrap(self, function):
        def timed(*args, **options):
            started = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                self.seconds += time.perf_counter() - started

        return timed

    def take(self) -> float:
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def measure(
    engine: Engine, *, batch_size: int, prompt_len: int, num_steps: int, temperature: float = 0.0, top_p: float = 1.0
) -> dict:
    """Seconds of a mean step (see above): ``step`` and ``sampling`` of both batches, ``telling`` the new tokens, and
    the ``cost``; ``longer``: how much longer whole steps took under the schema.

    Raises:
        ConfigError: two batches do not fit the engine's limits.
    """
    limits = engine.scheduler.config
    total = prompt_len + 2 * (WARM_UP_STEPS + num_steps) + 8
    needed = batch_size * -(-total // limits.block_size)
    if batch_size > limits.max_num_seqs or needed > limits.num_blocks or total > engine.max_model_len:
        raise ConfigError(
            f"{batch_size} sequences of {total} tokens need max_num_seqs {batch_size}, {needed} KV blocks and "
            f"max_model_len {total}; there are {limits.max_num_seqs}, {limits.num_blocks} and {engine.max_model_len}."
        )
    sampling, telling = _Stopwatch(), _Stopwatch()
    sample = engine.sampler.sample
    engine.sampler.sample = sampling.wrap(sample)
    try:
        rounds = {"free": [], "grammar": []}
        for _ in range(ROUNDS):
            for name, grammar in (("free", None), ("grammar", {"json": SCHEMA})):
                params = SamplingParams(
                    temperature=temperature, top_p=top_p, ignore_eos=grammar is None, max_tokens=total - prompt_len,
                    structured_outputs=grammar, seed=0,
                )  # fmt: skip
                rounds[name].append(_steps(engine, params, batch_size, prompt_len, num_steps, sampling, telling))
    finally:
        engine.sampler.sample = sample
    parts = ("step", "sampling", "telling")
    free, grammar = (
        {part: mean_of_medians([[step[part] for step in steps] for steps in rounds[name]]) for part in parts}
        for name in ("free", "grammar")
    )
    cost = grammar["sampling"] + grammar["telling"] - free["sampling"]
    return {
        "batch_size": batch_size,
        "prompt_len": prompt_len,
        "temperature": temperature,
        "top_p": top_p,
        "steps_timed": num_steps,
        "rounds": ROUNDS,
        "free": free,
        "grammar": grammar,
        "cost": cost,
        "share_of_step": cost / free["step"],
        "longer": grammar["step"] / free["step"] - 1,
        "steps": rounds,
    }


def mean_of_medians(rounds: list[list[float]]) -> float:
    """The mean over steps of the median over ``rounds``, which have equally many steps."""
    return mean(median(list(same)) for same in zip(*rounds, strict=True))


def _steps(
    engine: Engine, params: SamplingParams, batch_size: int, prompt_len: int, num_steps: int, sampling, telling
) -> list[dict]:
    """Decode steps of a fresh batch, after some that are not counted."""
    engine.use_policy(engine.config.policy)
    rng = random.Random(0)
    groups = []
    for _ in range(batch_size):
        prompt = rng.choices(range(engine.model.config.vocab_size), k=prompt_len)
        group = engine.prepare(prompt, params, stream=True)
        for processor in group.sequences[0].sampling.processors:
            processor.append = telling.wrap(processor.append)
        engine.submit(group)
        groups.append(group)
    while not all(group.sequences[0].output.token_ids for group in groups):
        engine.step()
    for _ in range(WARM_UP_STEPS):
        engine.step()
    steps = []
    for _ in range(num_steps):
        sampling.take(), telling.take()
        started = time.perf_counter()
        engine.step()
        steps.append({"step": time.perf_counter() - started, "sampling": sampling.take(), "telling": telling.take()})
    for group in groups:
        engine.abort(group.request_id)
    return steps
